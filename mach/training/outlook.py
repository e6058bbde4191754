"""How far a whole training is, and how long its rest will take: planned work, corrected by the rates that are measured.

It holds no thread and draws nothing; whoever shows it asks as often as it likes, and the time goes on in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mach.errors import counted

TRUST = 0.05  # of a stage: what must be done of it before its own rate counts as much as what was planned
LEAST_LEFT = 0.1  # of what a stage has taken: what one that is overdue is taken to need still
OF_THE_JOB = ": "  # what stands between the names of a pilot or re-ranker and of its stage


@dataclass
class Stage:
    """Part of a job: ``parts`` of equal work on ``workers``, that are planned to take so many seconds in all."""

    name: str
    seconds: float = 0.0  # as the clock goes; 0: unknown
    parts: int = 1
    workers: int = 1

    fraction: float = 0.0
    began: float | None = None  # on the clock
    told: float = 0.0  # seconds it had taken when its fraction was last told
    first: tuple[float, float] = (0.0, 0.0)  # share and seconds when some of it was first told: workers start before
    is_over: bool = False
    compiling: dict[object, float] = field(default_factory=dict)  # seconds, by who did so

    @property
    def kind(self) -> str:
        """What stages have in common whose rates are alike."""
        return self.name.rpartition(OF_THE_JOB)[2]

    @property
    def compiled(self) -> float:
        """Seconds that it has waited for kernels: processes compile them side by side."""
        return max(self.compiling.values(), default=0.0)

    @property
    def measured(self) -> tuple[float, float]:
        """A share of it, and the seconds that this took: what is known of its rate."""
        share, seconds = self.first
        return self.share - share, self.told - seconds

    @property
    def share(self) -> float:
        """The fraction of its time that is over; the last parts may be fewer than the workers."""
        n_done, n_rounds = self.fraction * self.parts, -(-self.parts // self.workers)
        n_whole = min(int(n_done / self.workers + 1e-9), n_rounds - 1)
        n_last = min(self.workers, self.parts - n_whole * self.workers)
        return min((n_whole + (n_done - n_whole * self.workers) / n_last) / n_rounds, 1.0)


class Outlook:
    """Where a job stands among its stages.

    It is called with the name of a stage and the fraction of it that is done, as `mach.train` calls its ``report``; a
    stage begins by its first call, and ends by a fraction of 1 or the first call of another. ``now`` is any clock, in
    seconds.

    Examples
    --------
    >>> seconds = 0.0
    >>> job = Outlook(lambda: seconds)
    >>> job.expect([Stage("training", 60.0), Stage("calibrating", 30.0)])
    >>> job("training", 0.1)  # what came before is the start of workers, no rate
    >>> seconds = 48.0
    >>> job("training", 0.5)  # twice as long as was planned; so will be the rest
    >>> round(job.seconds_left())
    117
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._began = now, now()
        self._stages: dict[str, Stage] = {}
        self._at: Stage | None = None
        self._n_compiled, self._compiled_before = 0, 0.0

    def expect(self, stages: Iterable[Stage]) -> None:
        """What is still to come, in its order; stages that have begun stay as they are."""
        begun = {name: stage for name, stage in self._stages.items() if stage.began is not None}
        self._stages = begun | {stage.name: stage for stage in stages if stage.name not in begun}

    def __call__(self, name: str, fraction: float) -> None:
        if name not in self._stages:
            stages = list(self._stages.values())
            stages.insert(stages.index(self._at) + 1 if self._at else 0, Stage(name))
            self._stages = {stage.name: stage for stage in stages}  # a new one: another thread may read it
        stage = self._stages[name]
        if self._at is not None and self._at is not stage:
            self._end(self._at)
        if stage.began is None:
            stage.began = self._now()
        self._at = stage
        stage.fraction, stage.told = fraction, self._taken(stage)
        if fraction < 1.0 and not stage.first[0]:
            stage.first = stage.share, stage.told
        if fraction >= 1.0:
            self._end(stage)

    def compiles(self, who: object, n_kernels: int, seconds: float) -> None:
        """Somebody has compiled kernels, or waited for them, for so long: that is no rate of the stage."""
        self._n_compiled += n_kernels
        if self._at is None:
            self._compiled_before += seconds
        else:
            before = self._at.compiling
            self._at.compiling = before | {who: before.get(who, 0.0) + seconds}

    def seconds_left(self) -> float | None:
        """Until the end of all that is expected, from now; None as long as no work is known."""
        if not any(stage.seconds for stage in self._stages.values()):
            return None
        return sum(self._left(stage) for stage in self._stages.values() if not stage.is_over)

    def seconds(self) -> float:
        """Since the job began."""
        return self._now() - self._began

    def line(self) -> str:
        """Stage, share and time of the whole job, for a person."""
        so_far, left = self.seconds(), self.seconds_left()
        told = [f"{duration(so_far)} so far, " + ("estimating" if left is None else f"about {duration(left)} left")]
        if left is not None:
            told.append(f"{100 * so_far / max(so_far + left, 1e-9):.0f} % of all")
        if self._at is not None:
            n = list(self._stages).index(self._at.name) + 1
            stage = f"stage {n} of {len(self._stages)}, {self._at.name}"
            if self._at.parts > 1:
                stage += f", {int(self._at.fraction * self._at.parts + 1e-9)} of {self._at.parts}"
            elif 0 < self._at.fraction < 1:
                stage += f", {100 * self._at.fraction:.0f} %"
            told.insert(0, stage)
        if self._n_compiled:
            seconds = self._compiled_before + sum(stage.compiled for stage in self._stages.values())
            told.append(f"{counted(self._n_compiled, 'kernel')} compiled, once, {seconds:.0f} s")
        return "; ".join(told)

    def _taken(self, stage: Stage) -> float:
        """Seconds since a stage began, without those of compiling."""
        assert stage.began is not None
        return max(self._now() - stage.began - stage.compiled, 0.0)

    def _end(self, stage: Stage) -> None:
        if not stage.is_over:
            stage.is_over, stage.told, stage.fraction = True, self._taken(stage), 1.0

    def _left(self, stage: Stage) -> float:
        planned = stage.seconds * self._rate(stage)
        if stage.began is None:
            return planned
        (share, seconds), taken = stage.measured, self._taken(stage)
        whole = (seconds + TRUST * planned) / (share + TRUST)
        return max(whole * (1 - stage.share) - (taken - stage.told), LEAST_LEFT * (taken - stage.told))

    def _rate(self, stage: Stage) -> float:
        """What a planned second has taken: in stages of the same kind that are over, else in all that was done."""
        over = [s for s in self._stages.values() if s.is_over and s.seconds]
        alike = [s for s in over if s.kind == stage.kind]
        at = [] if alike or self._at is None or self._at is stage or self._at.is_over else [self._at]
        measured = [(s.measured[1], s.seconds * s.measured[0]) for s in (alike or over) + at]
        took, planned = map(sum, zip(*measured, strict=True)) if measured else (0.0, 0.0)
        return took / planned if took and planned else 1.0


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
