"""What `doctor` says of the machine."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime import machine
from runtime.audit import AuditLog
from runtime.doctor import Check
from tests.fakes.clock import ManualClock

ROOT = Path(__file__).parents[2]


def one(checks: Iterator[Check]) -> Check:
    (check,) = checks
    assert (check.mend is None) == (check.outcome == "ok")
    return check


def test_the_clock_is_looked_at() -> None:
    check = one(machine.check_clock())
    assert check.outcome in {"ok", "warning"}
    assert "synchronised" in check.detail


@pytest.mark.parametrize(
    ("pattern", "where"), [("core\n", "files: core"), ("|/usr/bin/apport\n", "a program: |")]
)
def test_core_dumps(tmp_path: Path, pattern: str, where: str) -> None:
    file = tmp_path / "core_pattern"
    file.write_text(pattern)
    before = resource.getrlimit(resource.RLIMIT_CORE)
    program = f"""
from pathlib import Path
from runtime.lifecycle import harden_process
from runtime.machine import check_cores
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, {before[1]}))
print(*(check.outcome for check in check_cores(Path({str(file)!r}))))
harden_process()
print(*(check.outcome + " " + check.detail for check in check_cores(Path({str(file)!r}))))
"""
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    ).stdout.splitlines()
    assert told[0] == ("ok" if before[1] == 0 else "warning")
    assert told[1].startswith("ok ")
    assert where in told[1]
    assert one(machine.check_cores(tmp_path / "none")).outcome == "warning"


def test_swap(tmp_path: Path) -> None:
    file = tmp_path / "swaps"
    file.write_text("Filename Type Size Used Priority\n")
    assert one(machine.check_swap(file)).outcome == "ok"
    file.write_text("Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n/swapfile file 1 0 -3\n")
    check = one(machine.check_swap(file))
    assert (check.outcome, check.detail) == ("warning", "on: /dev/sda2, /swapfile")
    assert one(machine.check_swap(tmp_path / "none")).outcome == "warning"


def test_disk(tmp_path: Path) -> None:
    assert one(machine.check_disk("state_dir space", tmp_path / "none")).outcome == "failed"
    assert "MiB are free" in one(machine.check_disk("state_dir space", tmp_path)).detail
    # A file system without room: every Linux has one.
    assert one(machine.check_disk("state_dir space", Path("/proc"))).outcome == "warning"


def test_audit(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    assert one(machine.check_audit(path)).outcome == "ok"
    log = AuditLog.open(path, ManualClock())
    log.append("one")
    log.append("two")
    assert "2 events" in one(machine.check_audit(path)).detail
    log.close()
    path.write_bytes(path.read_bytes().replace(b'"two"', b'"six"'))
    check = one(machine.check_audit(path))
    assert check.outcome == "failed"
    assert "line 2" in check.detail
    assert one(machine.check_audit(tmp_path)).outcome == "failed"
