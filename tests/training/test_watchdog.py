"""The watchdog alone: when it fires, and the picture that it leaves. Runs that it ends are in test_stopping.py."""

import itertools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from nld_train.training import watchdog as watchdog_module
from nld_train.training.watchdog import Watchdog, dump_stacks


@dataclass
class Looks:
    """Stands in for the event that ends a watch. Time passes only where the watchdog waits for its next look.

    Args:
        late: seconds by which each look comes too late, as in a process that is stopped in between.
        between: what happens before each look.
    """

    number: int
    late: float = 0.0
    between: Callable[[], None] = lambda: None
    now: float = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, seconds: float) -> bool:
        self.number -= 1
        self.now += seconds + self.late
        self.between()
        return self.number < 0


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """What a watchdog says in some looks, four of which make up its limit of 1 s."""

    def watched(number: int, marks: bool = False, late: float = 0.0, read_each_time: int = 0) -> list[str]:
        fired: list[str] = []
        counts = itertools.count(0, read_each_time)
        looks = Looks(number, late)
        monkeypatch.setattr(watchdog_module, "time", looks)
        watchdog = Watchdog(0.2, fired.append)
        if marks:
            looks.between = watchdog.mark
        watchdog._watch(1.0, lambda: next(counts), cast("threading.Event", looks))
        return fired

    return watched


def test_the_watchdog_fires_when_nothing_is_marked(watched: Callable[..., list[str]]) -> None:
    assert watched(4) == []
    assert watched(5) == ["no progress for 1 s (the limit while a run starts or ends)"]
    assert watched(100, marks=True) == []


def test_a_process_that_was_stopped_may_yet_progress(watched: Callable[..., list[str]]) -> None:
    assert watched(100, late=0.7) == []
    assert watched(5, late=0.1) != []


def test_reading_is_progress_but_what_counting_reads_is_not(watched: Callable[..., list[str]]) -> None:
    """Nor any other few bytes now and then, however many they are in the end."""
    assert watched(100, read_each_time=70 << 10) == []
    assert watched(5, read_each_time=60 << 10) != []


def test_what_this_process_reads_is_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    before = Watchdog._bytes_read()
    (tmp_path / "file").read_bytes()
    assert Watchdog._bytes_read() - before >= 3 << 20


def test_the_watchdog_has_another_limit_where_files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """And there it takes reading for progress; one block after the other on the same watchdog."""
    fired: queue.SimpleQueue[str] = queue.SimpleQueue()
    watchdog = Watchdog(0.2, fired.put)
    with watchdog.watching():
        assert fired.get(timeout=30) == "no progress for 0.2 s (train.stall_timeout)"
    counts = itertools.count(0, 1 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(Watchdog, "_bytes_read", staticmethod(lambda: next(counts)))
        with watchdog.watching(0.6):
            time.sleep(1.5)
    assert next(counts) > 1 << 20
    monkeypatch.setattr(Watchdog, "_bytes_read", staticmethod(lambda: 0))
    while not fired.empty():  # of the first block, before it ended
        assert "train.stall_timeout" in fired.get()
    with watchdog.watching(0.6):
        assert fired.get(timeout=30) == "no progress for 0.6 s (the limit while a run starts or ends)"


def test_the_watchdog_can_be_off() -> None:
    fired: list[str] = []
    with Watchdog(0.0, fired.append).watching(0.1):
        time.sleep(0.6)
    with Watchdog(0.2, fired.append).watching():
        pass
    time.sleep(0.6)
    assert not fired


def test_stacks_show_all_threads(tmp_path: Path) -> None:
    release = threading.Event()

    def waits_for_a_peer() -> None:
        release.wait()

    thread = threading.Thread(target=waits_for_a_peer)
    thread.start()
    path = dump_stacks(tmp_path, 3, "no progress")
    release.set()
    thread.join()
    assert path is not None
    assert path.parent == tmp_path / "stacks"
    text = path.read_text()
    assert "rank 3, pid" in text
    assert "no progress" in text
    assert "waits_for_a_peer" in text
    assert "test_stacks_show_all_threads" in text
