"""Exact top-10 by the threshold algorithm against an equally compiled gather over all classes, one thread.

    python benchmarks/decoding.py            # about a minute
    python benchmarks/decoding.py --write    # also writes benchmarks/results/decoding-<date>.md

K = 670,091, R = 16, B = 4096. Planted bucket scores with log-normal background, aggregate log-mean (and
mean). The gather is the fastest we could write: a class-major uint16 table, float32 sums, nothing but a
maximum kept. Methods take turns on the same queries; figures are medians and, above all, their ratios.
"""

import argparse
import datetime
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
from hardware import commit, processor
from numba import njit

from mach.decoding import Decoder, transform
from mach.hashing import TableAssignment, UniversalAssignment

K, R, B, N, K_TOP, ROUNDS = 670_091, 16, 4096, 16, 10, 5

# name: (median and spread of the log-normal background, true classes, their highest and lowest probability)
DISTRIBUTIONS = {
    "sharp: 12 related classes, 0.95 to 0.03": (2e-4, 0.6, 12, 0.95, 0.03),
    "multi-label: 30 classes, 0.9 to 0.02": (3e-4, 0.8, 30, 0.9, 0.02),
    "few: 5 classes, 0.95 to 0.3, k = 10": (3e-4, 0.6, 5, 0.95, 0.3),
    "flat: 30 classes, 0.05 to 0.01": (3e-4, 0.8, 30, 0.05, 0.01),
}


@njit(nogil=True)
def gather_best(values_RB, table_KR):
    n_repetitions, n_buckets = values_RB.shape
    values, best = values_RB.ravel(), np.float32(-np.inf)
    for k in range(len(table_KR)):
        total = np.float32(0)
        for r in range(n_repetitions):
            total += values[np.uint64(r * n_buckets) + np.uint64(table_KR[k, r])]
        best = max(best, total)
    return best


@njit(nogil=True, fastmath=True)
def read_all(values_RB):
    best = np.float32(-np.inf)
    for value in values_RB.ravel():
        best = max(best, value)
    return best


def planted(assignment, median, spread, n_true, highest, lowest, rng):
    probs_NRB = np.exp(rng.normal(np.log(median), spread, (N, R, B)))
    for probs_RB in probs_NRB:
        buckets_RT = assignment.buckets(rng.integers(0, K, n_true))
        noisy_RT = np.geomspace(highest, lowest, n_true) * np.exp(rng.normal(0, 0.4, (R, n_true)))
        np.maximum.at(probs_RB, (np.arange(R)[:, None], buckets_RT), noisy_RT)
    return np.minimum(probs_NRB, 0.999).astype(np.float32)


def measure(actions):
    seconds = defaultdict(list)
    for name, action in [*actions.items()] * (ROUNDS + 1):  # the first turn compiles and warms up
        start = time.perf_counter()
        action()
        seconds[name].append((time.perf_counter() - start) / N)
    return {name: 1e6 * float(np.median(times[1:])) for name, times in seconds.items()}


def report():
    implicit = UniversalAssignment.draw(n_classes=K, n_buckets=B, n_repetitions=R, seed=0)
    table = TableAssignment.from_table(implicit.buckets(np.arange(K)), B)
    table_KR = np.ascontiguousarray(table.table_RK.T)
    yield (
        "| scores, aggregate | plain gather µs | Decoder gather table · implicit µs | threshold table · implicit µs "
        "| of it transform | faster than plain gather: table · implicit | classes scored | buckets opened a repetition "
        "| physical floor: read all scores |"
    )
    yield "|---|" + "---:|" * 8
    worst = (np.inf,)
    for name, parameters in DISTRIBUTIONS.items():
        probs_NRB = planted(implicit, *parameters, np.random.default_rng(1))
        for aggregate in ("log-mean", "mean"):
            decoders = {"table": Decoder(table, aggregate), "implicit": Decoder(implicit, aggregate)}
            values_NRB = transform(probs_NRB, aggregate)
            actions = {
                "plain": lambda v=values_NRB: [gather_best(values_RB, table_KR) for values_RB in v],
                "floor": lambda v=values_NRB: [read_all(values_RB) for values_RB in v],
                "transform": lambda p=probs_NRB, a=aggregate: [transform(probs_RB, a) for probs_RB in p],
            }
            for kind, decoder in decoders.items():
                for method in ("gather", "threshold"):
                    actions[kind, method] = lambda p=probs_NRB, d=decoder, m=method: [
                        d.topk(p[n : n + 1], K_TOP, method=m) for n in range(N)
                    ]
            tops = [d.topk(probs_NRB, K_TOP, method=m) for d in decoders.values() for m in ("gather", "threshold")]
            for other in tops:
                assert np.array_equal(other.ids_Nk, tops[0].ids_Nk)
                assert np.array_equal(other.scores_Nk, tops[0].scores_Nk)
            us = measure(actions)
            top = tops[-1]
            worst = min(worst, *((us["plain"] / us[kind, "threshold"], kind, name, aggregate) for kind in decoders))
            yield (
                f"| {name}; {aggregate} | {us['plain']:.0f} "
                f"| {us['table', 'gather']:.0f} · {us['implicit', 'gather']:.0f} "
                f"| {us['table', 'threshold']:.0f} · {us['implicit', 'threshold']:.0f} | {us['transform']:.0f} "
                f"| {us['plain'] / us['table', 'threshold']:.1f} · {us['plain'] / us['implicit', 'threshold']:.1f} "
                f"| {top.n_scored_N.mean() / K:.1%} | {top.n_opened_N.mean() / R:.0f} | {us['floor']:.0f} |"
            )
    ratio, kind, name, aggregate = worst
    yield ""
    yield f"Worst ratio to the plain gather: {ratio:.2f} ({kind}, {name}; {aggregate}); below 1 is slower."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    lines = [
        f"# Decoding, {datetime.date.today()}",
        "",
        f"`python benchmarks/decoding.py`: K {K:,}, R {R}, B {B}, exact top {K_TOP}, single queries, one thread, "
        f"median microseconds a query over {ROUNDS} turns of {N} queries; every method gave identical ids and scores. "
        "Threshold times include the transform; a plain gather does not. Classes scored and buckets opened: implicit.",
        f"{processor()}, commit {commit()}.",
        "",
    ]
    print("\n".join(lines), flush=True)
    arguments = parser.parse_args()
    for line in report():
        print(line, flush=True)
        lines.append(line)
    if arguments.write:
        path = Path(__file__).parent / "results" / f"decoding-{datetime.date.today()}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
