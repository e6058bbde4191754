"""Exact top-10 by the threshold algorithm against an equally compiled gather over all classes, one thread.

    python benchmarks/decoding.py            # a minute or two
    python benchmarks/decoding.py --write    # also writes benchmarks/results/decoding-<date>.md

First K = 670,091, R = 16, B = 4096: planted bucket scores with log-normal background, aggregates log-mean and mean. The
gather is the fastest we could write: a class-major uint16 table, float32 sums, nothing but a maximum kept. Methods take
turns on the same queries; figures are medians of processor time and, above all, their ratios. Then how the cost of
implicit hashing grows with K, R, B and with the sharpness of the scores, up to 50 million classes.
"""

import argparse
import datetime
import os
import resource
import time
from pathlib import Path

import numpy as np
from hardware import commit, processor
from numba import njit
from turns import medians, ratio

from mach.sketch.aggregates import transform
from mach.sketch.decoder import Decoder
from mach.sketch.hashing import UniversalAssignment
from mach.sketch.tables import TableAssignment

K, R, B, N, K_TOP, ROUNDS = 670_091, 16, 4096, 16, 10, 5

# name: (median and spread of the log-normal background, true classes, their highest and lowest probability)
DISTRIBUTIONS = {
    "sharp: 12 related classes, 0.95 to 0.03": (2e-4, 0.6, 12, 0.95, 0.03),
    "multi-label: 30 classes, 0.9 to 0.02": (3e-4, 0.8, 30, 0.9, 0.02),
    "few: 5 classes, 0.95 to 0.3, k = 10": (3e-4, 0.6, 5, 0.95, 0.3),
    "flat: 30 classes, 0.05 to 0.01": (3e-4, 0.8, 30, 0.05, 0.01),
}
NOISE = "noise: no true class"
SHAPES = [
    (100_000, 16, 4096),
    (670_091, 16, 4096),
    (10_000_000, 4, 20_000),
    (10_000_000, 16, 20_000),
    (10_000_000, 32, 20_000),
    (10_000_000, 16, 4096),
    (10_000_000, 16, 65_536),
    (50_000_000, 16, 20_000),
]


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


def planted(assignment, name, rng, n=N):
    median, spread, n_true, highest, lowest = DISTRIBUTIONS.get(name, (3e-4, 0.8, 0, 1.0, 1.0))
    shape = n, assignment.n_repetitions, assignment.n_buckets
    probs_NRB = np.exp(rng.normal(np.log(median), spread, shape))
    for probs_RB in probs_NRB:
        buckets_RT = assignment.buckets(rng.integers(0, assignment.n_classes, n_true))
        noisy_RT = np.geomspace(highest, lowest, n_true) * np.exp(rng.normal(0, 0.4, (shape[1], n_true)))
        np.maximum.at(probs_RB, (np.arange(shape[1])[:, None], buckets_RT), noisy_RT)
    return np.minimum(probs_NRB, 0.999).astype(np.float32)


class Case:
    """One distribution and aggregate at K = 670,091: callables that decode the same queries one by one."""

    implicit = UniversalAssignment.draw(n_classes=K, n_buckets=B, n_repetitions=R, seed=0)
    table = TableAssignment.from_table(implicit.buckets(np.arange(K)), B)
    table_KR = np.ascontiguousarray(table.table_RK.T)

    def __init__(self, name, aggregate="log-mean"):
        self.name, self.aggregate = name, aggregate
        self.probs_NRB = planted(self.implicit, name, np.random.default_rng(1))
        self.values_NRB = transform(self.probs_NRB, aggregate)
        self.decoders = {kind: Decoder(getattr(self, kind), aggregate) for kind in ("table", "implicit")}

    def gather(self):
        """The frozen baseline; transforms nothing and keeps a maximum only."""
        return [gather_best(values_RB, self.table_KR) for values_RB in self.values_NRB]

    def decode(self, kind, method="threshold"):
        return [self.decoders[kind].topk(probs_RB[None], K_TOP, method=method) for probs_RB in self.probs_NRB]

    def threshold(self):
        return self.decode("implicit")

    def floor(self):
        return [probs_RB.max() for probs_RB in self.probs_NRB]

    def transform(self):
        return [transform(probs_RB, self.aggregate) for probs_RB in self.probs_NRB]

    def ratio(self, kind="implicit", rounds=ROUNDS):
        """How many times faster than the gather."""
        return ratio(self.gather, lambda: self.decode(kind), rounds)

    def check(self):
        tops = [
            d.topk(self.probs_NRB, K_TOP, method=m) for d in self.decoders.values() for m in ("gather", "threshold")
        ]
        for other in tops:
            assert np.array_equal(other.ids_Nk, tops[0].ids_Nk)
            assert np.array_equal(other.scores_Nk, tops[0].scores_Nk)
        return tops[-1]


def report():
    yield (
        "| scores, aggregate | plain gather µs | Decoder gather table · implicit µs | threshold table · implicit µs "
        "| of it transform | faster than plain gather: table · implicit | classes scored | buckets opened a repetition "
        "| physical floor: read all scores |"
    )
    yield "|---|" + "---:|" * 8
    worst = (np.inf,)
    for name in DISTRIBUTIONS:
        for aggregate in ("log-mean", "mean"):
            case = Case(name, aggregate)
            top = case.check()
            actions = {"plain": case.gather, "floor": case.floor, "transform": case.transform}
            for kind in case.decoders:
                for method in ("gather", "threshold"):
                    actions[kind, method] = lambda c=case, k=kind, m=method: c.decode(k, m)
            us = {name: 1e6 * s / N for name, s in medians(actions, ROUNDS, time.thread_time).items()}
            worst = min(
                worst, *((us["plain"] / us[kind, "threshold"], kind, name, aggregate) for kind in case.decoders)
            )
            yield (
                f"| {name}; {aggregate} | {us['plain']:.0f} "
                f"| {us['table', 'gather']:.0f} · {us['implicit', 'gather']:.0f} "
                f"| {us['table', 'threshold']:.0f} · {us['implicit', 'threshold']:.0f} | {us['transform']:.0f} "
                f"| {us['plain'] / us['table', 'threshold']:.1f} · {us['plain'] / us['implicit', 'threshold']:.1f} "
                f"| {top.n_scored_N.mean() / K:.1%} | {top.n_opened_N.mean() / R:.0f} | {us['floor']:.0f} |"
            )
    times, kind, name, aggregate = worst
    yield ""
    yield f"Worst ratio to the plain gather: {times:.2f} ({kind}, {name}; {aggregate}); below 1 is slower."


def growth():
    yield "## How the cost of implicit hashing grows"
    yield ""
    yield (
        f"Milliseconds a single query, exact top {K_TOP}, log-mean; classes scored in brackets. With no true class the "
        "query has a budget of K / 10 classes: it says that its answer is not certain, and what may be missed "
        "(`exact_N`, `bound_N`). The floor is reading the bucket scores once."
    )
    yield ""
    yield "| K | R | B | " + " | ".join(name.partition(":")[0] for name in [*DISTRIBUTIONS, NOISE]) + " | floor |"
    yield "|" + "---:|" * (4 + len(DISTRIBUTIONS) + 1)
    for n_classes, n_repetitions, n_buckets in SHAPES:
        assignment = UniversalAssignment.draw(
            n_classes=n_classes, n_buckets=n_buckets, n_repetitions=n_repetitions, seed=0
        )
        decoder, cells = Decoder(assignment), []
        for name in [*DISTRIBUTIONS, NOISE]:
            probs_NRB = planted(assignment, name, np.random.default_rng(1), n=4)
            budget = n_classes // 10 if name == NOISE else None

            def decode(probs_NRB=probs_NRB, decoder=decoder, budget=budget):
                return [decoder.topk(probs_RB[None], K_TOP, budget=budget) for probs_RB in probs_NRB]

            tops = decode()
            assert all(top.exact_N[0] for top in tops) or name == NOISE
            seconds = medians({"decode": decode}, 3, time.thread_time)["decode"] / len(probs_NRB)
            scored = np.mean([top.n_scored_N[0] for top in tops]) / n_classes
            sure = "" if tops[0].exact_N[0] else ", not certain"
            cells.append(f"{1e3 * seconds:.2f} ({scored:.1%}{sure})")
        floor = medians({"read": lambda p=probs_NRB: [x.max() for x in p]}, 3, time.thread_time)["read"] / 4
        yield (f"| {n_classes:,} | {n_repetitions} | {n_buckets:,} | " + " | ".join(cells) + f" | {1e3 * floor:.2f} |")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield ""
    yield f"Peak memory of the process, with numba and the table of the first part: {peak / 1e9:.1f} GB."


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true")
    lines = [
        f"# Decoding, {datetime.date.today()}",
        "",
        f"`python benchmarks/decoding.py`: K {K:,}, R {R}, B {B}, exact top {K_TOP}, single queries, one thread, "
        f"median microseconds of processor a query over {ROUNDS} turns of {N} queries; every method gave identical "
        "ids and scores. Threshold times include clipping and logarithms; a plain gather does not. Classes scored and "
        "buckets opened: implicit.",
        f"{processor()}, commit {commit()}, load {os.getloadavg()[0]:.1f}.",
        "",
    ]
    print("\n".join(lines), flush=True)
    arguments = parser.parse_args()
    for part in (report, growth):
        for line in part():
            print(line, flush=True)
            lines.append(line)
        lines.append("")
        print(flush=True)
    if arguments.write:
        path = Path(__file__).parent / "results" / f"decoding-{datetime.date.today()}.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
