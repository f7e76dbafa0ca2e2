"""Lines of progress where there is no terminal."""

import pytest

from tbps_common.run.progress import Progress, duration


def test_lines_come_now_and_then_with_the_time_left() -> None:
    now = [0.0]
    said: list[str] = []
    with Progress(100, initial=20, unit="picture", every=60, say=said.append, clock=lambda: now[0]) as progress:
        for seconds in (10, 59, 60, 61, 119, 130):
            now[0] = seconds
            progress.update(5, dropped=seconds // 60)
    assert said == [
        "35 of 100 pictures, 0.25 per second, 4 min left, dropped 1",
        "50 of 100 pictures, 0.23 per second, 4 min left, dropped 2",
    ]


def test_nothing_is_said_by_other_processes_or_of_short_work() -> None:
    said: list[str] = []
    now = [0.0]
    with Progress(10, enabled=False, say=said.append, clock=lambda: now[0]) as progress:
        now[0] = 1000
        progress.update(10)
    with Progress(10, say=said.append) as progress:
        progress.update(10)
    assert said == []


def test_work_that_has_not_begun_has_no_rate() -> None:
    assert Progress(10, initial=4).sentence(5) == "4 of 10 items, 0.00 per second, an unknown time left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (3540, "59 min"), (3599, "1 h 0 min"), (11100, "3 h 5 min")]
    + [(48 * 3600 - 1, "2 d 0 h"), (187200, "2 d 4 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
