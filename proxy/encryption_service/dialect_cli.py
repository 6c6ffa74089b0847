"""`sealgate dialect`: what the encryption service speaks, tenant by tenant."""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from envelope.keys import check_name
from proxy.command_line.operating import operating, usage_error
from proxy.encryption_service.dialects.xks_store import new_prefix, uri_path
from proxy.encryption_service.model import DialectEntry, DialectName, DialectSettings
from proxy.encryption_service.provisioning import Dialect, OnlyTenant, TenantName, say_effective
from proxy.tenants.dialect_store import set_dialect
from proxy.tenants.service_rows import parse_settings
from runtime.cli import CommandError, ExitCode

dialect_app = typer.Typer(no_args_is_help=True, help="What the encryption service speaks, tenant by tenant.")


@dialect_app.command("enable", epilog="Example: sealgate dialect enable acme transit")
def dialect_enable(context: typer.Context, tenant: TenantName, dialect: Dialect) -> None:
    """Switch a dialect on for a tenant."""
    _set_dialect(context, tenant, dialect, enabled=True)


@dialect_app.command("disable", epilog="Example: sealgate dialect disable acme transit")
def dialect_disable(context: typer.Context, tenant: TenantName, dialect: Dialect) -> None:
    """Switch it off; settings and credentials stay."""
    _set_dialect(context, tenant, dialect, enabled=False)


@dialect_app.command("set", epilog="Example: sealgate dialect set acme xks --settings xks.json")
def dialect_set(
    context: typer.Context,
    tenant: TenantName,
    dialect: Dialect,
    settings: Annotated[
        Path, typer.Option("--settings", metavar="FILE", help="JSON; the dialect's page in docs/ says what.")
    ],
) -> None:
    """Replace a dialect's settings; a dialect that was not there is switched on."""
    _set_dialect(context, tenant, dialect, settings=settings)


@dialect_app.command("new-prefix", epilog="Example: sealgate dialect new-prefix acme")
def dialect_new_prefix(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it begins with; may be empty.")] = "",
) -> None:
    """Draw an unguessable prefix for a key store of AWS KMS; nothing is changed."""
    with operating(context, looks=True) as operator:
        try:
            prefix = new_prefix(name)
        except ValueError as error:
            raise usage_error(error, "give segments of A-Z a-z 0-9 _ -, or nothing") from None
        operator.say({"prefix": prefix, "uri_path": uri_path(prefix)}, prefix)


@dialect_app.command("list", epilog="Example: sealgate dialect list --json")
def dialect_list(context: typer.Context, tenant: OnlyTenant = None) -> None:
    """Dialects, tenant by tenant, with their settings."""
    with operating(context, looks=True) as operator:
        found = [
            entry
            for entry in operator.store.snapshot().encryption_service.dialects.values()
            if tenant is None or entry.tenant == tenant
        ]
        found.sort(key=lambda entry: (entry.tenant, entry.dialect))
        operator.say(
            {"dialects": [_dialect_json(entry) for entry in found]},
            lambda: "\n".join(_dialect_line(entry) for entry in found) or "no dialects",
        )


def _set_dialect(
    context: typer.Context,
    tenant: str,
    dialect: DialectName,
    *,
    enabled: bool | None = None,
    settings: Path | None = None,
) -> None:
    with operating(context) as operator:
        before = operator.store.revision()
        entry = set_dialect(
            operator.store,
            check_name("tenant", tenant),
            dialect,
            actor=operator.actor,
            enabled=enabled,
            settings=None if settings is None else _settings(dialect, settings),
        )
        changed = operator.store.revision() != before
        say_effective(operator, {"changed": changed, "dialect": _dialect_json(entry)}, _dialect_line(entry))


def _settings(dialect: DialectName, path: Path) -> DialectSettings:
    try:
        return parse_settings(dialect, path.read_bytes())
    except msgspec.MsgspecError as error:
        raise CommandError(
            f"{path}: not the settings of {dialect}: {error}",
            "see the dialect's page in docs/",
            ExitCode.USAGE,
        ) from None


def _dialect_json(entry: DialectEntry) -> dict[str, object]:
    return {
        "tenant": entry.tenant,
        "dialect": entry.dialect.value,
        "enabled": entry.enabled,
        "settings": msgspec.to_builtins(entry.settings),
    }


def _dialect_line(entry: DialectEntry) -> str:
    state = "on" if entry.enabled else "off"
    return f"{entry.tenant} {entry.dialect}: {state}, {msgspec.json.encode(entry.settings).decode()}"
