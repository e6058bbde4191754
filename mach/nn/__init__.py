"""MACH as the output layer of a PyTorch model of your own: loss, exact top-k and log-probabilities for any K.

`MACHHead` has the shape of `torch.nn.AdaptiveLogSoftmaxWithLoss`. In place of K outputs it has R groups of B; class k
stands for output ``h_r(k)`` of group r (`mach.sketch.hashing`), and each group is a small classifier of its own over
hidden states that all share. Weights, gradients and moments take O(R B H), whatever K is.

Three estimates of a class's probability come of its R bucket probabilities ``P_r``:

==============  =======================================================================================================
``log-mean``    ``mean_r log P_r``: what is trained and what ranks. An upper estimate, for a bucket holds other classes
                too: over all classes the exponentials sum to more than 1
``unbiased``    ``log((mean_r P_r - c) / (1 - c))``, c the chance that two classes share a bucket: exact on average over
                the hash functions, but noisy (docs/mathematics.md has their variance), and -87.3 where noise leaves
                nothing. With c = 1 / B it is theorem 1 of Medini et al., "Extreme Classification in Log Memory", 2019;
                with the c of this family the estimates of all classes sum to 1 on average, as they should
``normalized``  ``power * mean_r log P_r`` less its log-sum-exp over all classes: a distribution, at a cost of O(K).
                A power of R gives the product of experts (Hinton, Neural Computation 14, 2002), far too sure where
                these share hidden states; 1 is too flat, and the default lies between
==============  =======================================================================================================

Importing this module imports torch; ``import mach`` does not.
"""

from __future__ import annotations

from mach.nn.answers import Output, Top
from mach.nn.head import MACHHead
from mach.nn.ledger import HeadLedger, SampledLedger
from mach.nn.optimizer import RowAdam
from mach.nn.sampled import SampledHead
from mach.nn.tables import HashTables
from mach.nn.targets import Target

__all__ = ["HashTables", "HeadLedger", "MACHHead", "Output", "RowAdam", "SampledHead", "SampledLedger", "Target", "Top"]
