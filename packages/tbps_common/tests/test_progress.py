"""A bar on a terminal; elsewhere a line a minute, and nothing for short work."""

import sys

import pytest
import tqdm

from tbps_common.run.progress import progress_bar


def test_short_work_says_nothing_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(10, unit="picture") as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""


def test_long_work_says_a_line_a_minute(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)
    with progress_bar(100, initial=20, unit="picture", desc="filter") as bar:
        monkeypatch.setattr(bar, "_time", lambda: now[0])
        bar.start_t = bar.last_print_t = 0.0
        for seconds in (10, 59, 61, 70, 130):
            now[0] = seconds
            bar.set_postfix(dropped=seconds // 60, refresh=False)
            bar.update(5)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == [
        "filter:  35% 35/100",
        "filter:  45% 45/100",
        "filter:  45% 45/100",  # at the end
    ]
    assert "01:01<" in lines[0] and "dropped=1" in lines[0] and "s/picture" in lines[0]


def test_other_processes_say_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(10, enabled=False) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""
