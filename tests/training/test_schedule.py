"""The scheduler alone: laws over any order of events."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.training.launch.schedule import Order, Schedule, shards_of

N_STEPS = 160


def schedule_with(shards: int, workers: int, attempts: int = 3) -> Schedule:
    schedule = Schedule([(r,) for r in range(shards)], attempts)
    for worker in range(workers):
        schedule.joined(worker)
    return schedule


def begin(schedule: Schedule, worker: int, now: float = 0.0) -> Order | None:
    """A worker takes a shard, and reports at once where it begins."""
    order = schedule.next_for(worker, now)
    if order is not None:
        schedule.progressed(worker, now, schedule._workers[worker].step, N_STEPS, 0)
    return order


def running(schedule: Schedule, speeds: dict[int, float], now: float, at: dict[int, int]) -> None:
    """Workers report the step at which they are, after a time that fits their speed."""
    for worker, step in at.items():
        schedule.progressed(worker, now, step, N_STEPS, 0)
        assert schedule._workers[worker].speed == pytest.approx(speeds[worker], rel=0.01)


EVENTS = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(["progress", "finish", "fail", "die", "pause", "wait"])), max_size=200
)


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), EVENTS)
def test_any_order_of_events_ends_with_every_shard_finished_or_given_up(n_shards, n_workers, size, events):
    shards = shards_of(list(range(n_shards)), size)
    schedule = Schedule(shards, attempts=3)
    held: dict[int, Order] = {}
    step: dict[int, int] = {}
    saved = dict.fromkeys(shards, 0)
    weight = dict.fromkeys(shards, 0)  # an upper bound of what is held against a shard
    now = 0.0

    def fill() -> None:
        for worker in range(n_workers):
            if worker not in held and (assignment := schedule.next_for(worker, now)) is not None:
                others = [other.shard for other in held.values()]
                assert assignment.exclusive == (assignment.shard not in others)
                assert assignment.shard not in schedule.finished
                held[worker], step[worker] = assignment, saved[assignment.shard]

    def leave(worker: int) -> None:
        shard = held.pop(worker).shard
        for rival in schedule.finished_by(worker):
            assert held[rival].shard == shard
            held.pop(rival)
            schedule.yielded_by(rival)

    for worker in range(n_workers):
        schedule.joined(worker)
    for worker, event in events:
        now += 5.0
        fill()
        if worker not in held:
            continue
        shard = held[worker].shard
        if event == "finish":
            leave(worker)
        elif event == "progress":
            step[worker] = min(step[worker] + 40, N_STEPS - 1)
            saved[shard] = max(saved[shard], step[worker] - 20)
            schedule.progressed(worker, now, step[worker], N_STEPS, saved[shard])
            schedule.should_yield(worker, now)
        elif event == "pause":
            saved[shard] = max(saved[shard], step[worker])
            schedule.progressed(worker, now, step[worker], N_STEPS, saved[shard])
            held.pop(worker)
            schedule.yielded_by(worker)
        elif event != "wait":
            held.pop(worker)
            weight[shard] += 5 if event == "fail" else 1
            if event == "fail":
                schedule.failed_on(worker, "failed")
            else:
                schedule.died(worker, "killed")
                schedule.joined(worker)
    for _ in range(20 * n_shards):
        now += 1000.0
        fill()
        for worker in list(held):
            if worker in held:
                leave(worker)
        if schedule.is_over:
            break
    assert schedule.is_over
    assert sorted([*schedule.finished, *schedule.given_up]) == shards
    assert all(weight[shard] >= 5 * 3 for shard in schedule.given_up)
    assert schedule.n_waiting == 0


def test_shards_are_consecutive_and_the_last_may_be_smaller():
    assert shards_of([0, 1, 3, 4, 9], 2) == [(0, 1), (3, 4), (9,)]


def test_shards_are_handed_out_in_order_and_once():
    schedule = schedule_with(3, 4)
    given_out = [schedule.next_for(worker, 0.0) for worker in range(4)]
    assert given_out == [Order((0,)), Order((1,)), Order((2,)), None]
    assert schedule.idle() == [3]


def test_a_worker_holds_one_shard():
    schedule = schedule_with(2, 1)
    schedule.next_for(0, 0.0)
    with pytest.raises(ValueError, match=r"worker 0 still holds \(0,\)"):
        schedule.next_for(0, 0.0)


def test_deaths_after_progress_are_free_and_those_without_it_are_counted():
    schedule = schedule_with(1, 1, attempts=1)
    for step in range(50):
        schedule.next_for(0, step)
        schedule.progressed(0, step + 0.5, step + 1, N_STEPS, 0)
        schedule.died(0, "killed")
        schedule.joined(0)
    assert not schedule.given_up
    for _ in range(4):
        schedule.next_for(0, 60.0)
        schedule.progressed(0, 61.0, 50, N_STEPS, 0)  # no further than before
        schedule.died(0, "out of memory")
        schedule.joined(0)
    assert schedule.given_up == {(0,): "out of memory"}
    assert schedule.is_over


def test_checkpoints_below_the_furthest_step_are_progress():
    schedule = schedule_with(1, 1, attempts=1)
    for saved_step in range(20):
        schedule.next_for(0, saved_step)
        schedule.progressed(0, saved_step + 0.5, 100, N_STEPS, saved_step)
        schedule.died(0, "killed")
        schedule.joined(0)
    assert not schedule.given_up


def test_lost_steps_are_those_since_the_checkpoint_of_this_shard():
    schedule = schedule_with(2, 1)
    schedule.next_for(0, 0.0)
    schedule.progressed(0, 10.0, 100, N_STEPS, 70)
    schedule.died(0, "killed")
    assert schedule.n_lost_steps == 30
    schedule.joined(0)
    schedule.next_for(0, 20.0)
    schedule.progressed(0, 30.0, 150, N_STEPS, 70)
    schedule.finished_by(0)
    schedule.next_for(0, 31.0)
    schedule.died(0, "killed before it began the second")
    assert schedule.n_lost_steps == 30


def test_deaths_weigh_a_fifth_of_a_failure():
    schedule = schedule_with(1, 1, attempts=2)
    for _ in range(10):
        assert not schedule.given_up
        assert schedule.next_for(0, 0.0) == Order((0,))
        schedule.died(0, "killed")
        schedule.joined(0)
    assert schedule.given_up == {(0,): "killed"}
    assert schedule.n_deaths == 10


def test_a_hopeless_failure_is_given_up_at_once():
    schedule = schedule_with(1, 1, attempts=9)
    schedule.next_for(0, 0.0)
    schedule.failed_on(0, "diverged", hopeless=True)
    assert schedule.given_up == {(0,): "diverged"}


def test_a_lost_shard_is_handed_out_first():
    schedule = schedule_with(3, 2)
    assert [schedule.next_for(w, 0.0) for w in (0, 1)] == [Order((0,)), Order((1,))]
    schedule.died(0, "killed")
    schedule.joined(2)
    assert schedule.next_for(2, 0.0) == Order((0,))


def test_the_death_of_an_idle_worker_changes_nothing_but_the_count():
    schedule = schedule_with(1, 2, attempts=1)
    schedule.died(1, "killed")
    schedule.died(7, "never came")
    assert (schedule.n_deaths, schedule.given_up) == (2, {})
    assert schedule.next_for(0, 0.0) == Order((0,))


def test_what_failed_on_a_worker_goes_to_one_that_has_not_tried():
    schedule = schedule_with(2, 2)
    assert schedule.next_for(0, 0.0) == Order((0,))
    schedule.failed_on(0, "its disk is full")
    assert schedule.next_for(0, 0.0) == Order((1,))
    assert schedule.next_for(1, 0.0) == Order((0,))
    schedule.failed_on(1, "failed here too")  # nobody is left who has not tried
    assert schedule.next_for(1, 0.0) == Order((0,))


def test_a_worker_that_fails_whatever_it_is_given_gets_nothing_more_while_others_do_well():
    schedule = schedule_with(9, 2, attempts=3)
    schedule.next_for(1, 0.0)
    for _ in range(3):
        assert schedule.next_for(0, 0.0)
        schedule.failed_on(0, "no space left on device")
    assert schedule.next_for(0, 0.0) is None
    schedule.failed_on(1, "it cannot either")  # then the first is no worse than others
    assert schedule.next_for(0, 0.0) is not None
    assert not schedule.given_up


def test_in_the_tail_a_worker_makes_room_for_a_shard_that_lags_behind():
    schedule = schedule_with(3, 2)
    for worker in (0, 1):
        begin(schedule, worker)
    running(schedule, {0: 1.0, 1: 1.0}, 15.0, {0: 15, 1: 15})
    assert not schedule.should_yield(0, 15.0)  # an eighth of a shard is the least lead
    running(schedule, {0: 1.0, 1: 1.0}, 40.0, {0: 40, 1: 40})
    assert schedule.should_yield(0, 40.0)
    schedule.yielded_by(0)
    assert schedule.next_for(0, 40.0) == Order((2,))
    running(schedule, {1: 1.0}, 80.0, {1: 80})
    assert schedule.should_yield(1, 80.0)  # the one that waits is saved at step 40


def test_nobody_makes_room_while_more_shards_wait_than_there_are_workers():
    schedule = schedule_with(5, 2)
    begin(schedule, 0)
    running(schedule, {0: 1.0}, 100.0, {0: 100})
    assert not schedule.should_yield(0, 100.0)


def test_a_shard_that_was_given_back_waits_where_it_was_saved_not_where_it_had_been_before_a_loss():
    schedule = schedule_with(3, 2)
    for worker in (0, 1):
        schedule.next_for(worker, 0.0)
    schedule.progressed(0, 100.0, 100, N_STEPS, 20)
    schedule.died(0, "killed")
    schedule.joined(0)
    assert schedule.next_for(0, 100.0) == Order((0,))
    schedule.progressed(0, 120.0, 40, N_STEPS, 20)
    schedule.yielded_by(0)
    assert schedule.next_for(0, 120.0) == Order((2,))
    schedule.progressed(0, 210.0, 90, N_STEPS, 0)
    assert schedule.should_yield(0, 210.0)  # to the first, at step 40: it was at step 100 once


def test_a_straggler_is_copied_and_the_first_to_finish_counts():
    schedule = schedule_with(2, 2)
    for worker in (0, 1):
        begin(schedule, worker)
    running(schedule, {0: 1.0, 1: 0.2}, 155.0, {0: 155, 1: 31})
    assert schedule.finished_by(0) == []
    assert schedule.next_for(0, 160.0) == Order((1,), exclusive=False)
    assert schedule.finished_by(0) == [1]
    schedule.yielded_by(1)
    assert schedule.is_over
    assert schedule.finished == [(0,), (1,)]
    assert schedule.finished_by(1) == []


def test_a_copy_that_dies_leaves_the_shard_with_its_first_worker():
    schedule = schedule_with(2, 2, attempts=1)
    for worker in (0, 1):
        begin(schedule, worker)
    running(schedule, {0: 1.0, 1: 0.2}, 155.0, {0: 155, 1: 31})
    schedule.finished_by(0)
    schedule.next_for(0, 160.0)
    schedule.died(0, "killed")
    assert schedule.n_waiting == 0
    assert schedule.finished_by(1) == []
    assert schedule.finished == [(0,), (1,)]


def test_equal_workers_are_not_copied():
    schedule = schedule_with(2, 3)
    for worker in (0, 1):
        begin(schedule, worker)
    running(schedule, {0: 1.0, 1: 1.0}, 100.0, {0: 100, 1: 100})
    assert schedule.next_for(2, 100.0) is None


@pytest.mark.parametrize("steps_before_silence", [0, 40])
def test_a_worker_that_has_gone_silent_is_copied_even_if_it_never_told_anything(steps_before_silence):
    schedule = schedule_with(2, 3)
    begin(schedule, 0)
    schedule.next_for(1, 0.0)
    if steps_before_silence:
        schedule.progressed(1, 0.0, 0, N_STEPS, 0)
        running(schedule, {1: 1.0}, 40.0, {1: steps_before_silence})
    running(schedule, {0: 1.0}, 50.0, {0: 50})
    assert schedule.next_for(2, 50.0) is None
    schedule.finished_by(0)
    assert schedule.next_for(0, 400.0) == Order((1,), exclusive=False)
    assert schedule.next_for(2, 401.0) is None  # one copy is enough while it may come to something


def test_two_silent_holders_of_a_shard_are_overtaken_by_a_third():
    schedule = schedule_with(2, 3)
    begin(schedule, 0)
    schedule.next_for(1, 0.0)
    running(schedule, {0: 1.0}, 155.0, {0: 155})
    schedule.finished_by(0)
    copy = Order((1,), exclusive=False)
    assert [schedule.next_for(2, 400.0), schedule.next_for(0, 401.0)] == [copy, None]
    assert schedule.next_for(0, 900.0) == copy
    assert schedule.finished_by(0) == [1, 2]
    assert schedule.is_over


def test_a_slow_worker_leaves_the_last_shard_to_others():
    schedule = schedule_with(5, 3)
    for worker in range(3):
        begin(schedule, worker)
    running(schedule, {0: 1.0, 1: 1.0, 2: 0.2}, 155.0, {0: 155, 1: 155, 2: 31})
    schedule.finished_by(2)
    assert schedule.next_for(2, 155.0) is None  # 800 seconds of its own, against two more rounds of theirs
    schedule.finished_by(0)
    assert schedule.next_for(0, 160.0) == Order((3,))


def test_seconds_left_count_only_what_is_not_lost():
    schedule = schedule_with(2, 2)
    assert schedule.seconds_left(0.0) is None
    for worker in (0, 1):
        begin(schedule, worker)
    running(schedule, {0: 1.0, 1: 1.0}, 100.0, {0: 100, 1: 100})
    assert schedule.seconds_left(100.0) == pytest.approx(60.0)
    schedule.died(0, "killed")  # nothing was saved
    assert schedule.seconds_left(100.0) == pytest.approx(60.0 + 160.0)


def test_nobody_copies_a_finished_shard_whose_other_holder_hangs():
    schedule = Schedule([(0,), (1,)], attempts=1)
    for worker in range(3):
        schedule.joined(worker)
    for worker in range(2):
        schedule.next_for(worker, 0.0)
        schedule.progressed(worker, 0.0, 0, 1000, 0)
        schedule.progressed(worker, 10.0, 100, 1000, 100)
    assert schedule.next_for(2, 300.0) is not None  # both hang: a copy of one of them
    (copied,) = (shard for shard in [(0,), (1,)] if 2 in schedule._items[shard].holders)
    schedule.finished_by(2)
    again = schedule.next_for(2, 301.0)
    assert again is not None
    assert again.shard != copied
    schedule.finished_by(2)
    assert schedule.is_over
    assert schedule.next_for(2, 302.0) is None


def test_who_was_slow_to_start_keeps_its_shard():
    """Two equal workers of a small run, of which one compiled or read for 18 s first."""
    schedule = schedule_with(2, 2)
    for worker in (0, 1):
        schedule.next_for(worker, 0.0)
    for now, steps in ((20.0, (80, 8)), (24.0, (96, 24))):
        for worker, step in enumerate(steps):
            schedule.progressed(worker, now, step, N_STEPS, 0)
    assert not schedule.should_yield(1, 24.0)


def test_who_has_reported_once_is_not_copied_before_it_can_be_slow():
    schedule = schedule_with(3, 2)
    for worker in (0, 1):
        begin(schedule, worker)
    running(schedule, {0: 1.0, 1: 1.0}, 155.0, {0: 155, 1: 155})
    schedule.finished_by(0)
    assert begin(schedule, 0, 160.0) == Order((2,))
    schedule.finished_by(1)
    assert schedule.next_for(1, 160.4) is None
    assert schedule.next_for(1, 400.0) == Order((2,), exclusive=False)  # it has gone silent
