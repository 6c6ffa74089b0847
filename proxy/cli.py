"""`sealgate`: the commands of the proxy's operator.

1. Provisioning goes to the directory database, whether the proxy runs or not; the running one takes a
   change over within `proxy.reload_s`. The database's history is the record of who changed what; the proxy
   copies it to its audit log before it acts on it (the log has one writer).
2. Adding again what is there as it is succeeds and changes nothing. Removing what is not there fails: a typo
   should not look like success.
3. No secret is an argument or a result; private keys are made here and stay below `proxy.state_dir`.
4. Groups of commands stand beside it, one a file (tenant_cli.py, network_service_cli.py, users/cli.py ...).
5. Exit codes are those of runtime/cli.py: 0 done, 1 failed, 2 usage, 3 refused by a rule, 4 unavailable now.
"""

import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from proxy import config
from proxy.command_line.errors_cli import errors
from proxy.command_line.inspect_cli import inspect
from proxy.command_line.network_service_cli import service_app, service_json, service_lines
from proxy.command_line.operating import check_state_dir, operating, options_of
from proxy.command_line.profile_cli import profile_app
from proxy.command_line.tenant_cli import tenant_app, tenant_json, tenant_lines
from proxy.encryption_service.credential_cli import credential_app
from proxy.encryption_service.dialect_cli import dialect_app
from proxy.encryption_service.key_cli import key_app
from proxy.tenants import certificates
from proxy.tenants.model import Directory
from proxy.users.cli import user_app
from proxy.vault.azure_cli import azure_credential_app
from proxy.vault.cli import s3_credential_app
from runtime import cli
from runtime import doctor as report
from runtime.audit_command import add_audit
from runtime.cli import CommandError, ExitCode
from runtime.clock import SystemClock

DEFAULT_CONFIG: Final = Path("/etc/sealgate/sealgate.toml")
CONFIG_VARIABLE: Final = "SEALGATE_CONFIG"

program = cli.make_app("sealgate", "The encrypting proxy whose keys stay with the enterprise.")
program.add_typer(tenant_app, name="tenant")
program.add_typer(service_app, name="service")
program.add_typer(profile_app, name="profile")
program.add_typer(key_app, name="key")
program.add_typer(credential_app, name="credential")
program.add_typer(dialect_app, name="dialect")
program.add_typer(user_app, name="user")
program.add_typer(s3_credential_app, name="s3-credential")
program.add_typer(azure_credential_app, name="azure-credential")


cli.add_options(
    program,
    default_config=DEFAULT_CONFIG,
    config_variable=CONFIG_VARIABLE,
    read=config.load,
    check=config.unusable_files,
)


def _audit_file(settings: config.Settings) -> Path:
    return settings.proxy.audit_file


def _worker_audit_files(settings: config.Settings) -> list[Path]:
    return settings.proxy.audit_files()[1:]


add_audit(program, audit_file=_audit_file, more_files=_worker_audit_files)


def main() -> NoReturn:
    cli.run(program)


@program.command("list", epilog="Example: sealgate list --json")
def list_all(context: typer.Context) -> None:
    """Tenants and network services."""
    with operating(context, looks=True) as operator:
        directory = operator.store.snapshot()
        data = {
            "revision": directory.revision,
            "tenants": [
                tenant_json(tenant)
                | {"services": [service_json(service) for service in directory.services_of(tenant.tenant)]}
                for tenant in directory.tenants.values()
            ],
        }
        operator.say(data, lambda: _directory_text(directory))


@program.command("history", epilog="Example: sealgate history --after 12")
def history(
    context: typer.Context,
    after: Annotated[int, typer.Option("--after", min=0, help="Only changes with a higher revision.")] = 0,
    limit: Annotated[int, typer.Option("--limit", min=1, max=100_000, help="At most so many.")] = 1000,
) -> None:
    """Who changed what, oldest first."""
    with operating(context, looks=True) as operator:
        changes = operator.store.history(after=after, limit=limit)

        def text() -> str:
            return "\n".join(
                f"{change.revision:5} {_time(change.at_ms)} {change.action} "
                f"{change.tenant}{'/' + change.service if change.service else ''} by {change.actor}"
                + "".join(f" {name}={value}" for name, value in change.detail.items())
                for change in changes
            )

        operator.say({"changes": [change.as_json() for change in changes]}, text)


program.command("errors", epilog="Example: sealgate errors > errors.md")(errors)
program.command("inspect", epilog="Example: sealgate inspect report.pdf --json")(inspect)


@program.command("doctor", epilog="Example: sealgate doctor --json")
def doctor_command(context: typer.Context) -> None:
    """Check the installation and say how to mend it; exit code 1 if something failed."""
    with _packages_of_the_proxy():
        from proxy.command_line import doctor  # noqa: PLC0415 - it imports the engine

    chosen = options_of(context)
    checks = doctor.examine(chosen.config_file, chosen.load, SystemClock())
    chosen.emit(report.as_json(checks), lambda: report.as_text(checks))
    if report.has_failed(checks):
        raise typer.Exit(ExitCode.FAILED)


@program.command("run", epilog="Example: sealgate --config /etc/sealgate/sealgate.toml run")
def run(context: typer.Context) -> None:
    """Serve until SIGTERM."""
    settings = options_of(context).load()
    check_state_dir(settings.proxy.state_dir)
    certificates.make_private_directory(settings.proxy.state_dir)
    with _packages_of_the_proxy():
        from proxy.app import run_proxy  # noqa: PLC0415 - it imports the engine

    run_proxy(settings)


@contextlib.contextmanager
def _packages_of_the_proxy() -> Iterator[None]:
    """The agent's environment has this command too, but not all that `run` and `doctor` need."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(
            f"the package {str(error.name).partition('.')[0]} is not installed here",
            "pip install --require-hashes -r requirements-proxy.lock; the agent's lock file lacks the engine",
            ExitCode.UNAVAILABLE,
            code="package",
        ) from error


def _directory_text(directory: Directory) -> str:
    if not directory.tenants:
        return "no tenants; begin with `sealgate tenant add`"
    lines: list[str] = []
    for tenant in directory.tenants.values():
        lines += tenant_lines(tenant)
        for service in directory.services_of(tenant.tenant):
            lines += [f"  {line}" for line in service_lines(service)]
    return "\n".join(lines)


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")
