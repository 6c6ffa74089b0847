"""`key-agent keys`: old keys rescued, their objects rewritten, and their end (docs/runbooks.md).

1. What opens or ends a key names an approval of two administrators.
2. A re-encryption runs in the process of its command, beside the agent; interrupted, it is resumed.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from envelope.errors import SealgateError
from envelope.keys import KeyId
from key_agent.command_line.performing import Options, confirm, perform, perform_with, show
from key_agent.command_line.wording import counted, time_text
from key_agent.environments.commands.incident_cli import (
    ApproveWith,
    IncidentName,
    KeyNames,
    key_ids,
    moment_ms,
)
from key_agent.explaining import explain_agent
from key_agent.reencryption.job import Progress, ReencryptionJob
from key_agent.reencryption.ledger import FileLedger
from key_agent.reencryption.store_file import read_store
from key_agent.reencryption.webdav import WebDavConnector
from runtime import lifecycle, observe
from runtime.cli import CommandError, ExitCode

MAX_KEYS_NAMED: Final = 20

keys_app = typer.Typer(no_args_is_help=True, help="Old keys: rescued, rewritten, ended.")


@keys_app.command("rescue")
def keys_rescue(
    context: typer.Context,
    incident: IncidentName,
    keys: KeyNames,
    until: Annotated[str, typer.Option(help="When it ends: 2026-11-23T01:00Z, within 30 days.")],
    approve_with: ApproveWith,
) -> None:
    """Let compromised keys open objects for a time, for every caller of every environment that has them."""
    data = perform(
        context.obj,
        "keys_rescue",
        incident=incident,
        keys=key_ids(keys),
        until_ms=moment_ms(until),
        approval=approve_with,
    )
    show(context, data, _incident_text)


@keys_app.command("retire")
def keys_retire(
    context: typer.Context,
    keys: KeyNames,
    approve_with: ApproveWith,
    accept_loss: Annotated[
        bool, typer.Option("--accept-loss", help="What they sealed and nobody rewrote is given up.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Destroy deactivated or compromised keys in every environment."""
    warning = (
        f"What {counted(len(key_ids(keys)), 'key')} sealed is unreadable for ever afterwards, "
        "in every environment."
    )
    if accept_loss and not yes:
        loss = perform(context.obj, "keys_loss", keys=key_ids(keys))
        warning = f"{warning}\n{loss_text(loss)}"
    confirm(context.obj, warning, yes=yes)
    data = perform(
        context.obj, "keys_retire", keys=key_ids(keys), approval=approve_with, accept_loss=accept_loss
    )
    show(context, data, _retired_text)


@keys_app.command("resume")
def keys_resume(context: typer.Context, keys: KeyNames, approve_with: ApproveWith) -> None:
    """Give suspended keys back that no open incident holds."""
    data = perform(context.obj, "keys_resume", keys=key_ids(keys), approval=approve_with)
    show(context, data, _key_states_text)


reencrypt_app = typer.Typer(no_args_is_help=True, help="Objects of old keys, sealed anew.")
keys_app.add_typer(reencrypt_app, name="reencrypt")


@reencrypt_app.command("start")
def reencrypt_start(
    context: typer.Context,
    incident: Annotated[str, typer.Option(help="Whose compromised keys.")],
    connector: Annotated[Path, typer.Option(help="Where the objects are (docs/environments.md).")],
    service: Annotated[
        str | None, typer.Option(help="Whose objects these are, where the keys are of several services.")
    ] = None,
) -> None:
    """Rewrite every object of a store that an incident's keys sealed. Runs until it is through."""
    store = read_store(connector)
    begun: Any = perform(
        context.obj, "reencryption_begin", incident=incident, connector=store.described(), service=service
    )
    progress = Progress(
        job_id=begun["job"],
        incident_id=begun["incident"],
        connector=store.described(),
        sources=tuple(KeyId.parse(key) for key in begun["keys"]),
        sealing=tuple(KeyId.parse(key) for key in begun["sealing"]),
    )
    options: Options = context.obj
    ledger = FileLedger(options.load().agent.state_dir)
    with _alone(ledger, progress.job_id):
        _reencrypt(context, progress, connector)


@reencrypt_app.command("resume")
def reencrypt_resume(
    context: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB", help="`keys reencrypt list` shows them.")],
    connector: Annotated[Path, typer.Option(help="The same as at the start.")],
) -> None:
    """Go on with one that was interrupted, or try those again that failed."""
    options: Options = context.obj
    ledger = FileLedger(options.load().agent.state_dir)
    with _alone(ledger, job):
        progress = asyncio.run(ledger.load(job))
        if progress.connector != read_store(connector).described():
            raise CommandError(
                f"{job} is about another store: {progress.connector}", "give the connector it began with"
            )
        _reencrypt(context, replace(progress, dropped_at_ms=None), connector)


@reencrypt_app.command("drop")
def reencrypt_drop(
    context: typer.Context,
    job: Annotated[str, typer.Argument(metavar="JOB", help="`keys reencrypt list` shows them.")],
) -> None:
    """Say that its store is gone for good. What it knows to be left stays known: its keys end with a loss."""
    show(context, perform(context.obj, "reencryption_drop", job=job), _dropped_text)


@reencrypt_app.command("list")
def reencrypt_list(context: typer.Context) -> None:
    """How far each one is."""

    def text(data: Any) -> str:
        return "\n".join(map(_reencryption_text, data["reencryptions"])) or "no re-encryptions"

    show(context, perform(context.obj, "reencryption_list"), text)


@contextmanager
def _alone(ledger: FileLedger, job: str) -> Iterator[None]:
    try:
        with ledger.held(job):
            yield
    except SealgateError as error:
        raise explain_agent(error) from error


def _reencrypt(context: typer.Context, progress: Progress, connector: Path) -> None:
    options: Options = context.obj
    observe.configure_logging(level=logging.ERROR)
    lifecycle.harden_process()
    settings = options.load()

    async def run() -> Progress:
        ledger = FileLedger(settings.agent.state_dir)
        await ledger.save_progress(progress)
        source = WebDavConnector(read_store(connector))
        job = ReencryptionJob(progress, source, ledger)
        state = "interrupted"
        try:
            found = await job.run()
            state = found.state
            return found
        finally:
            await source.close()
            await perform_with(
                settings,
                "reencryption_end",
                {
                    "job": progress.job_id,
                    "state": state,
                    "rewritten": job.progress.rewritten,
                    "failed": job.progress.failed,
                },
            )

    try:
        done = asyncio.run(run())
    except SealgateError as error:
        raise CommandError(
            f"{progress.job_id} stopped: {error}",
            f"`key-agent keys reencrypt resume {progress.job_id} --connector {connector}` goes on",
            ExitCode.UNAVAILABLE,
            code="interrupted",
        ) from error
    data: dict[str, object] = {
        "job": done.job_id,
        "incident": done.incident_id,
        "connector": done.connector,
        "state": done.state,
        "scanned": done.scanned,
        "rewritten": done.rewritten,
        "skipped": done.skipped,
        "failed": done.failed,
        "failures": dict(list(done.failures.items())[:20]),
    }
    show(context, data, _reencryption_text)
    if not done.is_whole:
        raise CommandError(
            f"still sealed by an old key: {counted(done.failed, 'object')}",
            f"see why, then `key-agent keys reencrypt resume {done.job_id} --connector {connector}`",
            ExitCode.FAILED,
            code="incomplete",
        )


# What people read.


def _incident_text(data: Any) -> str:
    return f"{data['incident']} is {data['state']}"


def _key_states_text(data: Any) -> str:
    return "\n".join(f"{key}: {state}" for key, state in data["keys"].items())


def _retired_text(data: Any) -> str:
    ended = _key_states_text(data)
    return ended if data.get("loss") is None else f"{ended}\n{loss_text(data['loss'])}"


def loss_text(data: Any) -> str:
    """What is known to be lost with keys, and what nobody knows."""
    lines = []
    for job in data["jobs"]:
        dropped_at_ms = job["dropped_at_ms"]
        state = job["state"] if dropped_at_ms is None else f"dropped {time_text(dropped_at_ms)}"
        more = ", and it was not through: there may be more" if job["may_be_more"] else ""
        lines.append(
            f"  {job['job']}, {state}, of {job['connector']}: knows of {counted(job['left'], 'object')} "
            f"left under its keys, {len(job['keys'])} of these among them{more}"
        )
        # A store's names are anybody's: none says anything else on a terminal than what it is.
        lines += [f"    {name!r}" for name in job["names"]]
        if unnamed := job["left"] - len(job["names"]):
            lines.append(f"    and {unnamed} more")
    if unknown := data["not_looked"]:
        lines.append("  Nobody knows what is lost: no re-encryption has gone through a store for these keys:")
        lines += [f"    {key_id}" for key_id in unknown[:MAX_KEYS_NAMED]]
        if len(unknown) > MAX_KEYS_NAMED:
            lines.append(f"    and {len(unknown) - MAX_KEYS_NAMED} more")
    head = "Known to be lost, by the re-encryptions on this agent's machine:"
    none = "  nothing: each key's are done"
    rest = "Lost as well, and counted by nobody: what their stores do not list (trash, versions, backups)."
    return "\n".join([head, *(lines or [none]), rest])


def _dropped_text(data: Any) -> str:
    back = "The store is there again: `keys reencrypt resume` takes it up."
    if not data["may_have_left"]:
        return f"{data['job']} is dropped. It has met nothing of its keys: no key waits for it. {back}"
    return (
        f"{data['job']} is dropped. It knows of {counted(data['known_left'], 'object')} left"
        f"{'' if data['state'] == 'incomplete' else ', and there may be more'}: "
        f"`keys retire` of its keys needs --accept-loss. {back}"
    )


def _reencryption_text(data: Any) -> str:
    dropped_at_ms = data.get("dropped_at_ms")
    dropped = "" if dropped_at_ms is None else f", dropped {time_text(dropped_at_ms)}"
    lines = [
        f"{data['job']}  {data['state']}{dropped}: {data['connector']}",
        f"  objects: {data['scanned']} seen, {data['rewritten']} rewritten, {data['failed']} failed",
    ]
    lines += [f"  {name}: {why}" for name, why in data["failures"].items()]
    return "\n".join(lines)
