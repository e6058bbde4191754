"""Hash tables over classes: laws of retrieval, and what a head does with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from mach.errors import ConfigError
from mach.nn import HashTables, SampledHead
from tests.nn.test_nn import one_thread  # noqa: F401


def at_angle(angle, n, width, seed):
    """Pairs of unit vectors at an angle, two Tensors of shape (n, width)."""
    generator = torch.Generator().manual_seed(seed)
    x, other = (functional.normalize(torch.randn(n, width, generator=generator)) for _ in range(2))
    across = functional.normalize(other - (other * x).sum(1, keepdim=True) * x)
    return x, math.cos(angle) * x + math.sin(angle) * across


@pytest.mark.parametrize("angle", [0.2, 1.0, 2.0, 3.0])
def test_simhash_bits_meet_by_the_angle(angle):
    shared = []
    for seed in range(8):
        tables = HashTables(16, n_tables=2000, n_bits=1, seed=seed)
        x, y = at_angle(angle, 40, 16, seed)
        shared.append((tables.codes(x) == tables.codes(3 * y)).float().mean())
    assert abs(torch.stack(shared).mean().item() - (1 - angle / math.pi)) < 0.01


@pytest.mark.parametrize(("angle", "n_bits", "n_tables"), [(0.3, 6, 4), (0.6, 8, 8), (1.0, 4, 3)])
def test_retrieval_follows_from_bits_and_tables(angle, n_bits, n_tables):
    found = []
    for seed in range(25):
        x, y = at_angle(angle, 400, 16, seed)
        rows, ids = HashTables(16, n_tables, n_bits, seed=seed).build([y]).met(x)
        found.append(len(rows[rows == ids].unique()) / 400)
    share = 1 - angle / math.pi
    assert abs(sum(found) / len(found) - (1 - (1 - share**n_bits) ** n_tables)) < 0.02


@pytest.mark.parametrize("family", ["simhash", "dwta"])
def test_tables_are_classes_by_code_in_four_bytes_each(family):
    vectors = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    tables = HashTables(12, n_tables=3, n_bits=6, family=family)
    tables.build([vectors[:100], vectors[100:]])
    codes_KL = tables.codes(vectors)
    assert codes_KL.min() >= 0
    assert 8 < len(codes_KL[:, 0].unique()) <= 2**6
    assert tables.n_bytes == 4 * 3 * (300 + 2**6 + 1)
    rows, ids = tables.met(vectors[:5])
    for n in range(5):
        expected = [
            k for table in range(3) for k in (codes_KL[:, table] == codes_KL[n, table]).nonzero()[:, 0].tolist()
        ]
        assert ids[rows == n].tolist() == expected
    counts = torch.bincount(ids, minlength=300)
    hardest = tables.hardest(vectors[:5], 7)
    assert len(hardest) == 7
    assert counts[hardest].min() >= counts.sort(descending=True).values[6]


def test_dwta_heeds_order_alone_and_fills_groups_of_zeros():
    tables = HashTables(40, n_tables=6, n_bits=6, family="dwta")
    vectors = torch.rand(50, 40, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.equal(tables.codes(vectors), tables.codes(vectors.exp() - 1))
    assert not torch.equal(tables.codes(vectors), tables.codes(-vectors))
    sparse = vectors * (torch.rand(vectors.shape, generator=torch.Generator().manual_seed(1)) < 0.2)
    assert (sparse[:, tables.plan] == 0).all(2).any()
    winners = torch.stack([(tables.codes(sparse) >> shift) & 7 for shift in (0, 3)], 2).flatten(1)
    for n, g in ((n, g) for n in range(50) for g in range(winners.shape[1])):
        lender = next(j for i in range(12) if sparse[n, tables.plan[j := (g + i) % 12]].any())
        assert winners[n, g] == sparse[n, tables.plan[lender]].argmax()


def test_wrong_tables_are_refused():
    for given, expected in (({"n_bits": 25}, "n_bits=25"), ({"n_bits": 4, "family": "dwta"}, "for dwta")):
        with pytest.raises(ConfigError, match=expected):
            HashTables(4, **given)
    with pytest.raises(ConfigError, match="need 5"):
        SampledHead(4, 10, tables=HashTables(4))


def head_of(n_bits, n_tables, **given):
    torch.manual_seed(0)
    head = SampledHead(8, 400, 40, tables=HashTables(9, n_tables, n_bits), **given)
    with torch.no_grad():
        head.weight.add_(2)  # a mean that all share, which tables leave out
        assert head.bias is not None
        head.bias.normal_()
    return head, torch.randn(6, 8)


def test_tables_leave_out_what_raises_all_classes_alike():
    head, _ = head_of(6, 4)
    head.build_tables()
    before = head.tables.order_LK
    with torch.no_grad():
        head.weight.add_(torch.arange(8.0))
        head.bias.add_(5)
    head.build_tables()
    assert (head.tables.order_LK == before).float().mean() > 0.9  # but for rounding


def test_half_of_the_negatives_are_those_that_the_tables_name_and_stand_for_themselves():
    head, input = head_of(4, 8, negatives="lsh")
    classes, corrections = head.candidates(torch.tensor([3]), input)
    hardest = head.tables.hardest(functional.pad(input, (0, 1), value=1.0), 20)
    sure = torch.cat([hardest, torch.tensor([3])])
    assert torch.isin(sure, classes).all()
    assert (corrections[torch.isin(classes, sure)] == 0).all()
    torch.testing.assert_close(corrections[~torch.isin(classes, sure)].exp(), torch.full((len(classes) - 21,), 20.0))
    assert 30 <= len(classes) <= 41
    scores_NK = functional.linear(input, head.weight, head.bias)
    scores_NK = scores_NK - scores_NK.mean(1, keepdim=True)
    assert scores_NK[:, hardest].mean() > 0.2 * scores_NK.std()


def test_tables_are_built_on_a_growing_schedule(monkeypatch):
    head, input = head_of(4, 2, negatives="lsh")
    built = []
    monkeypatch.setattr(head, "build_tables", lambda: built.append(head._n_steps))
    for _ in range(100):
        head.candidates(torch.tensor([3]), input)
    assert built == [0, 16, 24, 36, 54, 81]
