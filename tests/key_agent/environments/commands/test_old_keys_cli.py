"""`key-agent keys reencrypt`: one process at a job, and what people read of what is left."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer

from envelope.keys import KeyId
from key_agent.environments.commands import approval_cli, old_keys_cli
from key_agent.environments.commands.old_keys_cli import MAX_KEYS_NAMED
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


LOSS: dict[str, Any] = {
    "jobs": [
        {
            "job": JOB,
            "connector": "https://store/",
            "state": "running",
            "dropped_at_ms": 5,
            "keys": ["0e" * 16],
            "left": 3,
            "may_be_more": True,
            "names": ["a/b", "x\x1b[2J\u202e"],
        }
    ],
    "not_looked": [f"{number:032x}" for number in range(MAX_KEYS_NAMED + 2)],
}


def test_a_loss_is_told_with_its_jobs_names_and_what_nobody_knows() -> None:
    text = old_keys_cli.loss_text(LOSS)
    assert text.isprintable() or set(filter(lambda one: not one.isprintable(), text)) == {"\n"}
    for said in (JOB, "dropped 1970", "https://store/", "3 objects", "may be more", "'a/b'", "and 1 more"):
        assert said in text
    assert "Nobody knows what is lost" in text
    assert (f"{MAX_KEYS_NAMED - 1:032x}" in text, f"{MAX_KEYS_NAMED:032x}" in text) == (True, False)
    assert "and 2 more" in text
    unlooked = old_keys_cli.loss_text({"jobs": [], "not_looked": ["0e" * 16]})
    assert ("Nobody knows" in unlooked, "nothing:" in unlooked) == (True, False)
    all_done = old_keys_cli.loss_text({"jobs": [], "not_looked": []})
    assert ("Nobody knows" in all_done, "nothing:" in all_done, "trash" in all_done) == (False, True, True)


@pytest.mark.parametrize("accepts", [True, False])
def test_who_accepts_a_loss_is_shown_it_before_and_afterwards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, accepts: bool
) -> None:
    asked: list[str] = []

    def perform(_options: object, operation: str, **_arguments: object) -> dict[str, Any]:
        asked.append(operation)
        if operation == "keys_loss":
            return LOSS
        return {"keys": {"0e" * 16: "destroyed"}, "loss": LOSS if accepts else None}

    monkeypatch.setattr(old_keys_cli, "perform", perform)
    options = SimpleNamespace(as_json=False, emit=lambda _data, text: print(text()))
    context = cast("typer.Context", SimpleNamespace(obj=options))
    with pytest.raises(CommandError, match="unreadable for ever") as refused:
        old_keys_cli.keys_retire(context, "0e" * 16, "a-1", accept_loss=accepts)
    assert (JOB in str(refused.value), "keys_retire" in asked) == (accepts, False)
    old_keys_cli.keys_retire(context, "0e" * 16, "a-1", accept_loss=accepts, yes=True)
    assert (JOB in capsys.readouterr().out) == accepts


def test_whoever_signs_that_is_shown_it_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = {
        "approval": "a-1",
        "state": "open",
        "action": "keys-retire",
        "subject": "acme",
        "requested_by": "ann",
        "expires_at_ms": 1,
        "signatures": {},
        "missing": 2,
        "used_at_ms": None,
        "payload": "{}",
        "payload_sha256": "",
        "statement": "-",
        "loss": LOSS,
    }
    shown: list[str] = []
    monkeypatch.setattr(approval_cli, "perform", lambda *_words, **_more: asked)
    options = SimpleNamespace(as_json=True, emit=lambda _data, text: shown.append(text()))
    context = cast("typer.Context", SimpleNamespace(obj=options))
    approval_cli.approval_show(context, "a-1")
    assert JOB in shown[0]
    with pytest.raises(CommandError, match=JOB):
        approval_cli.approval_sign(context, "a-1", "ann", tmp_path / "none.key")
