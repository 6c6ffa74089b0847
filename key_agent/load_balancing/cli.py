"""`key-agent lb config`, `lb watchdog`, `lb status`, `key-agent lb-agent`: what runs beside HAProxy.

They have a settings file of their own and need no key agent on their machine.
"""

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final, Never

import msgspec
import structlog
import typer
from cryptography import x509

from key_agent.load_balancing import settings as lb_settings
from key_agent.load_balancing.haproxy_config import haproxy_config
from key_agent.load_balancing.lb_agent import LbAgent, StateFileError
from key_agent.load_balancing.sights import STATUS_QUESTION, LbStatus
from key_agent.load_balancing.watchdog import Watchdog
from runtime import lifecycle, observe
from runtime.cli import CommandError, ExitCode, Options
from runtime.clock import SystemClock
from runtime.settings import SettingsError

lb_app = typer.Typer(no_args_is_help=True, help="HAProxy between several environments.")
log = structlog.get_logger(__name__)

SettingsFile = Annotated[
    Path, typer.Option("--lb-config", help="The companion's settings (docs/environments.md).")
]
_DEFAULT = Path("/etc/sealgate/lb-agent.toml")
_STATUS_S: Final = 5.0
_MAX_STATUS_BYTES: Final = 4 << 20


@lb_app.command("config", epilog="Example: key-agent lb config --check > /etc/haproxy/haproxy.cfg")
def config(
    lb_config: SettingsFile = _DEFAULT,
    check: Annotated[bool, typer.Option("--check", help="Have `haproxy -c` judge it first.")] = False,
    haproxy: Annotated[str, typer.Option(help="The program that judges.")] = "haproxy",
) -> None:
    """Print HAProxy's configuration for these environments."""
    text = haproxy_config(_settings(lb_config))
    if check:
        _judge(text, haproxy)
    typer.echo(text, nl=False)


@lb_app.command("watchdog", epilog="Example: key-agent lb watchdog")
def watchdog(lb_config: SettingsFile = _DEFAULT) -> None:
    """While the lb-agent is silent, set every server down by HAProxy's socket."""
    chosen = _settings(lb_config)
    path = chosen.frontend.stats_socket
    if path is None:
        raise CommandError(
            "frontend.stats_socket is not set: there is no way to tell HAProxy",
            f"set it in {lb_config}, write the configuration anew and reload HAProxy",
            ExitCode.USAGE,
        )
    observe.configure_logging(json=None)
    mine = chosen.lb_agent

    async def main(stop: asyncio.Event) -> None:
        await _until(
            stop,
            Watchdog(
                host=mine.host,
                port=mine.port,
                servers=[server.name for server in chosen.servers],
                socket_path=path,
                clock=SystemClock(),
            ).run(),
        )

    lifecycle.run(main)


@lb_app.command("status", epilog="Example: key-agent lb status")
def status(context: typer.Context, lb_config: SettingsFile = _DEFAULT) -> None:
    """What the lb-agent that runs here answers, whom it believes, and why not."""
    mine = _settings(lb_config).lb_agent
    try:
        found = msgspec.json.decode(asyncio.run(_ask(mine.host, mine.port)), type=LbStatus)
    except (OSError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
        raise CommandError(
            f"the lb-agent at {mine.host}:{mine.port} does not answer ({type(error).__name__})",
            f"start it: key-agent lb-agent --lb-config {lb_config}",
            ExitCode.UNAVAILABLE,
        ) from None
    options: Options[Any] = context.obj
    options.emit(msgspec.to_builtins(found), lambda: _status_lines(found))


async def _ask(host: str, port: int) -> bytes:
    async with asyncio.timeout(_STATUS_S):
        reader, writer = await asyncio.open_connection(host, port, limit=_MAX_STATUS_BYTES)
        try:
            writer.write(f"{STATUS_QUESTION}\n".encode())
            return await reader.readline()
        finally:
            writer.close()
            await writer.wait_closed()


def _status_lines(found: LbStatus) -> str:
    lines = [
        f"{found.load_balancer}: term {found.term}, epoch {found.epoch}"
        + ("" if found.stale is None else f"; EVERY SERVER IS DOWN: {found.stale}")
    ]
    for agent in found.agents:
        cause = "" if agent.cause is None else f": {agent.cause}"
        ago = "never heard" if agent.heard_s is None else f"heard {agent.heard_s:g} s ago"
        lines.append(f"agent {agent.agent}  {agent.word}{cause} ({ago})")
    for one in found.servers:
        rows, own = one.state or "in no row", one.says or "silent"
        own += "" if one.reason is None else f", {one.reason}"
        lines.append(f"server {one.server}  {one.answer}  ({one.environment}: {rows}; itself: {own})")
    return "\n".join(lines)


def lb_agent(lb_config: SettingsFile = _DEFAULT) -> None:
    """Tell HAProxy which environments serve: the worst of the signed rows and each server's own word."""
    chosen = _settings(lb_config)
    problems = list(lb_settings.unusable_files(chosen))
    if problems:
        raise CommandError(problems[0], f"mend it, or name another file in {lb_config}", ExitCode.USAGE)
    observe.configure_logging(json=None)
    root = _root(chosen.lb_agent.root_certificate_file)

    try:
        agent = LbAgent(chosen, root=root, clock=SystemClock())
    except StateFileError as error:
        raise CommandError(
            str(error),
            "see that lb_agent.manager names the manager of today, then remove the file",
            ExitCode.FAILED,
        ) from None

    async def main(stop: asyncio.Event) -> None:
        await _until(
            stop,
            agent.run(started=lambda: log.info("lb-agent answers", port=agent.port, pid=os.getpid())),
        )

    lifecycle.run(main)


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, Never]) -> None:
    """Run *work* until *stop* is set; what it raises is raised."""
    running = asyncio.create_task(work, name="lb")
    waiting = asyncio.create_task(stop.wait(), name="stop")
    done, _ = await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
    for task in (running, waiting):
        task.cancel()
    if running in done:
        await running
    await asyncio.gather(running, waiting, return_exceptions=True)


def _settings(path: Path) -> lb_settings.Settings:
    try:
        return lb_settings.load(path, os.environ)
    except SettingsError as error:
        raise CommandError(str(error), f"mend {path}", ExitCode.USAGE) from None


def _root(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{path}: no certificate ({type(error).__name__})", "give the tenant's root", ExitCode.USAGE
        ) from None


def _judge(text: str, haproxy: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".cfg", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        try:
            done = subprocess.run(  # noqa: S603 - the administrator's own program, no shell
                [haproxy, "-c", "-q", "-f", file.name],
                capture_output=True,
                text=True,
                check=False,
                timeout=30,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise CommandError(
                f"{haproxy} cannot be run ({type(error).__name__})",
                "install HAProxy, or name it by --haproxy",
                ExitCode.UNAVAILABLE,
            ) from None
    if done.returncode != 0:
        raise CommandError(
            f"haproxy refuses the configuration: {done.stderr.strip()[:500]}",
            "mend the file it names, then repeat the command",
            ExitCode.FAILED,
        )
