"""`sealgate tenant access`, `sealgate user`: who may use a tenant's forward proxy.

1. As in proxy/cli.py: the directory is changed whether the proxy runs or not; a running one cuts the
   connections of a user who was removed.
2. A password is printed once, by the command that draws it, or written to a file of mode 0600 that does not
   exist yet. It is never an argument.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from envelope.certificates import fingerprint
from envelope.errors import FormatError
from proxy.command_line.operating import (
    Operator,
    certificate_from,
    not_there,
    operating,
    usage_error,
)
from proxy.tenants import certificates
from proxy.tenants.certificates import CredentialError
from proxy.tenants.user_store import issue_password, remove_user, set_access
from proxy.users.model import Proof, UserAccess, UserEntry, parse_networks, parse_proxy_address, parse_user
from runtime.cli import CommandError, ExitCode

user_app = typer.Typer(no_args_is_help=True, help="Users of tenants' forward proxies.")

TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="Tenant id.")]
UserName = Annotated[str, typer.Argument(metavar="TENANT/USER", help="A user of that tenant.")]


def tenant_access(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    name: TenantName,
    network: Annotated[
        list[str] | None, typer.Option("--network", help="Where its users are; repeatable.")
    ] = None,
    require: Annotated[
        list[Proof] | None, typer.Option("--require", help="What its users have to show; repeatable.")
    ] = None,
    client_ca: Annotated[
        list[Path] | None, typer.Option("--client-ca", help="Who vouches for client certificates (PEM).")
    ] = None,
    proxy: Annotated[
        list[str] | None,
        typer.Option("--proxy", metavar="HOST:PORT", help="For the PAC file, in this order; repeatable."),
    ] = None,
    proxy_tls: Annotated[
        bool, typer.Option("--proxy-tls", help="Users reach the proxies by TLS (HTTPS in the PAC file).")
    ] = False,
    open_to_all: Annotated[bool, typer.Option("--open", help="Ask for nothing.")] = False,
) -> None:
    """Show, or with options replace as a whole, what a tenant asks of its forward proxy's users."""
    given = bool(network or require or client_ca or proxy or proxy_tls)
    if given and open_to_all:
        raise CommandError("--open and rules exclude each other", "give one of both", ExitCode.USAGE)
    with operating(context, looks=not (given or open_to_all)) as operator:
        entry = operator.store.snapshot().tenants.get(name)
        if entry is None:
            raise not_there(f"there is no tenant {name}")
        access, changed = entry.access, False
        if given or open_to_all:
            try:
                wanted = UserAccess(
                    networks=parse_networks(network or ()),
                    client_roots=tuple(certificate_from(path) for path in client_ca or ()),
                    requires=frozenset(require or ()),
                    proxies=tuple(map(parse_proxy_address, proxy or ())),
                    proxies_speak_tls=proxy_tls,
                )
            except FormatError as error:
                raise usage_error(error, "see sealgate tenant access --help") from None
            changed = wanted != access
            if changed:
                access = set_access(operator.store, name, wanted, actor=operator.actor)
        _say_access(operator, name, access, changed=changed)


@user_app.command("add", epilog="Example: sealgate user add acme/alice --password-file alice.txt")
def user_add(
    context: typer.Context,
    user: UserName,
    password_file: Annotated[
        Path | None, typer.Option("--password-file", help="Write the password to this new file (0600).")
    ] = None,
    not_after: Annotated[
        datetime | None, typer.Option("--not-after", formats=["%Y-%m-%d"], help="Its last day (UTC).")
    ] = None,
) -> None:
    """Draw a password for a user; for one there is already, a new one in place of the old."""
    if password_file is not None and (password_file.exists() or not password_file.absolute().parent.is_dir()):
        raise CommandError(
            f"--password-file {password_file}: exists, or its directory does not",
            "name a new file in an existing directory",
            ExitCode.USAGE,
        )
    with operating(context) as operator:
        tenant, name = _user(user)
        ends_s = None if not_after is None else not_after.replace(tzinfo=UTC).timestamp() + 86400
        password = issue_password(operator.store, tenant, name, actor=operator.actor, not_after_s=ends_s)
        entry = operator.store.snapshot().users[tenant, name]
        data: dict[str, object] = {"changed": True, "user": _user_json(entry)}
        if password_file is None:
            data["password"] = password.text
            operator.say(data, f"{user}: {password.text}\n  keep it now: nobody can read it again")
            return
        try:
            certificates.write_new_file(password_file, password.text.encode() + b"\n", mode=0o600)
        except CredentialError as error:
            raise CommandError(
                f"{user} has a new password, but it was not written: {error}",
                "mend that, then repeat the command: it draws another",
                ExitCode.FAILED,
                code="secret-not-written",
            ) from None
        data["password_file"] = str(password_file)
        operator.say(data, f"{user}: the password is in {password_file}")


@user_app.command("list", epilog="Example: sealgate user list acme")
def user_list(
    context: typer.Context, tenant: Annotated[str | None, typer.Argument(metavar="[TENANT]")] = None
) -> None:
    """The users, without their passwords."""
    with operating(context, looks=True) as operator:
        directory = operator.store.snapshot()
        if tenant is not None and tenant not in directory.tenants:
            raise not_there(f"there is no tenant {tenant}")
        entries = [entry for entry in directory.users.values() if tenant in (None, entry.tenant)]
        lines = [_user_line(entry) for entry in entries]
        operator.say({"users": [_user_json(entry) for entry in entries]}, "\n".join(lines) or "no users")


@user_app.command("remove", epilog="Example: sealgate user remove acme/alice")
def user_remove(context: typer.Context, user: UserName) -> None:
    """Take a user's access away; a running proxy cuts the user's connections."""
    with operating(context) as operator:
        remove_user(operator.store, *_user(user), actor=operator.actor)
        operator.say({"changed": True, "removed": user}, f"{user} removed")


def _user(text: str) -> tuple[str, str]:
    try:
        return parse_user(text)
    except FormatError as error:
        raise usage_error(error, "give tenant/user, as `sealgate user list` shows them") from None


def _user_json(entry: UserEntry) -> dict[str, object]:
    return {
        "user": f"{entry.tenant}/{entry.name}",
        "created": _time(entry.created_at_s),
        "not_after": None if entry.not_after_s is None else _time(entry.not_after_s),
    }


def _user_line(entry: UserEntry) -> str:
    end = "" if entry.not_after_s is None else f", until {_time(entry.not_after_s)}"
    return f"{entry.tenant}/{entry.name}{end}"


def _say_access(operator: Operator, name: str, access: UserAccess, *, changed: bool) -> None:
    networks = [str(network) for network in access.networks]
    roots = [fingerprint(root).hex() for root in access.client_roots]
    data: dict[str, object] = {
        "changed": changed,
        "tenant": name,
        "networks": networks,
        "requires": sorted(access.requires),
        "client_roots": roots,
        "proxies": list(access.proxies),
        "proxies_speak_tls": access.proxies_speak_tls,
    }
    shown = ", ".join(sorted(access.requires)) or "nothing"
    lines = [f"users of {name} show {shown}, and come from {', '.join(networks) or 'anywhere'}"]
    lines += [f"  client certificates of the authority with sha256 {root}" for root in roots]
    if access.proxies:
        way = "TLS" if access.proxies_speak_tls else "plain"
        lines.append(f"  PAC file: {', '.join(access.proxies)} ({way})")
    operator.say(data, "\n".join(lines))


def _time(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
