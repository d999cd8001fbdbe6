import pytest

from hf_slim.core.schedule import SCHEDULES, scheduled


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_schedule_rises_from_none_to_all_between_start_and_stop(name):
    values = [scheduled(name, step / 100, start=0.2, stop=0.7) for step in range(101)]
    assert values[20] == 0
    assert values[70:] == [1.0] * 31
    assert values == sorted(values)


def test_cubic_follows_zhu_and_gupta():
    # eq. 1 with s_i = 0, s_f = 1: s_t = s_f + (s_i - s_f) * (1 - (t - t0) / (n * dt))**3
    assert scheduled("cubic", 0.35, start=0.1, stop=0.6) == pytest.approx(1 - (1 - 0.5) ** 3)
