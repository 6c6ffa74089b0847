"""`key-agent`: the administrator's commands.

1. A command talks to the running agent, or, if none runs, does the work itself (app.py): the result is the
   same.
2. What makes objects unreadable names them first and wants a yes; without a terminal, `--yes`.
3. Groups of commands stand beside it, one a file (kek_cli.py, key_cli.py, environments/cli.py ...).
4. No secret is an argument: PINs and keys stand in files.
"""

import asyncio
import errno
import logging
from pathlib import Path
from typing import Annotated, Final, NoReturn

import structlog
import typer

from envelope.errors import SealgateError
from key_agent import app, config, doctor, setup
from key_agent.command_line.backup_cli import backup_app
from key_agent.command_line.kek_cli import kek_app
from key_agent.command_line.key_cli import key_app, rotate
from key_agent.command_line.performing import Options, perform_with
from key_agent.command_line.proxy_cli import proxy_app
from key_agent.command_line.reinstating_cli import reinstate
from key_agent.command_line.service_cli import service_app
from key_agent.command_line.status_cli import status
from key_agent.environments.commands import healing_cli, recovery_cli  # noqa: F401 - they add commands to `env`
from key_agent.environments.commands.approval_cli import admin_app, approval_app
from key_agent.environments.commands.cli import environment_app
from key_agent.environments.commands.incident_cli import incident_app
from key_agent.environments.commands.old_keys_cli import keys_app
from key_agent.explaining import PROGRAM, explain_agent
from key_agent.load_balancing.cli import lb_agent, lb_app
from key_agent.operations.commands import Json
from key_agent.sources.vendors import GENERIC, load_vendor, vendor_names
from key_agent.state_dir import AUDIT_NAME
from runtime import cli, lifecycle, observe
from runtime import doctor as report
from runtime.audit_command import add_audit
from runtime.cli import CommandError, ExitCode

DEFAULT_CONFIG: Final = Path("/etc/sealgate/key-agent.toml")
CONFIG_VARIABLE: Final = "KEY_AGENT_CONFIG"

log = structlog.get_logger(__name__)

program = cli.make_app(
    PROGRAM, "The key agent: pushes keys to proxies for as long as the HSM's KEK consents."
)
cli.add_options(
    program,
    default_config=DEFAULT_CONFIG,
    config_variable=CONFIG_VARIABLE,
    read=config.load,
    check=config.unusable_files,
)


def _audit_file(settings: config.Settings) -> Path:
    return settings.agent.state_dir / AUDIT_NAME


add_audit(program, audit_file=_audit_file)


def main() -> NoReturn:
    cli.run(program)


@program.command()
def init(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    tenant: Annotated[str, typer.Option(help="The tenant's id.")],
    agent: Annotated[str, typer.Option(help="This agent's id, as in its certificates.")],
    module: Annotated[
        Path | None, typer.Option(help="The HSM's PKCS#11 library. Default: where --hsm has it.")
    ] = None,
    token_label: Annotated[str | None, typer.Option(help="Label of the token that holds the KEK.")] = None,
    hsm: Annotated[str, typer.Option(help=f"Whose HSM it is: {', '.join(vendor_names())}.")] = GENERIC,
    openbao: Annotated[
        str | None, typer.Option(metavar="URL", help="OpenBao instead of an HSM: https://host:port.")
    ] = None,
    kmip: Annotated[str | None, typer.Option(metavar="HOST", help="A KMIP server instead of an HSM.")] = None,
    environment: Annotated[str, typer.Option(help="This environment's id.")] = "main",
    state_dir: Annotated[Path, typer.Option(help="Database, audit log, lock, socket.")] = Path(
        "/var/lib/sealgate-agent"
    ),
    files_dir: Annotated[
        Path | None,
        typer.Option(
            help="root.pem, signing.{pem,key}, tls.{pem,key}, pin. Default: beside the configuration."
        ),
    ] = None,
) -> None:
    """Write a commented configuration and make the directories. Never writes a PIN or a key."""
    options: Options = context.obj
    result = setup.initialise(
        options.config_file,
        setup.Answers(
            tenant=tenant,
            agent=agent,
            environment=environment,
            source=_key_source(module, token_label, hsm, openbao, kmip),
            state_dir=state_dir,
            files_dir=files_dir or options.config_file.parent / "key-agent",
        ),
    )
    options.emit(result, lambda: setup.what_is_missing(result))


def _key_source(
    module: Path | None, token_label: str | None, hsm: str, openbao: str | None, kmip: str | None
) -> setup.Hsm | setup.OpenBaoServer | setup.KmipServer:
    is_hsm = module is not None or token_label is not None or hsm != GENERIC
    if is_hsm + (openbao is not None) + (kmip is not None) != 1:
        raise CommandError(
            "say where the KEK is to be: in one place",
            "--token-label LABEL with --module FILE or --hsm VENDOR; or --openbao URL; or --kmip HOST",
            ExitCode.USAGE,
            code="usage",
        )
    if openbao is not None:
        return setup.OpenBaoServer(url=openbao)
    if kmip is not None:
        return setup.KmipServer(host=kmip)
    try:
        vendor = load_vendor(hsm)
    except ValueError as error:
        raise CommandError(str(error), "--hsm VENDOR", ExitCode.USAGE, code="usage") from None
    if not vendor.pkcs11:
        raise CommandError(
            f"{vendor.title} has no PKCS#11 module", vendor.instead, ExitCode.USAGE, code="usage"
        )
    known = next((path for path in vendor.module_paths if path.is_file()), None)
    if (module := module or known) is None:
        raise CommandError(
            f"the PKCS#11 library of {vendor.title} is not where it usually is",
            "install it, or say where it is: --module FILE",
            ExitCode.USAGE,
            code="usage",
        )
    if token_label is None:
        raise CommandError(
            "the token's label is missing", "--token-label LABEL", ExitCode.USAGE, code="usage"
        )
    return setup.Hsm(module=module, token_label=token_label, vendor=hsm)


@program.command()
def run(context: typer.Context) -> None:
    """Run the agent: refresh every interval, watch the KEK, withdraw at once when it is revoked."""
    options: Options = context.obj
    warnings = lifecycle.harden_process()
    settings = options.load()
    observe.configure_logging(json=settings.log.json)
    for warning in warnings:
        log.warning(warning)

    async def serve(stop: asyncio.Event) -> None:
        await app.serve(settings, stop, hangup=hangup)

    hangup = asyncio.Event()
    try:
        lifecycle.run(serve, on_hangup=hangup.set)
    except Exception as error:
        cause = _first(error)
        if isinstance(cause, SealgateError):
            raise explain_agent(cause) from error
        if isinstance(cause, OSError) and cause.errno == errno.EADDRINUSE:
            raise CommandError(
                f"{settings.admin.host}:{settings.admin.port} is in use", "choose another admin.port"
            ) from error
        raise


def _first(error: Exception) -> Exception:
    """What ended the agent: its loops' errors come in groups."""
    while isinstance(error, ExceptionGroup):
        error = error.exceptions[0]
    return error


def doctor_command(context: typer.Context) -> None:
    """Check files, HSM, certificates, proxies and clocks, and say how to mend what is wrong."""
    options: Options = context.obj
    checks = doctor.examine(options.config_file, options.load, _diagnose)
    options.emit(report.as_json(checks), lambda: report.as_text(checks))
    failed = [check for check in checks if check.outcome == "failed"]
    if failed:
        raise CommandError(
            f"{len(failed)} of {len(checks)} checks failed: {failed[0].name}",
            failed[0].mend or "see the list",
        )


def _diagnose(settings: config.Settings) -> Json:
    observe.configure_logging(level=logging.CRITICAL)
    try:
        return asyncio.run(perform_with(settings, "diagnosis", {}))
    except SealgateError as error:
        raise explain_agent(error) from error


program.command()(status)
program.command(name="doctor")(doctor_command)
program.command()(reinstate)
program.command()(rotate)
program.command("lb-agent", epilog="Example: key-agent lb-agent --lb-config lb.toml")(lb_agent)
for name, commands in {
    "kek": kek_app,
    "service": service_app,
    "key": key_app,
    "backup": backup_app,
    "proxy": proxy_app,
    "env": environment_app,
    "lb": lb_app,
    "incident": incident_app,
    "keys": keys_app,
    "approval": approval_app,
    "admin": admin_app,
}.items():
    program.add_typer(commands, name=name)


if __name__ == "__main__":
    main()
