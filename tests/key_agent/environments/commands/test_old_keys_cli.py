"""`key-agent keys reencrypt`: one process at a job, and what people read of what is left."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer

from envelope.keys import KeyId
from key_agent.environments.commands import old_keys_cli
from key_agent.reencryption.job import Progress
from key_agent.reencryption.ledger import FileLedger
from key_agent.reencryption.store_file import read_store
from runtime.cli import CommandError

JOB = "0a" * 8
STORE = """
[webdav]
store_url = "https://localhost:1/"
through_url = "https://localhost:1/"
store_ca_file = "ca.pem"
through_ca_file = "ca.pem"
"""


def _context(state_dir: Path) -> typer.Context:
    """As far as a job's own process needs it."""
    settings = SimpleNamespace(agent=SimpleNamespace(state_dir=state_dir))
    return cast("typer.Context", SimpleNamespace(obj=SimpleNamespace(load=lambda: settings)))


@pytest.fixture
def connector(tmp_path: Path) -> Path:
    file = tmp_path / "store.toml"
    file.write_text(STORE)
    return file


def _begun(directory: Path, connector: str, **more: Any) -> Progress:
    begun = Progress(job_id=JOB, incident_id="inc-1", connector=connector, sources=(KeyId.random(),), **more)
    asyncio.run(FileLedger(directory).save_progress(begun))
    return begun


def test_a_job_that_is_at_work_is_not_taken_up_a_second_time(tmp_path: Path, connector: Path) -> None:
    _begun(tmp_path, read_store(connector).described())
    with FileLedger(tmp_path).held(JOB), pytest.raises(CommandError, match="another process") as refused:
        old_keys_cli.reencrypt_resume(_context(tmp_path), JOB, connector)
    assert "Ctrl-C" in refused.value.next_step


def test_another_store_takes_up_no_dropped_job(tmp_path: Path, connector: Path) -> None:
    dropped = _begun(tmp_path, "https://elsewhere/", met=1, dropped_at_ms=5)
    with pytest.raises(CommandError, match="about another store"):
        old_keys_cli.reencrypt_resume(_context(tmp_path), JOB, connector)
    assert asyncio.run(FileLedger(tmp_path).load(JOB)) == dropped


def test_a_dropped_job_that_is_resumed_is_waited_for_again(
    tmp_path: Path, connector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken_up: list[Progress] = []
    monkeypatch.setattr(
        old_keys_cli, "_reencrypt", lambda _context, progress, _file: taken_up.append(progress)
    )
    _begun(tmp_path, read_store(connector).described(), met=1, dropped_at_ms=5)
    old_keys_cli.reencrypt_resume(_context(tmp_path), JOB, connector)
    assert [(one.met, one.dropped_at_ms) for one in taken_up] == [(1, None)]
