import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import override

import pytest

from envelope import audit
from envelope.audit import BrokenChainError
from envelope.errors import MisuseError
from runtime.audit import AuditLog, AuditUnavailableError
from runtime.audit_files import read_chain
from runtime.clock import Clock
from runtime.observe import REGISTRY
from tests.fakes.clock import ManualClock
from tests.runtime.killed_writer import killed_while_it_writes

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


@pytest.fixture
def log(path: Path, clock: ManualClock) -> Iterator[AuditLog]:
    log = AuditLog.open(path, clock)
    yield log
    log.close()


def events(path: Path) -> list[dict[str, object]]:
    with path.open("rb") as lines:
        audit.verify(lines)
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, clock: ManualClock, count: int = 3) -> None:
    log = AuditLog.open(path, clock)
    for number in range(count):
        log.append("object.sealed", service="acme/s3", number=number)
    log.close()


def refused(path: Path, clock: ManualClock) -> AuditUnavailableError:
    with pytest.raises(AuditUnavailableError) as caught:
        AuditLog.open(path, clock)
    assert str(path) in str(caught.value)
    assert caught.value.next_step
    return caught.value


def test_events_are_chained_lines(log: AuditLog, path: Path, clock: ManualClock) -> None:
    log.append("service.added", service="acme/s3")
    clock.shift(1.5)
    log.append("envelope", outcome="refused", code="nonce", kid=None, durable=False)
    first, second = events(path)
    assert (first["seq"], first["time"], first["service"]) == (1, "2027-01-15T08:00:00.000Z", "acme/s3")
    assert (second["outcome"], second["code"], second["kid"]) == ("refused", "nonce", None)
    assert second["time"] == "2027-01-15T08:00:01.500Z"
    assert second["prev"] == first["hash"]
    assert (log.head.seq, log.head.hash) == (2, second["hash"])


def test_only_the_owner_may_read(log: AuditLog, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_restart_continues_the_chain(path: Path, clock: ManualClock) -> None:
    write(path, clock)
    write(path, clock)
    assert [event["seq"] for event in events(path)] == [1, 2, 3, 4, 5, 6]


def test_one_writer(log: AuditLog, path: Path, clock: ManualClock) -> None:
    assert "another process" in str(refused(path, clock))
    log.append("still.mine")
    log.close()
    AuditLog.open(path, clock).close()


def test_threads_do_not_tear_the_chain(log: AuditLog, path: Path) -> None:
    def many() -> None:
        for _ in range(200):
            log.append("x", durable=False)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(events(path)) == 800


def test_refusals_are_counted(log: AuditLog) -> None:
    def failures() -> float:
        found = REGISTRY.get_sample_value("sealgate_audit_failures_total")
        assert found is not None
        return found

    before = failures()
    log.append("one")
    assert failures() == before
    log.close()
    for _ in range(2):
        with pytest.raises(AuditUnavailableError):
            log.append("two")
    assert failures() == before + 2


def test_a_closed_log_refuses(log: AuditLog) -> None:
    log.close()
    log.close()
    with pytest.raises(AuditUnavailableError, match="closed"):
        log.append("late")


def test_what_is_no_event_leaves_the_log_usable(log: AuditLog, path: Path) -> None:
    with pytest.raises(MisuseError):
        log.append("x", secret=b"bytes")  # type: ignore[arg-type]
    log.append("y")
    assert len(events(path)) == 1


# --- crashes


@pytest.mark.parametrize("kept", [1, 40, -2, -1])
def test_a_torn_last_line_is_moved_away_and_told(path: Path, clock: ManualClock, kept: int) -> None:
    write(path, clock)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    torn = lines[2][:kept]
    path.write_bytes(lines[0] + lines[1] + torn)
    log = AuditLog.open(path, clock)
    log.append("next")
    log.close()
    recovered, following = events(path)[2:]
    saved = path.with_name("audit.jsonl.torn-3")
    assert recovered["action"] == "audit-recovered"
    assert recovered["torn_file"] == saved.name
    assert recovered["torn_sha256"] == hashlib.sha256(torn).hexdigest()
    assert saved.read_bytes() == torn
    assert following["action"] == "next"


def test_zeros_after_a_power_cut_are_a_torn_line(path: Path, clock: ManualClock) -> None:
    write(path, clock)
    with path.open("ab") as file:
        file.write(bytes(4096))
    AuditLog.open(path, clock).close()
    assert events(path)[-1]["torn_bytes"] == 4096


def test_killed_amid_writing(path: Path, clock: ManualClock) -> None:
    """kill -9 at some moment: every acknowledged event is there, and the chain goes on."""
    program = """
        import sys
        from pathlib import Path
        from runtime.audit import AuditLog
        from runtime.clock import SystemClock
        log = AuditLog.open(Path(sys.argv[1]), SystemClock())
        while True:
            log.append("x", durable=False)
            print(log.head.seq, flush=True)
    """
    for _ in range(3):
        killed_while_it_writes(program, path, clock, lines=50)
        events(path)


# --- tampering


def test_a_changed_line_refuses_to_open(path: Path, clock: ManualClock) -> None:
    write(path, clock)
    before = path.read_bytes().replace(b"acme/s3", b"acne/s3", 1)
    path.write_bytes(before)
    error = refused(path, clock)
    assert "broken at line 1" in str(error)
    assert f"mv {path} {path}.broken" in error.next_step
    assert path.read_bytes() == before  # evidence


def test_a_deleted_line_refuses_to_open(path: Path, clock: ManualClock) -> None:
    write(path, clock)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    assert "broken at line 2" in str(refused(path, clock))


def test_reordered_lines_refuse_to_open(path: Path, clock: ManualClock) -> None:
    write(path, clock)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[1] + lines[0] + lines[2])
    assert "broken at line 1" in str(refused(path, clock))


def test_a_cut_line_in_the_middle_refuses_to_open(path: Path, clock: ManualClock) -> None:
    write(path, clock)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-20] + b"\n" + lines[2])
    assert "broken at line 2" in str(refused(path, clock))


def test_an_endless_line_refuses_to_open(path: Path, clock: ManualClock) -> None:
    write(path, clock, 1)
    with path.open("ab") as file:
        file.write(b"x" * (audit.MAX_LINE_BYTES + 1))
    assert "broken at line 2" in str(refused(path, clock))


def test_the_next_step_of_a_broken_log_ends_the_trouble(path: Path, clock: ManualClock) -> None:
    write(path, clock)
    path.write_bytes(path.read_bytes().replace(b"acme", b"acne", 1))
    command = re.search(r"mv (\S+) (\S+?)[;\s]", refused(path, clock).next_step)
    assert command is not None
    Path(command[1]).rename(command[2])
    write(path, clock, 1)
    assert [event["seq"] for event in events(path)] == [1]
    assert path.with_name("audit.jsonl.broken").exists()


# --- reading it without writing


def test_a_log_is_read_while_it_is_written(log: AuditLog, path: Path) -> None:
    log.append("one")
    first = log.head
    log.append("two")
    with path.open("rb") as stream:
        chain = read_chain(stream, expected=first)
    assert (chain.head, chain.size_bytes, chain.torn) == (log.head, path.stat().st_size, b"")
    with path.open("rb") as stream, pytest.raises(BrokenChainError, match=r"line 3: event 7 .* not in this"):
        read_chain(stream, expected=audit.Head(7, first.hash))
    with path.open("rb") as stream, pytest.raises(BrokenChainError, match="not in this chain"):
        read_chain(stream, expected=audit.Head(first.seq, log.head.hash))


def test_a_torn_line_is_no_part_of_the_chain(path: Path, clock: ManualClock) -> None:
    write(path, clock, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq"')
    with path.open("rb") as stream:
        chain = read_chain(stream)
    assert (chain.head.seq, chain.size_bytes, chain.torn) == (2, len(whole), b'{"seq"')


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def cut(path: Path) -> None:
    os.truncate(path, 10)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def write_into(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"{}\n")


@pytest.mark.parametrize("meddle", [remove, replace, cut, empty, write_into])
def test_meddling_while_running_refuses_from_then_on(log: AuditLog, path: Path, meddle: object) -> None:
    log.append("one")
    assert callable(meddle)
    meddle(path)
    for durable in (False, True):
        with pytest.raises(AuditUnavailableError):
            log.append("two", durable=durable)
    if path.exists():
        assert b'"two"' not in path.read_bytes()


def test_a_change_of_directory_changes_nothing(
    tmp_path: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    log = AuditLog.open(Path("audit.jsonl"), clock)
    monkeypatch.chdir("/")
    log.append("x")
    log.close()
    assert len(events(tmp_path / "audit.jsonl")) == 1


# --- file systems that refuse


class SlowDisk(AuditLog):
    """Syncs only when it is let."""

    def __init__(self, path: Path, clock: Clock, descriptor: int) -> None:
        super().__init__(path, clock, descriptor)
        self.begun, self.let = threading.Event(), threading.Event()

    @override
    def _sync(self) -> None:
        self.begun.set()
        assert self.let.wait(30)
        super()._sync()


def test_an_event_of_the_data_path_waits_for_no_disk(tmp_path: Path, clock: ManualClock) -> None:
    """It is written on the event loop: a slow sync in another thread must not stop every tenant's traffic."""
    log = SlowDisk.open(tmp_path / "audit.jsonl", clock)
    with ThreadPoolExecutor(2) as pool:
        durable = pool.submit(log.append, "keys-accepted")
        assert log.begun.wait(10)
        quick = pool.submit(log.append, "object-open", durable=False)
        quick.result(timeout=30)
        assert not durable.done()
        log.let.set()
        durable.result(timeout=30)
    log.close()
    assert audit.verify(log.path.read_bytes().splitlines(keepends=True)).seq == 2


def test_after_a_failed_sync_nothing_is_believed(log: AuditLog) -> None:
    """A descriptor whose fdatasync fails for real: a pipe's."""
    log.append("one")
    read, write_end = os.pipe()
    os.dup2(write_end, log._descriptor)
    with pytest.raises(AuditUnavailableError, match="not synced"):
        log.append("two")
    for durable in (False, True):  # sticky, although the write would succeed
        with pytest.raises(AuditUnavailableError, match="not synced"):
            log.append("three", durable=durable)
    os.close(write_end)
    log.close()
    assert b'"three"' not in os.read(read, 10_000)
    os.close(read)


def test_half_a_line_that_cannot_be_removed_ends_the_log(log: AuditLog, path: Path) -> None:
    """A descriptor that neither takes the line nor lets itself be cut: /dev/full's."""
    log.append("one")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._descriptor)
    os.close(full)
    for _ in range(2):
        with pytest.raises(AuditUnavailableError, match="half a line"):
            log.append("two", durable=False)
    assert len(events(path)) == 1


def test_no_directory(tmp_path: Path, clock: ManualClock) -> None:
    error = refused(tmp_path / "missing" / "audit.jsonl", clock)
    assert "No such file" in str(error)


def test_a_directory_in_its_place(tmp_path: Path, clock: ManualClock) -> None:
    assert "Is a directory" in str(refused(tmp_path, clock))


def test_a_symbolic_link_is_not_followed(tmp_path: Path, path: Path, clock: ManualClock) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    refused(path, clock)
    assert not (tmp_path / "elsewhere").exists()


def in_mount(tmp_path: Path, options: str, program: str) -> str:
    """Run *program* with a tmpfs of its own mounted at sys.argv[1]: a real file system that refuses for real.

    The mount lives in a namespace that ends with the process.
    """
    target = tmp_path / "mounted"
    target.mkdir()
    script = 'mount -t tmpfs -o "$0" none "$1" && exec "$2" -c "$3" "$1"'
    mapping = [] if os.geteuid() == 0 else ["--map-root-user"]
    shell = ["sh", "-c", script, options, str(target), sys.executable, textwrap.dedent(program)]
    command = ["unshare", "--mount", *mapping, *shell]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0 and ("unshare:" in done.stderr or "mount:" in done.stderr):
        pytest.skip(f"no mount namespace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_refuses_and_recovers(tmp_path: Path) -> None:
    output = in_mount(
        tmp_path,
        "size=64k",
        """
        import sys
        from pathlib import Path
        from envelope import audit
        from runtime.audit import AuditLog, AuditUnavailableError
        from runtime.clock import SystemClock
        directory = Path(sys.argv[1])
        path = directory / "audit.jsonl"
        ballast = directory / "ballast"
        ballast.write_bytes(bytes(24 * 1024))
        log = AuditLog.open(path, SystemClock())
        written = 0
        try:
            while True:
                log.append("x", filling="y" * 100, durable=written % 2 == 0)
                written += 1
        except AuditUnavailableError as error:
            print(error, "/", error.next_step)
        assert written > 50, written
        for durable in (True, False):       # refused again, not once
            try:
                log.append("z", durable=durable, filling="y" * 5000)
                raise SystemExit("a full disk took an event")
            except AuditUnavailableError:
                pass
        with path.open("rb") as lines:      # no half line
            assert audit.verify(lines).seq == written
        ballast.unlink()
        log.append("after")
        log.close()
        with path.open("rb") as lines:
            assert audit.verify(lines).seq == written + 1
        print("recovered")
        """,
    )
    assert "cannot be written: No space left on device / free or mend the disk" in output
    assert output.endswith("recovered\n")


def test_a_read_only_file_system_refuses(tmp_path: Path) -> None:
    output = in_mount(
        tmp_path,
        "size=64k,ro",
        """
        import sys
        from pathlib import Path
        from runtime.audit import AuditLog, AuditUnavailableError
        from runtime.clock import SystemClock
        try:
            AuditLog.open(Path(sys.argv[1]) / "audit.jsonl", SystemClock())
        except AuditUnavailableError as error:
            print(error)
        """,
    )
    assert "cannot be opened: Read-only file system" in output


def test_a_directory_without_write_permission_refuses(tmp_path: Path) -> None:
    program = """
        import os, sys
        from pathlib import Path
        from runtime.audit import AuditLog, AuditUnavailableError
        from runtime.clock import SystemClock
        directory = Path(sys.argv[1])
        os.chdir(directory)
        if os.geteuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            AuditLog.open(Path("audit.jsonl"), SystemClock())
        except AuditUnavailableError as error:
            print(error)
    """
    directory = tmp_path / "read-only"
    directory.mkdir(mode=0o555)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), directory],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be opened: Permission denied" in done.stdout


def test_a_limit_on_the_files_size_cuts_no_line(tmp_path: Path) -> None:
    """The kernel writes what still fits (a short write) and refuses the rest: nothing of it stays."""
    program = """
        import resource, sys
        from pathlib import Path
        from envelope import audit
        from runtime.audit import AuditLog, AuditUnavailableError
        from runtime.clock import SystemClock
        path = Path(sys.argv[1])
        log = AuditLog.open(path, SystemClock())
        log.append("one")
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, resource.RLIM_INFINITY))
        for _ in range(2):
            try:
                log.append("two")
                raise SystemExit("written beyond the limit")
            except AuditUnavailableError as error:
                print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        log.append("three")
        with path.open("rb") as lines:
            assert audit.verify(lines).seq == 2
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path / "audit.jsonl"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be written") == 2


@pytest.mark.parametrize("device", ["/dev/null", "/dev/full"])
def test_a_device_keeps_nothing_and_is_refused(clock: ManualClock, device: str) -> None:
    assert "not a regular file" in str(refused(Path(device), clock))
