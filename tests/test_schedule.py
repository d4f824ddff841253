"""Schedules: what is computed when, as a function of the step alone."""

import pytest

from moefy_hf.training.schedule import SCHEDULES, STAGES, Phase, Timetable, as_dicts, make_schedule


def shares(phases, total: int, target: float = 0.25) -> list:
    timetable = Timetable(phases, total)
    return [timetable.share(step, target) for step in range(total + 2)]


def splits(phases, total: int) -> list[int]:
    timetable = Timetable(phases, total)
    return [step for step in range(total) if (phase := timetable.begins_at(step)) and phase.split]


def test_anneal_goes_down_in_even_stages():
    found = shares(make_schedule("anneal"), 100)
    assert found[:10] == [1.0] * 10 and found[40:] == ["target"] * 62
    moving = found[10:40]
    assert moving[0] == 1.0 and all(a >= b for a, b in zip(moving, moving[1:], strict=False))
    assert moving[15] == pytest.approx(1 - 0.75 / 2) and moving[-1] == pytest.approx(1 - 0.75 * (STAGES - 1) / STAGES)
    assert len(set(moving)) == STAGES and splits(make_schedule("anneal"), 100) == [10]


def test_the_other_schedules():
    assert shares(make_schedule("one_step"), 5) == ["target"] * 7 and splits(make_schedule("one_step"), 5) == [0]
    growing = shares(make_schedule("smoe_dropout"), 32)
    assert growing[0] == "target" and growing[16] == pytest.approx(0.25 + 0.75 / 2) and growing[32] == 1.0
    assert splits(make_schedule("smoe_dropout"), 32) == [0]
    found = shares(make_schedule("switchable"), 16)
    assert found[:16] == [1.0, 1.0, "target", "target"] * 4
    assert splits(make_schedule("switchable"), 16) == [2, 6, 10, 14]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_survive_json(name):
    phases = make_schedule(name)
    assert make_schedule(as_dicts(phases)) == phases


def test_steps_and_shares_may_be_mixed():
    timetable = Timetable([Phase(7, k=1.0), Phase(0.5, split=True), Phase(1.0, k=0.5)], 40)
    assert (timetable.begins, timetable.ends) == ([0, 7, 20], [7, 20, 40])
    assert [timetable.at(step) for step in (0, 6, 7, 19, 20, 40, 99)] == [0, 0, 1, 1, 2, 2, 2]
    assert [timetable.splits_until(step) for step in (0, 6, 7, 40)] == [0, 0, 1, 1]
    assert timetable.begins_at(7).split and timetable.begins_at(8) is None


@pytest.mark.parametrize("until", [0, -1, 0.0, 1.5, True, "half", None])
def test_ends_out_of_range_are_refused(until):
    with pytest.raises(ValueError, match="a phase ends at"):
        Phase(until)


@pytest.mark.parametrize("settings", [{"k": 0.0}, {"k": 1.5}, {"k": "all"}, {"k": None}, {"start": 2.0}, {"k": True}])
def test_experts_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="share in"):
        Phase(1.0, **settings)


def test_schedules_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="unknown schedule 'aneal'.*anneal, smoe_dropout"):
        make_schedule("aneal")
    with pytest.raises(ValueError, match="at least one phase"):
        make_schedule([])
    with pytest.raises(ValueError, match="phase 1 leaves experts out before any"):
        make_schedule([Phase(0.5, k=1.0), Phase(0.7), Phase(1.0, split=True)])
    with pytest.raises(ValueError, match="phase 1 of the schedule would run from step 10 to 5 of 100"):
        Timetable([Phase(10, k=1.0), Phase(0.05, split=True)], 100)
    with pytest.raises(ValueError, match="train longer"):
        Timetable(make_schedule("anneal"), 2)
    with pytest.raises(ValueError, match="phase 1 of the schedule would run from step 20 to 40 of 12"):
        Timetable([Phase(20, k=1.0), Phase(40, split=True)], 12)
