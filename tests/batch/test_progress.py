"""Progress on stderr: speed, time left, failures, and the item under way."""

import sys
import time
from collections import Counter
from weakref import WeakSet

import pytest

from atb_pllava.batch import progress as progress_module
from atb_pllava.batch.progress import Progress, failures
from atb_pllava.errors import counted, duration


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("tqdm.std.time", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_progress_tells_speed_and_time_left(clock: Clock, capsys) -> None:
    progress = Progress("mvbench", 400, before=100)
    assert capsys.readouterr().err == "mvbench 100/400 were there already\n"
    for _ in range(19):
        progress.add(failed=True, kind="media")
    assert capsys.readouterr().err == "", "nothing within the first seconds"
    clock.now += 10.0
    progress.begin("a.mp4")
    progress.begin("b.mp4")
    progress.add(failed=True, kind="request", name="a.mp4")
    line = "mvbench 120/400, 20 failed: 19 media, 1 request [00:10<02:20, 2.00it/s, at b.mp4]\n"
    assert capsys.readouterr().err == line
    clock.now += 7190.0
    progress.add(name="b.mp4")
    assert capsys.readouterr().err.endswith(" [2:00:00<26:34:17, 342.86s/it]\n")
    progress.finish()
    assert capsys.readouterr().err == "mvbench 121/400, 20 failed: 19 media, 1 request, in 2.0 h, 342.86s/it\n"


def test_progress_is_written_while_one_item_takes_long(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_PROGRESS", 0.05)
    written = ""
    with Progress("answers", 2) as progress:
        progress.begin("long.mp4")
        for _ in range(200):
            time.sleep(0.05)
            written += capsys.readouterr().err
            if written.count("\n") >= 2:
                break
    lines = written.splitlines()
    assert len(lines) >= 2 and all(line.startswith("answers 0/2 [00:0") for line in lines)
    assert all(line.endswith(", at long.mp4]") for line in lines)
    time.sleep(0.15)
    capsys.readouterr()
    time.sleep(0.15)
    assert capsys.readouterr().err == "", "the progress is over"


def test_short_and_finished_work_needs_no_line(clock: Clock, capsys) -> None:
    with Progress("files", 1) as progress:
        progress.begin("a.mp4")
        progress.add(name="a.mp4")
    assert capsys.readouterr().err == ""
    with Progress("answers", 2, before=2) as progress:
        pass
    progress.finish()
    assert capsys.readouterr().err == "answers 2/2 were there already\n"
    with Progress("answers", 2, quiet=True) as progress:
        clock.now += 60
        progress.add(failed=True)
        progress.say("a word")
    progress.finish()
    assert capsys.readouterr().err == "" and progress.done == progress.failed == 1


def test_a_terminal_has_a_bar_and_the_last_line_stays(clock: Clock, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(progress_module.tqdm, "_instances", WeakSet())  # bars that other tests have left move the line
    progress = Progress("answers", 2)
    clock.now += 1.0
    progress.add()
    progress.say("a word")
    progress.add()
    progress.finish()
    written = capsys.readouterr().err
    assert "\ranswers 1/2 |" in written and "\ra word\n" in written
    assert written.endswith("\ranswers 2/2, in 1.0 s, 2.00it/s\n")


def test_the_first_words_come_within_five_seconds() -> None:
    assert progress_module.SECONDS_BETWEEN_PROGRESS <= 5


def test_wording() -> None:
    assert [counted(number, "answer") for number in (0, 1, 2)] == ["0 answers", "1 answer", "2 answers"]
    assert [duration(seconds) for seconds in (0.0, 0.4, 9.96)] == ["under 0.1 s", "0.4 s", "10.0 s"]
    assert [duration(seconds) for seconds in (12.4, 91, 5401, 50 * 3600)] == ["12 s", "2 min", "1.5 h", "2.1 days"]
    assert failures(3, Counter(request=1, media=2)) == "3 failed: 2 media, 1 request"
    assert failures(0, Counter()) == "0 failed"
