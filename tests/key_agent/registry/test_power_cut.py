"""What was acknowledged survives a power cut and kill -9: registry on both databases, and the audit log.

Each has its control: the same test with a store that does not sync finds losses.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.key_agent.registry.power_cuts import NO_MOUNTS, Writer
from tests.key_agent.registry.records import open_registry
from tests.key_agent.registry.writing_process import number_of

ROOT = Path(__file__).parents[3]


@pytest.fixture
def workshop() -> Iterator[Path]:
    """A directory that PostgreSQL's user can reach, with a path short enough for a socket."""
    made = Path(tempfile.mkdtemp(prefix="sealgate-cuts-"))
    made.chmod(0o711)
    yield made
    shutil.rmtree(made)


def power_cuts(workshop: Path, store: str, cuts: int, *options: str) -> list[dict[str, Any]]:
    """What each of *cuts* left (power_cuts.py). Skips where file systems cannot be mounted."""
    words = ["-m", "tests.key_agent.registry.power_cuts", str(workshop), store, str(cuts), *options]
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode == NO_MOUNTS or "unshare:" in done.stderr:
        pytest.skip(f"loop devices cannot be mounted here, kill -9 is tested: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == cuts
    return found


@pytest.mark.parametrize(("store", "cuts"), [("sqlite", 20), ("postgres", 4), ("audit", 10)])
def test_nothing_acknowledged_is_lost_by_a_power_cut(workshop: Path, store: str, cuts: int) -> None:
    for left in power_cuts(workshop, store, cuts):
        assert left["acknowledged"] > 0
        assert (left["missing"], left["damage"]) == (0, None), left


@pytest.mark.parametrize(("store", "cuts"), [("sqlite", 3), ("postgres", 2), ("audit", 3)])
def test_the_control_loses_what_it_acknowledged(workshop: Path, store: str, cuts: int) -> None:
    """synchronous=NORMAL, synchronous_commit=off, no fdatasync."""
    assert any(left["missing"] for left in power_cuts(workshop, store, cuts, "--careless"))


async def test_nothing_acknowledged_is_lost_by_kill_9(url: str) -> None:
    """Again and again, wherever the writer is."""
    acknowledged = 0
    for life in range(4):
        writer = Writer("registry", url, [])
        try:
            acknowledged = writer.wait_for(acknowledged + 1 + life * 3)
        finally:
            writer.kill()
        acknowledged = max(acknowledged, writer.acknowledged)
        registry = await open_registry(url)
        found = {number_of(key.owner) for key in await registry.wrapped_keys("k1")}
        await registry.close()
        assert set(range(1, acknowledged + 1)) <= found
        assert len(found) <= acknowledged + 2, "no more than the one that was not acknowledged yet"
