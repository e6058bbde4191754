"""The output layer for models of one's own: against numpy's hash, plain torch losses, and all classes scored."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mach.errors import ConfigError, DataError
from mach.nn import HeadLedger, MACHHead
from mach.sketch.decoder import topk_oracle
from mach.sketch.hashing import MAX_CAPACITY, smallest_prime_at_least

H, K, B, R = 6, 50, 8, 3


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Steps this small are slower with two, which wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


def make(loss="softmax", **given):
    torch.manual_seed(0)
    given = {"in_features": H, "n_classes": K, "n_buckets": B, "n_repetitions": R, **given}
    return MACHHead(loss=loss, **given)


def hidden(n=5, dtype=torch.float32):
    return torch.randn(n, H, generator=torch.Generator().manual_seed(1), dtype=dtype)


def plain_log_probs(head, input):
    """Log-probabilities of all classes as ``log-mean``, a repetition at a time, with numpy's buckets: (N, K)."""
    columns = []
    for r, bucket_K in enumerate(head.assignment.buckets(np.arange(head.n_classes))):
        rows = slice(r * head.n_buckets, (r + 1) * head.n_buckets)
        scores_NB = input @ head.weight[rows].T + (0 if head.bias is None else head.bias[rows])
        log_NB = functional.logsigmoid(scores_NB) if head.loss == "binary" else torch.log_softmax(scores_NB, 1)
        columns.append(log_NB[:, torch.from_numpy(bucket_K).long()])
    return torch.stack(columns).mean(0)


@pytest.mark.parametrize("n_classes", [1, 1000, 10_000_019, MAX_CAPACITY])
def test_buckets_equal_those_of_numpy(n_classes):
    head = MACHHead(2, n_classes, n_buckets=97, n_repetitions=5, seed=3)
    classes = np.unique(np.append(np.linspace(0, n_classes - 1, 500).astype(np.int64), n_classes - 1))
    expected = head.assignment.buckets(classes)
    np.testing.assert_array_equal(head.buckets(torch.from_numpy(classes)).numpy(), expected)
    assert len(np.unique(expected)) > 1 or n_classes == 1


@pytest.mark.parametrize("bias", [True, False])
def test_softmax_loss_is_the_mean_cross_entropy_over_repetitions(bias):
    head, input, target = make(bias=bias), hidden(), torch.tensor([0, 49, 7, 7, 23])
    out = head(input, target)
    losses = []
    for r, bucket_N in enumerate(head.assignment.buckets(target)):
        rows = slice(r * B, (r + 1) * B)
        scores_NB = functional.linear(input, head.weight[rows], head.bias[rows] if bias else None)
        losses.append(functional.cross_entropy(scores_NB, torch.from_numpy(bucket_N).long()))
    torch.testing.assert_close(out.loss, torch.stack(losses).mean())
    torch.testing.assert_close(out.output, plain_log_probs(head, input)[torch.arange(5), target])
    single = head(input[1], target[1])
    torch.testing.assert_close(single.output, out.output[1])
    torch.testing.assert_close(single.loss, -out.output[1])


ROWS = [[3, 15], [], [49], [5, 5, 46], [0]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_narrow_types_are_taken(dtype):
    head, target = make(n_classes=1_000_003), torch.tensor([0, 100, 120, 64, 67])
    torch.testing.assert_close(head(hidden(), target.to(dtype)), head(hidden(), target))
    narrow, wide = make("binary"), torch.tensor([0, 1, 2, 3, 49])
    torch.testing.assert_close(narrow(hidden(), wide[:, None].to(dtype)), narrow(hidden(), wide))


FORMS = {
    "lists": ROWS,
    "tensors": [torch.tensor(row, dtype=torch.int64) for row in ROWS],
    "padded": torch.tensor([[3, 15, -1], [-1, -1, -1], [-1, 49, -1], [5, 5, 46], [0, -1, -1]]),
    "bag": (torch.tensor([3, 15, 49, 5, 5, 46, 0]), torch.tensor([0, 2, 2, 3, 6])),
    "bag with end": (torch.tensor([3, 15, 49, 5, 5, 46, 0]), torch.tensor([0, 2, 2, 3, 6, 7])),
}


@pytest.mark.parametrize("form", FORMS)
def test_binary_loss_is_that_of_the_union_of_buckets(form):
    head, input = make("binary"), hidden()
    out = head(input, FORMS[form])
    wanted_NRB = torch.zeros(5, R, B)
    for n, row in enumerate(ROWS):
        for r, bucket in itertools.product(range(R), range(len(row))):
            wanted_NRB[n, r, int(head.assignment.buckets(row)[r, bucket])] = 1
    scores = functional.linear(input, head.weight, head.bias)
    expected = functional.binary_cross_entropy_with_logits(scores, wanted_NRB.flatten(1), reduction="sum") / (5 * R)
    torch.testing.assert_close(out.loss, expected)
    assert wanted_NRB[0].sum() < 2 * R  # two classes share a bucket
    log_NK = plain_log_probs(head, input)
    expected_N = [log_NK[n, sorted(set(row))].mean() if row else torch.tensor(0.0) for n, row in enumerate(ROWS)]
    torch.testing.assert_close(out.output, torch.stack(expected_N))


def test_one_class_a_row_is_a_target_of_the_binary_loss_too():
    head, target = make("binary"), torch.tensor([1, 2, 3, 4, 5])
    torch.testing.assert_close(head(hidden(), target), head(hidden(), target[:, None]))


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_gradients_are_those_of_finite_differences(loss):
    head, target = make(loss, dtype=torch.float64), torch.tensor([0, 7, 7])
    input = hidden(3, torch.float64).requires_grad_()
    names, weights = zip(*((name, w.detach().requires_grad_()) for name, w in head.named_parameters()), strict=True)

    def step(input, *weights):
        return tuple(torch.func.functional_call(head, dict(zip(names, weights, strict=True)), (input, target)))

    assert torch.autograd.gradcheck(step, (input, *weights))


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_topk_and_log_prob_equal_all_classes_scored(loss, monkeypatch):
    monkeypatch.setattr("mach.nn.head.CHUNK_SCORES", 2 * 32 * 4)  # two rows a part
    head = make(loss, n_classes=700, n_buckets=32, n_repetitions=4)
    input = 3 * hidden(7)
    log_NK = plain_log_probs(head, input)
    torch.testing.assert_close(head.log_prob(input), log_NK)
    top = head.topk(input, 10)
    expected = log_NK.topk(10)
    torch.testing.assert_close(top.scores, expected.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.log_prob(input, top.ids), top.scores, rtol=1e-4, atol=1e-5)
    assert top.exact.all()
    assert (top.bound <= top.scores[:, -1]).all()
    probs_NRB = head._log_probs(input).detach().exp().numpy()
    np.testing.assert_array_equal(top.ids, topk_oracle(probs_NRB, head.assignment, 10, "log-mean")[0])
    torch.testing.assert_close(head.predict(input), top.ids[:, 0])
    torch.testing.assert_close(head.topk(input[2], 10).ids, top.ids[2])
    assert head.predict(input[2]) == top.ids[2, 0]
    few = torch.zeros(700, dtype=torch.bool)
    few[5:9] = True
    found = head.topk(input, 5, allowed=few).ids
    assert (found[:, :4].sort(1).values == torch.arange(5, 9)).all()
    assert (found[:, 4] == -1).all()
    assert head.topk(input[:0], 3).ids.shape == (0, 3)


def every_hash(n_classes, n_buckets):
    """A head whose repetitions are all the functions of the family, and whose buckets know the classes exactly."""
    prime = smallest_prime_at_least(n_classes)
    draws = torch.tensor(list(itertools.product(range(1, prime), range(prime))))
    head = MACHHead(1, n_classes, n_buckets, len(draws))
    head.multipliers_R.copy_(draws[:, 0])
    head.offsets_R.copy_(draws[:, 1])
    p_K = torch.rand(n_classes, generator=torch.Generator().manual_seed(2)) ** 4
    p_K /= p_K.sum()
    probs_RB = torch.zeros(len(draws), n_buckets)
    probs_RB.scatter_add_(1, head.buckets(torch.arange(n_classes)), p_K.expand(len(draws), -1))
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        assert head.bias is not None
        head.bias.copy_(probs_RB.clamp_min(1e-30).log().flatten())
    return head, p_K


@pytest.mark.parametrize(("n_classes", "n_buckets"), [(13, 4), (13, 2), (17, 5), (11, 30)])
def test_the_unbiased_estimate_is_exact_on_average_over_the_family(n_classes, n_buckets):
    head, p_K = every_hash(n_classes, n_buckets)
    estimate_K = head.log_prob(torch.zeros(1), estimate="unbiased").exp()
    torch.testing.assert_close(estimate_K, p_K, rtol=1e-3, atol=1e-5)
    assert math.isclose(estimate_K.sum().item(), 1, rel_tol=1e-4)


def test_the_log_mean_sums_to_more_than_one_and_normalized_to_one():
    head, input = make(), hidden()
    assert (head.log_prob(input).exp().sum(1) > 2).all()
    normalized_NK = head.log_prob(input, estimate="normalized")
    torch.testing.assert_close(normalized_NK.exp().sum(1), torch.ones(5))
    torch.testing.assert_close(normalized_NK, torch.log_softmax(2 * plain_log_probs(head, input), 1))
    product_NK = head.log_prob(input, estimate="normalized", power=R)
    torch.testing.assert_close(product_NK, torch.log_softmax(R * plain_log_probs(head, input), 1))
    ids_NC = torch.tensor([[4, 8]] * 5)
    with torch.no_grad():
        some_NC = head.log_prob(input, ids_NC, estimate="normalized", limit_bytes=0)
    torch.testing.assert_close(some_NC, normalized_NK.gather(1, ids_NC))
    torch.testing.assert_close(head.log_prob(input[3], torch.tensor([4, 8]), estimate="normalized"), some_NC[3])


def test_the_normalizer_does_not_depend_on_its_parts(monkeypatch):
    head, input = make(), hidden()
    whole = head.log_prob(input, estimate="normalized")
    monkeypatch.setattr("mach.nn.head.CHUNK_SCORES", 5 * 7)
    torch.testing.assert_close(head.log_prob(input, estimate="normalized"), whole)


@pytest.mark.parametrize("loss", ["softmax", "binary"])
def test_it_learns_many_classes_through_few_outputs(loss):
    """500 classes planted in 32 dimensions through 128 outputs; a head with a wrong hash finds 1 in 500."""
    torch.manual_seed(0)
    centres_KH = functional.normalize(torch.randn(500, 32), dim=1)
    head = MACHHead(64, 500, n_buckets=32, n_repetitions=4, loss=loss)
    encoder = nn.Sequential(nn.Linear(32, 64), nn.ReLU())
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=0.03, fused=True)
    for _ in range(100):
        ids = torch.randint(0, 500, (256,))
        optimizer.zero_grad()
        head(encoder(6 * centres_KH[ids]), ids).loss.backward()
        optimizer.step()
    found = head.predict(encoder(6 * centres_KH))
    assert (found == torch.arange(500)).float().mean() > 0.95


def test_a_saved_state_answers_alike_and_needs_no_pickle():
    head, other = make(seed=1), make(seed=2)
    assert not torch.equal(head.multipliers_R, other.multipliers_R)
    other.topk(hidden(), 1)  # prepares a decoder for the hash functions that are then replaced
    file = io.BytesIO()
    torch.save(head.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for found, expected in zip(other.topk(hidden(), 4), head.topk(hidden(), 4), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(other(hidden(), torch.arange(5)), head(hidden(), torch.arange(5)))


def test_a_state_of_other_classes_is_refused_although_shapes_agree():
    whole = nn.ModuleDict({"head": make(n_classes=51)})
    with pytest.raises(
        RuntimeError, match=r"head.sizes: K, B, p are \[50, 8, 53\] in the state and \[51, 8, 53\] here"
    ):
        whole.load_state_dict(nn.ModuleDict({"head": make()}).state_dict())


def test_reduced_precision_takes_log_probabilities_in_float32():
    head = make().bfloat16()
    assert head.multipliers_R.dtype == torch.int64
    out = head(hidden().bfloat16(), torch.arange(5))
    assert out.output.dtype == torch.float32
    exact = make()(hidden(), torch.arange(5))
    torch.testing.assert_close(out.output, exact.output, rtol=0.02, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = make()(hidden(), torch.arange(5))
    torch.testing.assert_close(out.output, exact.output, rtol=0.02, atol=0.02)
    assert out.output.dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss": "hinge"}, "unknown loss 'hinge': choose one of softmax, binary"),
        ({"n_classes": 0}, "n_classes is 0"),
        ({"in_features": 0}, "n_features is 0"),
        ({"n_buckets": 1}, "n_buckets is 1"),
        ({"n_repetitions": 0}, "n_repetitions is 0"),
    ],
)
def test_a_head_that_cannot_be_is_refused(given, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make(**given)
    assert "\n" not in str(caught.value)


PADDED = torch.tensor([[1, 2, -1]] * 5)


@pytest.mark.parametrize(
    ("loss", "target", "message"),
    [
        ("softmax", torch.tensor([0, 1, 50, 2, 3]), r"target\[2\] is 50: classes are 0..49"),
        ("softmax", torch.tensor([0, -1, 5, 2, 3]), r"target\[1\] is -1: classes are 0..49"),
        ("softmax", torch.zeros(5), "target is torch.float32: need integers"),
        ("softmax", torch.zeros(4, dtype=torch.int64), r"target has shape \(4,\) for 5 rows"),
        ("softmax", PADDED, r"shape \(5, 3\) for 5 rows: .* need loss='binary'"),
        ("softmax", [[1], [2], [3], [4], [5]], "type list for 5 rows"),
        ("binary", PADDED + 48, r"target\[0, 1\] is 50"),
        ("binary", PADDED - 1, r"target\[0, 2\] is -2"),
        ("binary", [[1], [2], [3, -1], [4], [5]], "an id is negative"),
        ("binary", [[1], [2.5], [3], [4], [5]], "no list of integers"),
        ("binary", [[1]], r"target has shape \(1, 1\) for 5 rows"),
        ("binary", (torch.tensor([1, 2]), torch.tensor([0, 1])), "offsets of length 2 for 5 rows and 2 ids"),
        ("binary", (torch.tensor([1, 2]), torch.tensor([0, 2, 1, 2, 2])), "that ascend from 0"),
        ("binary", (torch.tensor([1, 60]), torch.tensor([0, 1, 1, 2, 2])), r"target ids\[1\] is 60"),
    ],
)
def test_a_wrong_target_is_named(loss, target, message):
    with pytest.raises(DataError, match=message) as caught:
        make(loss)(hidden(), target)
    assert "\n" not in str(caught.value)


def test_wrong_inputs_classes_and_estimates_are_named():
    head = make()
    with pytest.raises(DataError, match=r"input has shape \(5, 7\): need \(N, 6\)"):
        head(torch.zeros(5, 7), torch.arange(5))
    with pytest.raises(DataError, match=r"classes\[1\] is 50"):
        head.log_prob(hidden(), torch.tensor([0, 50]))
    with pytest.raises(DataError, match=r"classes have shape \(4, 2\) for 5 rows"):
        head.log_prob(hidden(), torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(DataError, match="5 rows of all 50 classes take 1000 bytes, the limit is 999"):
        head.log_prob(hidden(), limit_bytes=999)
    with pytest.raises(DataError, match="NaN or infinity"):
        head.topk(torch.full((1, 6), torch.nan))
    with pytest.raises(ConfigError, match="unknown estimate 'mean'"):
        head.log_prob(hidden(), estimate="mean")
    with pytest.raises(ConfigError, match="the loss is 'binary'"):
        make("binary").log_prob(hidden(), estimate="unbiased")


def test_sizes_left_open_follow_the_plan_and_memory_does_not_follow_the_classes():
    assert (make(n_buckets=None, n_repetitions=None, n_classes=20_000).extra_repr()) == (
        "in_features=6, n_classes=20000, n_buckets=1024, n_repetitions=4, loss='softmax', bias=True"
    )
    heads = [MACHHead(4, n_classes, 256, 4) for n_classes in (10**4, 10**8)]
    elements = [sum(t.numel() for t in head.state_dict().values()) for head in heads]
    assert elements[0] == elements[1] == 256 * 4 * 5 + 2 * 4 + 3


def test_the_ledger_counts_the_parameters_of_the_head():
    head = make()
    ledger = head.ledger(n_rows=32)
    assert ledger.n_parameters == sum(w.numel() for w in head.parameters())
    assert ledger.weight_bytes == sum(w.nbytes for w in head.parameters())
    assert ledger == HeadLedger(H, K, B, R, 32)
    assert ("peak of a step", ledger.peak_bytes, "bytes") in ledger.rows()
    assert HeadLedger(H, K, B, R, 32, n_moments=0).moment_bytes == 0


def test_a_compiled_step_is_one_graph():
    head = make()
    torch._dynamo.reset()
    step = torch.compile(head, backend="eager", fullgraph=True)
    torch.testing.assert_close(step(hidden(), torch.arange(5)), head(hidden(), torch.arange(5)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("loss", "form"), [("softmax", None), ("binary", "bag"), ("binary", "lists")])
def test_a_gpu_answers_as_the_processor(loss, form):
    here, there = make(loss), make(loss, device="cuda")
    there.load_state_dict(here.state_dict())
    input, target = hidden(), torch.arange(5) if form is None else FORMS[form]
    moved = target.cuda() if isinstance(target, torch.Tensor) else target
    for found, expected in zip(there(input.cuda(), moved), here(input, target), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(there.topk(input.cuda(), 3).ids.cpu(), here.topk(input, 3).ids)
    torch.testing.assert_close(there.log_prob(input.cuda()).cpu(), here.log_prob(input), rtol=1e-4, atol=1e-5)
