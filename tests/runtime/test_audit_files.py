"""An audit log in several files: no event lost or twice, one chain, whatever ends a rotation half-way."""

import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import override

import pytest

from envelope import audit
from envelope.audit import BrokenChainError, Head
from runtime.audit import AuditLog, AuditUnavailableError
from runtime.audit_files import CONTINUED, RotationSettings, closed_files, last_seq, lines_since, read_files
from tests.fakes.clock import ManualClock
from tests.runtime.killed_writer import killed_while_it_writes

SMALL = RotationSettings(max_bytes=4096)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def write(path: Path, clock: ManualClock, count: int = 60, rotation: RotationSettings = SMALL) -> Head:
    log = AuditLog.open(path, clock, rotation)
    for number in range(count):
        log.append("object.sealed", number=number, durable=number % 3 == 0)
    log.close()
    return log.head


def numbers(path: Path) -> list[int]:
    """Of the events of `write` in all files, in order."""
    lines = [line for file in (*closed_files(path), path) for line in file.read_bytes().splitlines()]
    return [event["number"] for event in map(json.loads, lines) if "number" in event]


def test_a_large_file_is_closed_and_the_chain_goes_on(path: Path, clock: ManualClock) -> None:
    head = write(path, clock)
    closed = closed_files(path)
    assert len(closed) > 2
    assert numbers(path) == list(range(60))
    files = read_files(path, expected=head)
    assert (files.start, files.written.head, files.closed) == (audit.EMPTY, head, tuple(closed))
    for before, file in itertools.pairwise([*closed, path]):
        first = json.loads(file.read_bytes().splitlines()[0])
        assert (first["action"], first["seq"]) == (CONTINUED, last_seq(before) + 1)
        assert (first["previous_file"], first["recovered"]) == (before.name, "no")
        assert before.stat().st_size < 2 * SMALL.max_bytes
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in (*closed, path))
    assert {file.name for file in path.parent.iterdir()} == {path.name, *(file.name for file in closed)}
    # And after a restart, with another limit.
    assert write(path, clock, rotation=RotationSettings()).seq > head.seq
    assert closed_files(path) == closed
    assert numbers(path) == [*range(60), *range(60)]
    read_files(path, expected=head)


def test_an_old_file_is_closed(path: Path, clock: ManualClock) -> None:
    daily = RotationSettings(max_age_s=86_400)
    log = AuditLog.open(path, clock, daily)
    log.append("x", number=0)
    clock.shift(86_399)
    log.append("x", number=1)
    log.close()
    assert closed_files(path) == []
    log = AuditLog.open(path, clock, daily)  # its age is that of its first event
    clock.shift(1)
    log.append("x", number=2)
    log.append("x", number=3)
    log.close()
    assert [last_seq(file) for file in closed_files(path)] == [2]
    assert numbers(path) == [0, 1, 2, 3]
    read_files(path)


@pytest.mark.parametrize(
    ("meddle", "reason"),
    [
        (lambda files: change(files[1]), "of audit.jsonl.*hash"),
        (lambda files: change(files[-1]), "hash"),
        (lambda files: files[1].unlink(), "does not go on"),
        (lambda files: files[-2].unlink(), "does not continue"),
        (lambda files: swap(files[0], files[1]), "of audit.jsonl"),
        (lambda files: shorten(files[0]), "does not end with event"),
        (lambda files: shorten(files[1]), "does not end with event"),
        (lambda files: shutil.copy(files[0], f"{files[-1]}.000000000001"), "end with event 1"),
        (lambda files: shutil.copy(files[0], f"{files[-1]}.000000009999"), "begins before the end"),
    ],
    ids=["closed", "written", "middle", "last", "swapped", "first short", "short", "copied", "copied later"],
)
def test_meddling_with_files_shows(
    path: Path, clock: ManualClock, meddle: Callable[[list[Path]], object], reason: str
) -> None:
    write(path, clock)
    meddle([*closed_files(path), path])
    with pytest.raises(BrokenChainError, match=reason):
        read_files(path)


def change(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b'"ok"', b'"no"', 1))


def shorten(file: Path) -> None:
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def test_old_files_may_be_moved_away_and_a_recorded_head_proves_what_is_left(
    path: Path, clock: ManualClock
) -> None:
    write(path, clock)
    oldest, second, *_ = closed_files(path)
    ended = read_files(oldest).written.head
    assert read_files(path, expected=ended).start == audit.EMPTY
    oldest.unlink()
    assert read_files(path, expected=ended).start == ended, "where it begins is what was recorded"
    with pytest.raises(BrokenChainError, match="not in this chain"):
        read_files(path, expected=Head(ended.seq, "0" * 64))
    second.unlink()
    with pytest.raises(BrokenChainError, match="not in this chain"):
        read_files(path, expected=ended)
    for file in closed_files(path):
        file.unlink()
    write(path, clock, 1)
    assert read_files(path).closed == ()


@pytest.mark.parametrize(
    "left", ["nothing", "an empty file", "half a line", "the next one, not yet in its place"]
)
def test_between_the_steps_of_a_rotation(path: Path, clock: ManualClock, left: str) -> None:
    head = write(path, clock, 3, RotationSettings())
    closed = path.with_name(f"{path.name}.{head.seq:012}")
    path.rename(closed)
    match left:
        case "an empty file":
            path.touch(0o600)
        case "half a line":
            path.write_bytes(b'{"seq":4,"time"')
        case "the next one, not yet in its place":
            path.with_name(f".{path.name}.next").write_bytes(b"whatever")
    log = AuditLog.open(path, clock, SMALL)
    first = json.loads(path.read_bytes().splitlines()[0])
    assert (first["action"], first["recovered"], first["previous_file"]) == (CONTINUED, "yes", closed.name)
    assert log.head.seq == head.seq + (2 if left == "half a line" else 1)
    torn = [file.name for file in path.parent.glob("*.torn-*")]
    assert torn == ([f"{path.name}.torn-{head.seq + 1}"] if left == "half a line" else [])
    for number in range(60):
        log.append("object.sealed", number=number)
    log.close()
    assert len(closed_files(path)) > 2
    assert numbers(path) == [0, 1, 2, *range(60)]
    read_files(path, expected=head)


def test_who_opens_a_log_looks_at_its_last_closed_file(path: Path, clock: ManualClock) -> None:
    write(path, clock)
    last = closed_files(path)[-1]
    kept = last.read_bytes()
    for damage in (kept.replace(b'"ok"', b'"no"'), b"", b"no event\n"):
        last.write_bytes(damage)
        with pytest.raises(AuditUnavailableError) as caught:
            AuditLog.open(path, clock)
        assert str(last) in caught.value.next_step
    last.write_bytes(kept)
    later = path.with_name(f"{path.name}.{10**9:012}")
    shutil.copy(last, later)
    with pytest.raises(AuditUnavailableError, match="begins before the end"):
        AuditLog.open(path, clock)
    later.unlink()
    path.unlink()  # all of the last closed one counts then
    change(last)
    with pytest.raises(AuditUnavailableError, match="broken"):
        AuditLog.open(path, clock)


def test_a_file_of_another_chain_is_not_written_on(path: Path, clock: ManualClock) -> None:
    other = path.with_name("other.jsonl")
    write(path, clock)
    clock.shift(1)
    write(other, clock)  # as many events, of another moment
    shutil.copy(other, path)
    with pytest.raises(AuditUnavailableError, match="does not continue"):
        AuditLog.open(path, clock)


def test_a_rotation_that_fails_changes_nothing(path: Path, clock: ManualClock) -> None:
    log = AuditLog.open(path, clock, SMALL)
    begun = path.with_name(f".{path.name}.next")
    begun.mkdir()  # the next file cannot be begun
    for number in range(40):
        log.append("object.sealed", number=number)
    assert closed_files(path) == []
    assert path.stat().st_size > SMALL.max_bytes
    begun.rmdir()
    for number in range(40, 60):
        log.append("object.sealed", number=number)
    assert len(closed_files(path)) > 0, "it was tried again"
    log.close()
    assert numbers(path) == list(range(60))
    read_files(path)


def test_a_closed_file_is_never_written_over(path: Path, clock: ManualClock) -> None:
    log = AuditLog.open(path, clock, SMALL)
    taken = [path.with_name(f"{path.name}.{seq:012}") for seq in range(1, 40)]
    for file in taken:
        file.write_bytes(b"evidence")
    for number in range(39):
        log.append("object.sealed", number=number)
    assert all(file.read_bytes() == b"evidence" for file in taken)
    log.close()


def test_an_event_of_the_data_path_does_not_wait_to_rotate(path: Path, clock: ManualClock) -> None:
    log = AuditLog.open(path, clock, SMALL)
    with log._sync_lock:  # a sync is under way
        for number in range(60):
            log.append("object.sealed", durable=False, number=number)
        assert closed_files(path) == []
    log.append("object.sealed", durable=False, number=60)
    assert len(closed_files(path)) == 1
    log.close()
    assert numbers(path) == list(range(61))


def test_threads_and_readers_while_it_rotates(path: Path, clock: ManualClock) -> None:
    log = AuditLog.open(path, clock, SMALL)
    log.append("object.sealed", number=-1)
    done = threading.Event()

    def read() -> int:
        times = 0
        while True:
            read_files(path)
            times += 1
            if done.is_set():
                return times

    def many(start: int) -> None:
        for number in range(start, start + 100):
            log.append("object.sealed", number=number, durable=number % 10 == 0)

    with ThreadPoolExecutor(5) as pool:
        reading = pool.submit(read)
        try:
            for writing in [pool.submit(many, start) for start in range(0, 400, 100)]:
                writing.result()
        finally:
            done.set()
        assert reading.result() > 0
    log.close()
    assert sorted(numbers(path)) == list(range(-1, 400))
    assert len(closed_files(path)) > 10
    read_files(path)


def test_a_reader_waits_while_the_next_file_gets_its_name(
    path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = write(path, clock)
    begun = path.with_name(f".{path.name}.next")
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) % 2 == 0:
            begun.rename(path)

    monkeypatch.setattr("runtime.audit_files.time.sleep", pause)
    path.rename(begun)
    assert read_files(path).written.head == head
    path.rename(begun)
    assert json.loads(lines_since(path, 0)[-1])["seq"] == head.seq
    assert len(pauses) == 4
    path.rename(path.with_name("away"))
    monkeypatch.setattr("runtime.audit_files.time.sleep", pauses.append)
    with pytest.raises(FileNotFoundError):
        read_files(path)


def test_killed_amid_rotations(path: Path, clock: ManualClock) -> None:
    """kill -9 at some moment: every acknowledged event is there, and the chain goes on."""
    program = """
        import sys
        from pathlib import Path
        from runtime.audit import AuditLog
        from runtime.audit_files import RotationSettings
        from runtime.clock import SystemClock
        log = AuditLog.open(Path(sys.argv[1]), SystemClock(), RotationSettings(max_bytes=4096))
        while True:
            log.append("x", durable=False, filling="y" * 1900)
            print(log.head.seq, flush=True)
    """
    for _ in range(4):
        killed_while_it_writes(program, path, clock, lines=40)
        assert read_files(path).start == audit.EMPTY
    assert len(closed_files(path)) > 20


def test_the_lines_since_a_moment_reach_back_as_many_files_as_they_must(
    path: Path, clock: ManualClock
) -> None:
    log = AuditLog.open(path, clock, SMALL)
    moments = []
    for number in range(60):
        clock.shift(1)
        moments.append(int(clock.wall_s() * 1000))
        log.append("object.sealed", number=number)
    log.close()
    everything = [line for file in (*closed_files(path), path) for line in file.read_bytes().splitlines(True)]
    assert lines_since(path, 0) == everything
    assert lines_since(path, moments[-1]) == path.read_bytes().splitlines(keepends=True)
    some = lines_since(path, moments[30])
    assert everything[-len(some) :] == some
    assert json.loads(some[0])["seq"] <= 31
    assert len(some) < len(everything)


def test_settings_that_make_no_sense() -> None:
    for wrong in ({"max_bytes": 100}, {"max_age_s": 5}, {"max_age_s": -1}, {"max_bytes": 1 << 60}):
        with pytest.raises(ValueError, match="must be"):
            RotationSettings(**wrong)


def test_a_file_that_cannot_be_read(path: Path, clock: ManualClock) -> None:
    write(path, clock)
    last = closed_files(path)[-1]
    last.unlink()
    os.mkdir(last)  # noqa: PTH102 - of the name of a file
    with pytest.raises(AuditUnavailableError, match="cannot be read"):
        AuditLog.open(path, clock)


# What a rotation syncs, and who waits for it.


class Watched(AuditLog):
    """Remembers how much of each file was there when it was synced last; a sync can be held up, or fail."""

    synced: dict[int, int]
    let: threading.Event
    waits: threading.Event
    fails = False

    @classmethod
    def watched(cls, path: Path, clock: ManualClock, rotation: RotationSettings) -> "Watched":
        log = cls.open(path, clock, rotation)
        log.synced, log.let, log.waits = {}, threading.Event(), threading.Event()
        log.let.set()
        return log

    @override
    def _sync(self) -> None:
        if hasattr(self, "let") and not self.let.is_set():
            self.waits.set()
            assert self.let.wait(60)
        if self.fails:
            raise self._fail("was not synced (a test)", "check the disk, then restart")
        status = os.fstat(self._descriptor)
        super()._sync()
        if hasattr(self, "synced"):
            self.synced[status.st_ino] = status.st_size


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_on_disk_whole_before_it_is_closed(path: Path, clock: ManualClock, durable: bool) -> None:
    """Else a power cut could take the end of a file whose name says what it ends with."""
    log = Watched.watched(path, clock, SMALL)
    for number in range(60):
        log.append("object.sealed", number=number, durable=durable)
    log.close()
    closed = closed_files(path)
    assert len(closed) > 2
    assert {file: log.synced.get(file.stat().st_ino) for file in closed} == {
        file: file.stat().st_size for file in closed
    }


LARGE = RotationSettings(max_bytes=400_000)
"""More than an event loop may have synced."""


def fill(log: AuditLog, clock: ManualClock) -> int:
    """Write until the file is due; how many events."""
    for number in itertools.count():
        if log.path.stat().st_size >= LARGE.max_bytes:
            return number
        log.append("object.sealed", number=number, padding="x" * 3000, durable=False)
    raise AssertionError("unreachable")


def test_the_data_path_waits_for_no_disk_when_a_large_file_is_due(path: Path, clock: ManualClock) -> None:
    log = Watched.watched(path, clock, LARGE)
    count = fill(log, clock)
    log.let.clear()
    log.append("object.sealed", number=count, durable=False)
    assert log.waits.wait(60), "somebody syncs it"
    for number in range(count + 1, count + 20):
        log.append("object.sealed", number=number, durable=False)
    assert closed_files(path) == [], "the disk hangs: it is written on"
    log.let.set()
    deadline_s = time.monotonic() + 60
    number = count + 20
    while not closed_files(path):  # with the first event after that
        assert time.monotonic() < deadline_s
        log.append("object.sealed", number=number, durable=False)
        number += 1
        time.sleep(0.001)
    log.close()
    assert numbers(path) == list(range(number))
    (closed,) = closed_files(path)
    assert log.synced[closed.stat().st_ino] == closed.stat().st_size
    read_files(path)


def write_for_a_minute(log: AuditLog) -> None:
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        log.append("object.sealed", durable=False)
        time.sleep(0.001)


def test_a_sync_aside_that_fails_refuses_as_any_other(path: Path, clock: ManualClock) -> None:
    log = Watched.watched(path, clock, LARGE)
    fill(log, clock)
    log.fails = True
    with pytest.raises(AuditUnavailableError, match="was not synced"):
        write_for_a_minute(log)
    with pytest.raises(AuditUnavailableError, match="was not synced"):
        log.append("object.sealed")
    log.close()
    assert closed_files(path) == []


def test_without_a_thread_to_sync_it_aside_a_file_is_written_on(
    path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_thread: threading.Thread) -> None:
        tried.append(log.path.stat().st_size)
        raise RuntimeError("can't start new thread")

    tried: list[int] = []
    log = AuditLog.open(path, clock, LARGE)
    count = fill(log, clock)
    monkeypatch.setattr(threading.Thread, "start", start)
    for number in range(count, count + 200):
        log.append("object.sealed", number=number, padding="x" * 200, durable=False)
    assert closed_files(path) == []
    assert len(tried) >= 2, "it is tried again"
    for before, after in itertools.pairwise(tried):
        assert after - before >= LARGE.max_bytes // 16, "and not at every event"
    number = count + 200
    while not closed_files(path):  # durable events need no thread
        log.append("object.sealed", number=number, padding="x" * 3000)
        number += 1
    log.close()
    assert numbers(path) == list(range(number))


def test_a_written_file_that_was_cut_to_nothing_is_refused(path: Path, clock: ManualClock) -> None:
    """The closed ones say that it has to go on. Without such only a recorded head can tell."""
    write(path, clock)
    *_, last = closed_files(path)
    path.write_bytes(b"")
    with pytest.raises(BrokenChainError, match=f"it is empty, though it goes on from {re.escape(last.name)}"):
        read_files(path)
    log = AuditLog.open(path, clock, SMALL)  # which says `recovered`: it is no secret
    log.close()
    assert read_files(path).written.size_bytes > 0
