"""One output a class, of which a step computes a few: against dense layers, and laws of the draw."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from mach.errors import ConfigError, DataError
from mach.nn import RowAdam, SampledHead
from mach.nn.negatives import Candidates, Draw, chances, joined
from mach.nn.optimizer import rounded_at_random
from tests.nn.test_nn import FORMS, ROWS, one_thread  # noqa: F401

H, K = 6, 50


def make(n_sampled=12, **given):
    torch.manual_seed(0)
    head = SampledHead(H, K, n_sampled, **given)
    with torch.no_grad():
        head.weight.mul_(3)
        if head.bias is not None:
            head.bias.normal_()
    return head


def hidden(n=5):
    return torch.randn(n, H, generator=torch.Generator().manual_seed(1))


def targets_NK(rows):
    target = torch.zeros(len(rows), K)
    for n, row in enumerate(rows):
        target[n, row] = 1
    return target


def dense_loss(head, input, rows, weights_K=None):
    """The loss over all classes, of which each counts so often."""
    scores, target = functional.linear(input, head.weight, head.bias), targets_NK(rows)
    weights_K = torch.ones(K) if weights_K is None else weights_K
    if head.loss == "binary":
        losses = weights_K * functional.softplus(scores) - target * scores
        return losses.sum() / len(rows)
    log_sums = (weights_K * scores.exp()).sum(1, keepdim=True).log()
    shares = target / target.sum(1, keepdim=True).clamp_min(1)
    return -(shares * (scores - log_sums)).sum() / len(rows)


def gradients(head, loss, input):
    found = torch.autograd.grad(loss, [input, *head.parameters()])
    return [gradient.to_dense() for gradient in found]


@pytest.mark.parametrize("negatives", ["uniform", "frequency"])
@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize("bias", [True, False])
def test_with_all_classes_drawn_it_is_the_dense_layer(loss, negatives, bias):
    head = make(K, loss=loss, negatives=negatives, class_counts=torch.arange(K) ** 2, bias=bias)
    input = hidden().requires_grad_()
    out, expected = head(input, FORMS["lists"]), dense_loss(head, input, ROWS)
    torch.testing.assert_close(out.loss, expected)
    for found, wanted in zip(gradients(head, out.loss, input), gradients(head, expected, input), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    log_NK = head.log_prob(input)
    means_N = [log_NK[n, sorted(set(row))].mean() if row else torch.tensor(0.0) for n, row in enumerate(ROWS)]
    torch.testing.assert_close(out.output, torch.stack(means_N))


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_a_class_that_stands_for_several_counts_as_often(loss, monkeypatch):
    """So all that is linear in the weights of the draw, which are 1 on average, is unbiased."""
    head, input = make(loss=loss), hidden().requires_grad_()
    weights_K = torch.zeros(K)
    weights_K[[0, 3, 5, 15, 46, 49]] = 1.0
    weights_K[[8, 20, 31]] = torch.tensor([7.0, 2.5, 0.5])
    classes = weights_K.nonzero()[:, 0]
    monkeypatch.setattr(head, "candidates", lambda *rows: Candidates(classes, weights_K[classes].log()))
    loss, expected = head(input, FORMS["lists"]).loss, dense_loss(head, input, ROWS, weights_K)
    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(gradients(head, loss, input), gradients(head, expected, input), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


COUNTS = torch.tensor([0, 0, 0, 1, 2, 3, 5, 8, 13, 1000, 0, 40, 1], dtype=torch.float64)


@pytest.mark.parametrize("weights", [None, (COUNTS + 1).sqrt()])
@pytest.mark.parametrize("n_drawn", [1, 9])
def test_a_draw_stands_for_every_class_once_on_average(weights, n_drawn):
    torch.manual_seed(0)
    draw, n_classes, n_seeds = Draw(len(COUNTS), n_drawn, weights), len(COUNTS), 1000
    sums_K = torch.zeros(n_classes, dtype=torch.float64)
    sure = torch.tensor([9, 2])
    for _ in range(n_seeds):
        classes, corrections = joined(sure, draw())
        assert (classes.diff() > 0).all()
        assert n_drawn // 2 <= len(classes) <= n_drawn + 2
        sums_K[classes] += corrections.double().exp()
    means_K, chance_K = sums_K / n_seeds, chances(torch.ones(n_classes) if weights is None else weights, n_drawn)
    assert ((means_K - 1).abs() < 4.5 / (n_seeds * chance_K).sqrt()).all()
    torch.testing.assert_close(means_K[sure], torch.ones(2, dtype=torch.float64))


def test_chances_keep_to_the_weights_below_one():
    chance_K = chances(COUNTS, 6)
    assert torch.isclose(chance_K.sum(), torch.tensor(6.0, dtype=torch.float64))
    below = chance_K < 1
    torch.testing.assert_close(chance_K[below] / chance_K[3], COUNTS[below])
    assert chances(COUNTS, 12).sum() == 9  # as many as may be drawn
    assert len(Draw(len(COUNTS), 12, COUNTS)()[0]) == 9


def test_a_step_touches_the_candidates_alone():
    head = make()
    optimizer = RowAdam(head.parameters(), lr=0.1)
    before = {name: weight.clone() for name, weight in head.state_dict().items()}
    torch.manual_seed(5)
    expected = head.candidates(torch.tensor([3, 7]), hidden(2)).classes
    torch.manual_seed(5)
    head(hidden(2), torch.tensor([7, 3])).loss.backward()
    assert head.weight.grad.is_sparse
    assert head.bias.grad.is_sparse
    optimizer.step()
    for name, weight in head.named_parameters():
        moved = (weight != before[name]).reshape(K, -1).any(1).nonzero()[:, 0]
        assert moved.tolist() == expected.tolist()
        assert optimizer.state[weight]["n_steps"].nonzero()[:, 0].tolist() == expected.tolist()
    assert 12 <= len(expected) <= 14


def moved_by_row(weight, gradients_by_step, rate, beta):
    """As the docstring has it, a row at a time."""
    weight = weight.double().clone()
    for k in range(len(weight)):
        square, n = 0.0, 0
        for rows, values in gradients_by_step:
            if k in rows.tolist():
                g, n = values[rows == k].sum(0).double(), n + 1
                square = beta * square + (1 - beta) * float((g**2).mean())
                weight[k] -= rate * g / ((square / (1 - beta**n)) ** 0.5 + 1e-8)
    return weight.float()


@pytest.mark.parametrize("shape", [(7, 3), (7,)])
def test_rows_move_by_their_own_steps_alone(shape):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    steps = [torch.tensor(rows) for rows in ([0, 3, 3], [3], [5, 0], [3, 5])]
    given = [(rows, torch.randn(len(rows), *shape[1:], generator=generator)) for rows in steps]
    expected = moved_by_row(weight.detach(), given, 0.1, 0.99)
    optimizer = RowAdam([weight], lr=0.1, beta=0.99)
    for i, (rows, values) in enumerate(given):
        weight.grad = torch.sparse_coo_tensor(rows[None], values, shape, check_invariants=True)
        optimizer.step()
        if i == 1:  # a state is whole, and needs no pickle
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer = RowAdam([weight], lr=0.1, beta=0.99)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)


def test_a_state_of_narrow_weights_is_loaded_unrounded():
    weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
    optimizer, again = RowAdam([weight]), RowAdam([weight])
    weight.grad = torch.full_like(weight, 1 / 3)
    optimizer.step()
    optimizer.state[weight]["n_steps"] += 300  # more than bfloat16 can count to
    again.load_state_dict(optimizer.state_dict())
    for name, expected in optimizer.state[weight].items():
        torch.testing.assert_close(again.state[weight][name], expected, rtol=0, atol=0)


def test_dense_gradients_move_all_rows_and_bad_settings_are_refused():
    weight = nn.Parameter(torch.zeros(4, 2))
    weight.grad = torch.tensor([[1.0, 1.0]]).repeat(4, 1)
    RowAdam([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), torch.full((4, 2), -0.5))
    with pytest.raises(ConfigError, match="beta in"):
        RowAdam([weight], beta=1.0)


def test_bfloat16_is_rounded_right_on_average():
    torch.manual_seed(0)
    values = torch.tensor([1.0 + 2**-9, -3.0 - 2**-8, 0.5, 1e-30]).repeat(20_000, 1)
    means = rounded_at_random(values, torch.bfloat16).double().mean(0)
    torch.testing.assert_close(means.float(), values[0], rtol=2e-4, atol=0)
    assert (rounded_at_random(values, torch.bfloat16)[:, 2] == 0.5).all()


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_topk_and_log_prob_equal_all_classes_scored(loss, monkeypatch):
    head, input = make(loss=loss), hidden(7)
    with torch.no_grad():
        head.weight[20:24] = head.weight[3]  # equal scores
        head.bias[20:24] = head.bias[3]
    scores_NK = functional.linear(input, head.weight, head.bias)
    log_NK = functional.logsigmoid(scores_NK) if loss == "binary" else scores_NK.log_softmax(1)
    torch.testing.assert_close(head.log_prob(input), log_NK)
    ids_NC = torch.tensor([[4, 8]] * 7)
    with torch.no_grad():
        torch.testing.assert_close(head.log_prob(input, ids_NC, limit_bytes=0), log_NK[:, [4, 8]])
    torch.testing.assert_close(head.log_prob(input[2], torch.tensor([4, 8])), log_NK[2, [4, 8]])
    few = torch.zeros(K, dtype=torch.bool)
    few[[3, 9, 21, 22, 40]] = True
    for n_scores in (7 * 50, 7 * 8, 1):  # all at once, and in parts
        monkeypatch.setattr("mach.nn.sampled.CHUNK_SCORES", n_scores)
        torch.testing.assert_close(head.log_prob(input, ids_NC), log_NK[:, [4, 8]])
        for k in (1, 3, 10, K):
            expected = scores_NK.sort(dim=1, descending=True, stable=True)
            top = head.topk(input, k)
            torch.testing.assert_close(top.ids, expected.indices[:, :k])
            torch.testing.assert_close(top.scores, expected.values[:, :k])
            assert top.exact.all()
            torch.testing.assert_close(top.bound, top.scores[:, -1])
        top = head.topk(input, 7, allowed=few)
        assert (top.ids[:, :5].sort(1).values == few.nonzero()[:, 0]).all()
        assert (top.ids[:, 5:] == -1).all()
        assert (top.scores[:, 5:] == -torch.inf).all()
    assert head.predict(input[2]) == scores_NK[2].argmax()
    assert head.topk(input[:0], 3).ids.shape == (0, 3)


def shaped(kind, n_classes, width):
    """Weights that are hard to round."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_classes, width, generator=generator)
    if kind == "closer than a level":
        return weight[:1] + 1e-3 * weight
    if kind == "outliers":
        weight[::7] *= 1e3
        weight[:, 0] *= 50
        weight[5] = 0
    return weight[torch.arange(n_classes) % 40] if kind == "equal" else weight


@pytest.mark.parametrize("kind", ["even", "closer than a level", "outliers", "equal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_a_scan_of_rounded_weights_finds_the_same(kind, dtype, n_threads, monkeypatch):
    monkeypatch.setattr("mach.nn.rounded.torch.get_num_threads", lambda: n_threads)
    head, n_classes = SampledHead(24, 3000, 9, dtype=dtype), 3000
    with torch.no_grad():
        head.weight.copy_(shaped(kind, n_classes, 24))
        assert head.bias is not None
        head.bias.copy_(shaped(kind, n_classes, 1)[:, 0])
    input = torch.randn(300, 24, generator=torch.Generator().manual_seed(2)).to(dtype)
    few = torch.arange(n_classes) % 3 == 0
    for k, allowed in ((1, None), (5, None), (300, None), (5, few), (9, torch.arange(n_classes) < 4)):
        wanted, top = head.topk(input, k, allowed=allowed), head.topk(input, k, allowed=allowed, rounded=True)
        assert top.exact.all()
        rtol, atol = (1e-4, 1e-4) if dtype == torch.float32 else (1e-2, 0.1)  # products of bfloat16 are bfloat16
        torch.testing.assert_close(top.bound, wanted.bound, rtol=rtol, atol=atol)
        torch.testing.assert_close(top.scores, wanted.scores, rtol=rtol, atol=atol)
        if dtype == torch.float32 and kind != "closer than a level":  # no score is nearer to another than float32 tells
            assert torch.equal(top.ids, wanted.ids)
    if kind == "even":
        assert head._rounded is not None
        rows, _, is_open = head._rounded[1].possible(input, 5, None)
        assert len(rows) < 60 * len(input)
        assert not is_open.any()
    assert head.topk(input[0], 3, rounded=True).ids.shape == (3,)
    assert head.topk(input[:0], 3, rounded=True).ids.shape == (0, 3)


def test_rounded_weights_follow_the_weights():
    head, input = make(), hidden()
    with torch.no_grad():
        head.topk(input, 1, rounded=True)
        rounded = head._rounded[1]
        head.topk(input, 2, rounded=True)
        assert head._rounded[1] is rounded  # while the weights stay, so does the copy
        head.weight[7] = 50 * input[0]
        assert head.topk(input[0], 1, rounded=True).ids.tolist() == [7]
        head.bias[9] = 1e5
        assert head.topk(input[0], 1, rounded=True).ids.tolist() == [9]
        head.weight = nn.Parameter(head.weight.roll(1, 0))
        head.bias[9] = 0
        assert head.topk(input[0], 1, rounded=True).ids.tolist() == [8]
    assert sorted(head.state_dict()) == ["bias", "weight"]


@pytest.mark.parametrize("form", FORMS)
def test_targets_come_in_every_form(form):
    head = make(K)
    torch.testing.assert_close(head(hidden(), FORMS[form]), head(hidden(), FORMS["lists"]))
    single = head(hidden()[1], torch.tensor(7))
    torch.testing.assert_close(single.output, head.log_prob(hidden()[1])[7])


def test_a_state_loads_without_pickle():
    head, file = make(), io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    again = SampledHead(H, K, 3)
    again.load_state_dict(torch.load(file, weights_only=True))
    assert sorted(again.state_dict()) == ["bias", "weight"]
    torch.testing.assert_close(again.topk(hidden(), 4), head.topk(hidden(), 4))


@pytest.mark.parametrize("loss", ["softmax", "binary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_learns_many_classes_by_few_a_step(loss, dtype):
    torch.manual_seed(0)
    centres_KH = functional.normalize(torch.randn(500, 32), dim=1)
    head = SampledHead(64, 500, 40, loss=loss, dtype=dtype)
    encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
    optimizers = [torch.optim.Adam(encoder.parameters(), lr=0.01), RowAdam(head.parameters(), lr=0.05)]
    for _ in range(120):
        ids = torch.randint(0, 500, (128,))
        for optimizer in optimizers:
            optimizer.zero_grad()
        head(encoder(centres_KH[ids]), ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert (head.predict(encoder(centres_KH)) == torch.arange(500)).float().mean() > 0.9


def test_what_does_not_fit_is_refused_in_a_line():
    head = make()
    for wrong, expected in (
        (lambda: make(loss="hinge"), "unknown loss 'hinge'"),
        (lambda: make(negatives="none"), "unknown negatives 'none'"),
        (lambda: SampledHead(H, K, K + 1), "n_sampled=51"),
        (lambda: SampledHead(H, K, negatives="frequency"), "needs class_counts"),
        (lambda: SampledHead(H, K, negatives="frequency", class_counts=torch.ones(3)), r"shape \(3,\)"),
        (lambda: head.topk(hidden(), 0), "k is 0"),
        (lambda: head.topk(hidden(), 1, allowed=torch.ones(3, dtype=torch.bool)), "allowed has"),
        (lambda: head.topk(hidden() * torch.nan, 1), "NaN"),
        (lambda: head.topk(hidden() * torch.nan, 1, rounded=True), "NaN"),
        (lambda: head(hidden(), torch.full((5,), K)), "classes are 0..49"),
        (lambda: head.log_prob(hidden(), limit_bytes=10), "the limit is 10"),
    ):
        with pytest.raises((ConfigError, DataError), match=expected) as refused:
            wrong()
        assert "\n" not in str(refused.value)


def test_counts_are_used_where_they_are_given():
    counts_K = torch.arange(K) ** 3
    assert [make().negatives, make(class_counts=counts_K).negatives] == ["uniform", "frequency"]
    assert make(class_counts=counts_K, negatives="uniform").draw.ids is None
    assert make(class_counts=counts_K, negatives="lsh").draw.ids is not None


def test_the_ledger_counts_what_a_step_holds():
    ledger = SampledHead(8, 1000, 100).ledger(16)
    assert ledger.n_parameters == 9000
    assert ledger.moment_bytes == 8 * 2000
    assert (ledger.multiply_adds, ledger.full_multiply_adds) == (3 * 8 * 116, 3 * 8 * 1000)
    assert {name: value for name, value, _ in ledger.rows()}["peak of a step"] == ledger.peak_bytes
