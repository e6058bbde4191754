"""The scheduler alone: laws over any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.launch.schedule import Schedule


@given(st.integers(1, 12), st.integers(1, 5), st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=200))
def test_every_repetition_is_finished_once_or_given_up(n_repetitions, n_workers, events):
    schedule = Schedule(range(n_repetitions), attempts=3)
    running: dict[int, int] = {}
    losses = dict.fromkeys(range(n_repetitions), 0)

    def fill() -> None:
        for worker in range(n_workers):
            if worker not in running and (repetition := schedule.next_for(worker)) is not None:
                assert repetition not in running.values()
                running[worker] = repetition

    for worker, dies in events:
        fill()
        if worker in running:
            repetition = running.pop(worker)
            if dies:
                losses[repetition] += 1
                assert schedule.lost(worker, "killed") == repetition
            else:
                assert schedule.done(worker) == repetition
    while not schedule.is_over:
        fill()
        for worker in list(running):
            running.pop(worker)
            schedule.done(worker)
    assert sorted([*schedule.finished, *schedule.given_up]) == list(range(n_repetitions))
    assert set(schedule.given_up) == {r for r, n in losses.items() if n >= 3}


def test_losses_after_progress_are_free_and_those_without_it_are_counted():
    schedule = Schedule([0], attempts=3)
    for step in range(50):
        assert schedule.next_for(0) == 0
        schedule.progressed(0, step + 1, 0)
        schedule.lost(0, "killed")
    assert not schedule.given_up
    for _ in range(2):
        assert schedule.next_for(0) == 0
        schedule.progressed(0, 50, 0)  # no further than before
        schedule.lost(0, "out of memory")
    assert schedule.given_up == {0: "out of memory"}
    assert schedule.is_over


def test_checkpoints_below_the_furthest_step_are_progress():
    schedule = Schedule([0], attempts=2)
    for saved_step in range(10):
        assert schedule.next_for(0) == 0
        schedule.progressed(0, 100, saved_step)
        schedule.lost(0, "killed")
    assert not schedule.given_up


def test_deaths_weigh_a_fifth_of_a_failure():
    schedule = Schedule([0], attempts=2)
    for _ in range(9):
        assert schedule.next_for(0) == 0
        schedule.lost(0, "killed", died=True)
    assert schedule.next_for(0) == 0
    schedule.lost(0, "killed", died=True)
    assert schedule.given_up == {0: "killed"}


def test_a_hopeless_failure_is_given_up_at_once():
    schedule = Schedule([0], attempts=9)
    schedule.next_for(0)
    schedule.lost(0, "diverged", hopeless=True)
    assert schedule.given_up == {0: "diverged"}


def test_a_lost_repetition_is_handed_out_first():
    schedule = Schedule([0, 1, 2], attempts=3)
    assert [schedule.next_for(0), schedule.next_for(1)] == [0, 1]
    schedule.lost(0, "killed")
    assert schedule.next_for(2) == 0
    assert schedule.next_for(3) == 2
    assert schedule.next_for(4) is None


def test_losing_an_idle_worker_changes_nothing():
    schedule = Schedule([0], attempts=1)
    assert schedule.lost(7, "killed") is None
    assert schedule.next_for(0) == 0


def test_a_worker_holds_one_repetition():
    schedule = Schedule([0, 1], attempts=1)
    schedule.next_for(0)
    with pytest.raises(ValueError, match="still holds repetition 0"):
        schedule.next_for(0)
