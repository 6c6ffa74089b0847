"""One process at a time, in a directory of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from key_agent.state_dir import StateDirError, StateLockedError, check_state_dir, state_lock


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    made = tmp_path / "state"
    made.mkdir(mode=0o700)
    return made


def test_the_second_one_waits_or_goes(directory: Path) -> None:
    with state_lock(directory), pytest.raises(StateLockedError, match="in use"), state_lock(directory):
        pass
    with state_lock(directory):
        pass


def test_a_killed_holder_leaves_no_lock(directory: Path) -> None:
    script = (
        "import pathlib, sys, time\n"
        "from key_agent.state_dir import state_lock\n"
        "with state_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True); time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, directory],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(StateLockedError), state_lock(directory):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    with state_lock(directory):
        pass


def test_a_link_in_place_of_the_lock_is_not_followed(directory: Path, tmp_path: Path) -> None:
    (directory / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"), state_lock(directory):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_directory_that_is_no_place_to_work_in(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(StateDirError, match="No such file") as caught:
        check_state_dir(tmp_path / "missing")
    assert "init" in caught.value.next_step
    directory.chmod(0o710)
    with pytest.raises(StateDirError) as caught:
        check_state_dir(directory)
    assert "chmod 700" in caught.value.next_step
    directory.chmod(0o700)
    check_state_dir(directory)
    if os.geteuid() == 0:
        os.chown(directory, 12345, -1)
        with pytest.raises(StateDirError, match="12345"):
            check_state_dir(directory)
