"""What every `key-agent` command does: have the operation done here or by the agent that runs, and show it.

1. A command talks to the running agent, or, if none runs, does the work itself (app.py): the result is the
   same.
2. What cannot be undone is asked for first; without a terminal `--yes` says it.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Final, cast

import typer

from envelope.errors import SealgateError
from key_agent import app, config
from key_agent.api import client
from key_agent.explaining import explain_agent
from key_agent.operations.commands import Json
from key_agent.operations.operations import Operations
from key_agent.state_dir import SOCKET_NAME, StateLockedError
from runtime import cli, lifecycle, observe
from runtime.cli import CommandError, ExitCode

type Options = cli.Options[config.Settings]

# These take keys back, so they need the loop that does, also where no agent runs.
_WITHDRAWING: Final = frozenset({"kek_revoke", "service_remove", "proxy_remove"})
_LOCK_PATIENCE_S: Final = 10.0

YesFlag = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def perform(options: Options, operation: str, **arguments: object) -> Json:
    """One operation's result. CommandError says what went wrong and what comes next."""
    observe.configure_logging(level=logging.ERROR)
    try:
        return asyncio.run(perform_with(options.load(), operation, arguments))
    except SealgateError as error:
        raise explain_agent(error) from error


async def perform_with(settings: config.Settings, operation: str, arguments: dict[str, object]) -> Json:
    socket = settings.agent.state_dir / SOCKET_NAME
    give_up_s = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        if (answer := await client.call(socket, operation, arguments)) is not None:
            return answer
        try:
            return await _perform_here(settings, operation, arguments)
        except StateLockedError:
            # Another command is at work, or the agent is starting or stopping.
            if time.monotonic() > give_up_s:
                raise
            await asyncio.sleep(0.1)


async def _perform_here(settings: config.Settings, operation: str, arguments: dict[str, object]) -> Json:
    lifecycle.harden_process()
    async with app.opened(settings) as agent:
        work = getattr(Operations(agent), operation)
        if operation not in _WITHDRAWING:
            return cast("Json", await work(**arguments))
        async with agent.working(refresh=False):
            return cast("Json", await work(**arguments))


def confirm(options: Options, warning: str, *, yes: bool) -> None:
    """Show what will be lost. CommandError unless the answer is yes."""
    if yes:
        return
    if options.as_json or not sys.stdin.isatty():
        raise CommandError(warning, "repeat the command with --yes", ExitCode.REFUSED, code="not-confirmed")
    typer.echo(warning, err=True)
    if not typer.confirm("Continue?", err=True):
        raise CommandError("not confirmed", "nothing was changed", ExitCode.REFUSED, code="not-confirmed")


def show(context: typer.Context, data: Json, text: Callable[[Any], str]) -> None:
    context.obj.emit(data, lambda: text(data).rstrip("\n"))


def read_pem(path: Path) -> str:
    """The text of a certificate file. CommandError if it is none."""
    try:
        return path.read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise CommandError(f"{path}: not PEM", "give a certificate in PEM form", ExitCode.REFUSED) from None
