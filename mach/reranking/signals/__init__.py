"""The list of all signals; to add one, write its file (`mach.reranking.signals.contract`) and name it here."""

from collections.abc import Iterable

from mach.reranking.signals.classifiers import Classifiers
from mach.reranking.signals.contract import Scale, Signal
from mach.reranking.signals.likeness import Likeness
from mach.reranking.signals.mention import Mention
from mach.reranking.signals.networks import Aggregate, Context
from mach.reranking.signals.prior import Prior
from mach.reranking.signals.repeats import Repeats
from mach.reranking.signals.rules import Rules

# Learned orders of stored runs weigh the columns in this order: a new signal goes to the end.
SIGNALS: tuple[type[Signal], ...] = (Aggregate, Prior, Context, Classifiers, Rules, Repeats, Mention, Likeness)


def present(signals: Iterable[Signal]) -> list[Signal]:
    """Signals without those that are young and have no data."""
    return [signal for signal in signals if signal.arrays or not signal.is_young]


def expected_bytes(scale: Scale) -> int:
    """How many bytes a re-ranker will take, about."""
    return sum(kind.expected_bytes(scale) for kind in SIGNALS)
