"""What a training tells of itself while it runs; whoever shows it needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A repetition's progress; figures are means over the current epoch.

    Those of the validation are of held-out rows at the end of the last epoch; None where none are held out, or none has
    ended.
    """

    repetition: int
    step: int
    n_steps: int
    epoch: int
    n_epochs: int
    loss: float
    bucket_precision: float
    rows_per_second: float
    seconds_left: float
    saved_step: int
    n_together: int = 1  # repetitions that take this step at once
    validation_precision: float | None = None

    @property
    def ends_epoch(self) -> bool:
        return self.step * self.n_epochs == self.epoch * self.n_steps
