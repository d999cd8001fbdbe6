import pytest

from hf_slim.core.schedule import SCHEDULES, scheduled


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_schedule_rises_from_none_to_all_between_start_and_stop(name):
    values = [scheduled(name, step / 100, start=0.2, stop=0.7, rounds=4) for step in range(101)]
    assert values[20] == 0
    assert values[70:] == [1.0] * 31
    assert values == sorted(values)


def test_cubic_follows_zhu_and_gupta():
    # eq. 1 with s_i = 0, s_f = 1: s_t = s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt))**3
    assert scheduled("cubic", 0.35, start=0.1, stop=0.6, rounds=4) == pytest.approx(1 - (1 - 0.5) ** 3)


@pytest.mark.parametrize("rounds", [2, 3, 5])
def test_staged_jumps_by_the_same_amount_from_start_to_stop(rounds):
    values = [scheduled("staged", step / 1000, start=0.2, stop=0.7, rounds=rounds) for step in range(1001)]
    jumps = [step for step in range(1, 1001) if values[step] != values[step - 1]]
    assert [values[step] for step in jumps] == pytest.approx([(jump + 1) / rounds for jump in range(rounds)])
    expected = [200 + 500 * jump / (rounds - 1) for jump in range(rounds)]
    assert jumps == pytest.approx(expected, abs=1.001)  # the first one in the step that follows the start


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.999])
def test_one_shot_does_nothing_before_the_stop(fraction):
    assert SCHEDULES["one_shot"](fraction, 4) == 0
    assert scheduled("one_shot", 0.2 + 0.5 * fraction, start=0.2, stop=0.7, rounds=4) == 0
    assert SCHEDULES["one_shot"](1.0, 4) == 1


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_without_a_way_from_start_to_stop_everything_is_due_at_once(name):
    assert scheduled(name, 0.5, start=0.5, stop=0.5, rounds=4) == 1
    assert scheduled(name, 0.4, start=0.5, stop=0.5, rounds=4) == 0


def test_linear_is_half_way_in_the_middle():
    assert scheduled("linear", 0.4, start=0.2, stop=0.6, rounds=4) == pytest.approx(0.5)
