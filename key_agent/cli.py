"""`key-agent`: the administrator's commands.

1. A command talks to the running agent, or, if none runs, does the work itself (app.py): the result is the
   same.
2. What makes objects unreadable names them first and wants a yes; without a terminal, `--yes`.
3. No secret is an argument: PINs and keys stand in files.
"""

import asyncio
import base64
import errno
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import structlog
import typer

from envelope.errors import SealgateError
from key_agent import api, app, config, doctor, live_status, setup
from key_agent.commands import Json
from key_agent.environments import healing_cli, recovery_cli  # noqa: F401 - they add commands to `env`
from key_agent.environments.approval_cli import admin_app, approval_app
from key_agent.environments.cli import environment_app, environments_text
from key_agent.environments.incident_cli import incident_app
from key_agent.environments.old_keys_cli import keys_app
from key_agent.load_balancing.cli import lb_agent, lb_app
from key_agent.performing import Options, confirm, perform, perform_with, show
from key_agent.sources.vendors import GENERIC, load_vendor, vendor_names
from key_agent.state_dir import AUDIT_NAME, SOCKET_NAME
from runtime import cli, lifecycle, observe
from runtime import doctor as report
from runtime.audit_command import add_audit
from runtime.cli import CommandError, ExitCode
from runtime.clock import SystemClock
from runtime.files import write_new_file

DEFAULT_CONFIG: Final = Path("/etc/sealgate/key-agent.toml")
CONFIG_VARIABLE: Final = "KEY_AGENT_CONFIG"

log = structlog.get_logger(__name__)

program = cli.make_app(
    api.PROGRAM, "The key agent: pushes keys to proxies for as long as the HSM's KEK consents."
)
kek_app = typer.Typer(no_args_is_help=True, help="The key-encryption key in the HSM.")
service_app = typer.Typer(no_args_is_help=True, help="Network services: what keys are made for.")
key_app = typer.Typer(no_args_is_help=True, help="Keys of network services, and their states.")
backup_app = typer.Typer(no_args_is_help=True, help="The registry in a file that only this HSM opens.")
proxy_app = typer.Typer(no_args_is_help=True, help="Proxies: where keys are pushed to.")
program.add_typer(kek_app, name="kek")
program.add_typer(service_app, name="service")
program.add_typer(key_app, name="key")
program.add_typer(backup_app, name="backup")
program.add_typer(proxy_app, name="proxy")
program.add_typer(environment_app, name="env")
program.add_typer(lb_app, name="lb")
program.command("lb-agent", epilog="Example: key-agent lb-agent --lb-config lb.toml")(lb_agent)
program.add_typer(incident_app, name="incident")
program.add_typer(keys_app, name="keys")
program.add_typer(approval_app, name="approval")
program.add_typer(admin_app, name="admin")


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
YesFlag = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
ServiceName = Annotated[str, typer.Argument(metavar="SERVICE", help="SERVICE or TENANT/SERVICE.")]
KeyName = Annotated[str, typer.Argument(metavar="KID", help="The key id in hex: `key list` shows it.")]
ReasonText = Annotated[str | None, typer.Option("--reason", help="Why, for the list and the audit log.")]
KekTypeName = Annotated[
    str | None, typer.Option("--type", help="aes-256, rsa-3072 or ec-p256. Default: the first that works.")
]
ValidDays = Annotated[int | None, typer.Option(help="The KEK ends so many days from now. Default: never.")]
HsmLabel = Annotated[
    str | None, typer.Option(help="Adopt the key of this label that the HSM's owner made; with --hsm-id.")
]
HsmId = Annotated[str | None, typer.Option(help="CKA_ID in hex of the key to adopt.")]


def main() -> NoReturn:
    cli.run(program)


# The commands.


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
            raise api.explain_agent(cause) from error
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


@program.command()
def status(
    context: typer.Context,
    follow: Annotated[
        bool, typer.Option("--watch", help="A live table, until Ctrl-C; with --json a line each second.")
    ] = False,
) -> None:
    """Services and proxies: what was acknowledged, until when it is valid, and what the KEK says."""
    if follow:
        _watch(context.obj)
        return
    show(context, perform(context.obj, "status"), status_text)


def _watch(options: Options) -> None:
    observe.configure_logging(level=logging.CRITICAL)
    socket = options.load().agent.state_dir / SOCKET_NAME
    display: live_status.Display
    if options.as_json:
        display = live_status.JsonLines(sys.stdout)
    elif sys.stdout.isatty():
        is_coloured = "NO_COLOR" not in os.environ
        display = live_status.Screen(sys.stdout, notes=_notes, is_coloured=is_coloured)
    else:
        raise CommandError("--watch draws on a terminal", "add --json, or leave --watch out", ExitCode.USAGE)
    asyncio.run(live_status.watch(lambda: live_status.ask(socket), display, SystemClock()))


def _notes(data: Any) -> list[str]:
    return [
        *(f"rotation: {rotation_text(row)}" for row in data["rotations"]),
        *(f"certificate: {_lifetime_text(row)}" for row in data["ending"]),
    ]


@program.command(name="doctor")
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
        raise api.explain_agent(error) from error


@program.command()
def reinstate(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    restore: Annotated[
        bool,
        typer.Option("--restore", help="An old KEK is back in the HSM: its keys again, if that is proven."),
    ] = False,
    kek_type: KekTypeName = None,
    valid_days: ValidDays = None,
    hsm_label: HsmLabel = None,
    hsm_id: HsmId = None,
    yes: YesFlag = False,
) -> None:
    """After a revocation: a new KEK and new keys. Old objects stay unreadable unless the old KEK returns."""
    options: Options = context.obj
    if restore:
        _restore(context, options, yes=yes)
        return
    if not yes:
        confirm(
            options,
            "A new KEK and new keys will be made. Objects sealed under the revoked KEK stay unreadable:\n"
            + _objects(perform(options, "service_list"))
            + "\nIf the old KEK can come back into the HSM, bring it back and use --restore instead; it can "
            "also come back later.",
            yes=yes,
        )
    result = perform(
        options,
        "reinstate",
        restore=False,
        kek_type=kek_type,
        valid_days=valid_days,
        hsm_label=hsm_label,
        hsm_id=hsm_id,
    )
    show(context, result, lambda data: f"KEK {data['kek']} is in use\n{_outcomes(data)}")


def _restore(context: typer.Context, options: Options, *, yes: bool) -> None:
    if not yes:
        confirm(options, restorable_text(perform(options, "restorable")), yes=yes)
    data: Any = perform(options, "reinstate", restore=True)
    show(context, data, restored_text)
    # One that is not back is none: it may be gone for good.
    problems = [
        f"KEK {one['kek']}: {one['problem'] or str(len(one['failed'])) + ' keys do not open'}"
        for one in data["earlier"]
        if one["back"] and not one["retired"]
    ]
    if problems:
        raise CommandError(
            "; ".join(problems), "mend the cause, then repeat the command: it goes on with what is left"
        )


@kek_app.command("create")
def kek_create(
    context: typer.Context,
    kek_type: KekTypeName = None,
    valid_days: ValidDays = None,
    hsm_label: HsmLabel = None,
    hsm_id: HsmId = None,
) -> None:
    """Make the first KEK in the HSM, where it stays; or adopt one that was made there for Sealgate."""

    def text(data: Any) -> str:
        made = "made" if hsm_label is None else "adopted"
        return (
            f"KEK {data['kek']} {made} in token {data['token_serial']} (label {data['label']}, "
            f"wraps by {data['method']})"
        )

    wish = {"kek_type": kek_type, "valid_days": valid_days, "hsm_label": hsm_label, "hsm_id": hsm_id}
    show(context, perform(context.obj, "kek_create", **wish), text)


@kek_app.command("rotate")
def kek_rotate(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    kek_type: KekTypeName = None,
    valid_days: ValidDays = None,
    hsm_label: HsmLabel = None,
    hsm_id: HsmId = None,
    yes: YesFlag = False,
) -> None:
    """Move every key to a new KEK while the old one works; then destroy the old one. Can be repeated."""
    options: Options = context.obj
    confirm(
        options,
        "Every key will be wrapped by a new KEK, and the old KEK destroyed in the HSM. Backups of the "
        "registry made before that are of no use afterwards: make a new one.",
        yes=yes,
    )
    wish = {"kek_type": kek_type, "valid_days": valid_days, "hsm_label": hsm_label, "hsm_id": hsm_id}
    data: Any = perform(options, "kek_rotate", **wish)

    def text(data: Any) -> str:
        end = "destroyed in the HSM" if data["retired"] else f"STILL in the HSM: {data['problem']}"
        return (
            f"KEK {data['kek']} is in use (label {data['label']}, wraps by {data['method']}); "
            f"{data['moved']} keys moved\nKEK {data['replaced']}: {end}"
        )

    show(context, data, text)
    if data["problem"]:
        raise CommandError(data["problem"], "mend the cause, then repeat `key-agent kek rotate`")


@kek_app.command("status")
def kek_status(context: typer.Context) -> None:
    """What the registry says of the KEK, and a fresh look at it in the HSM."""
    show(context, perform(context.obj, "kek_status"), _kek_text)


@kek_app.command("revoke")
def kek_revoke(context: typer.Context, yes: YesFlag = False) -> None:
    """Take every key back and destroy the KEK in the HSM. What was sealed under it becomes unreadable."""
    options: Options = context.obj
    if not yes:
        confirm(
            options,
            "The KEK will be destroyed in the HSM. Unless a backup of the HSM brings it back, every object "
            "of these services becomes unreadable for ever:\n" + _objects(perform(options, "service_list")),
            yes=yes,
        )
    data: Any = perform(options, "kek_revoke")
    state = "destroyed in the HSM" if data["destroyed"] else "NOT destroyed in the HSM"
    show(context, data, lambda data: f"KEK {data['kek']}: withdrawn, {state}\n{_outcomes(data)}")
    silent = [row["proxy"] for row in data["proxies"] if row["may_hold_keys_until_ms"]]
    if data["problems"]:
        raise CommandError("; ".join(data["problems"]), "mend the cause, then repeat `key-agent kek revoke`")
    if silent:
        raise CommandError(
            f"not confirmed by {', '.join(silent)}: keys may be valid there until the times above",
            "leave `key-agent run` running: it keeps trying until then",
            ExitCode.UNAVAILABLE,
        )


@service_app.command("add")
def service_add(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    service: Annotated[str, typer.Argument(help="SERVICE or TENANT/SERVICE.")],
    proxy: Annotated[str, typer.Option(help="The proxy that hosts it.")],
    certificate: Annotated[Path, typer.Option(help="The service's certificate at that proxy (PEM).")],
    use: Annotated[str, typer.Option(help="What its key is for: data or sign.")] = "data",
    algorithm: Annotated[
        str | None, typer.Option(help="Of a signing key: ES256, PS256, RS256 or EdDSA.")
    ] = None,
) -> None:
    """Provision a network service at a proxy. Its key is made in the HSM, stored wrapped, and pushed.

    With --use sign it gets a signing key, besides its data key if it has one.
    """

    def text(data: Any) -> str:
        key = f"new key {data['new_key']}" if data["new_key"] else "its key exists already"
        return f"{data['service']} at {data['proxy']}: {key}\n{_outcomes(data)}"

    pem = _read(certificate)
    show(
        context,
        perform(
            context.obj,
            "service_add",
            service=service,
            proxy=proxy,
            certificate_pem=pem,
            use=use,
            algorithm=algorithm,
        ),
        text,
    )


@service_app.command("set")
def service_set(
    context: typer.Context,
    service: ServiceName,
    rotate_after_days: Annotated[
        int | None, typer.Option(help="Age at which its keys are followed by new ones; 0: never.")
    ] = None,
) -> None:
    """A service's own settings. Without an option: as the agent's settings say (keys.rotate_after_days)."""

    def text(data: Any) -> str:
        days = data["rotate_after_days"]
        when = "as the agent's settings say" if days is None else f"after {days} days" if days else "never"
        return f"{data['service']}: keys rotate {when}"

    show(
        context,
        perform(context.obj, "service_set", service=service, rotate_after_days=rotate_after_days),
        text,
    )


@service_app.command("list")
def service_list(context: typer.Context) -> None:
    """Network services, their keys and their proxies."""

    def text(data: Any) -> str:
        lines = []
        for row in data["services"]:
            lines.append(
                f"{row['service']}  at {', '.join(p['proxy'] for p in row['proxies']) or 'no proxy'}"
            )
            lines += [
                f"    {key['kid']}  {_use(key)} {key['version']}  {key['state']}" for key in row["keys"]
            ]
        return "\n".join(lines) or "no network services"

    show(context, perform(context.obj, "service_list"), text)


@service_app.command("remove")
def service_remove(
    context: typer.Context,
    service: Annotated[str, typer.Argument(help="SERVICE or TENANT/SERVICE.")],
    proxy: Annotated[str | None, typer.Option(help="Only from this proxy; the keys are kept.")] = None,
    yes: YesFlag = False,
) -> None:
    """Take a service's keys back. Without --proxy they are erased: its objects become unreadable for ever."""
    options: Options = context.obj
    if proxy is None:
        confirm(
            options,
            f"The wrapped keys of {service} will be erased: its objects become unreadable for ever.",
            yes=yes,
        )
    data = perform(options, "service_remove", service=service, proxy=proxy)
    show(context, data, lambda data: f"{data['service']} removed\n{_outcomes(data)}")


# Keys.


@program.command()
def rotate(
    context: typer.Context,
    service: Annotated[str | None, typer.Argument(help="SERVICE or TENANT/SERVICE; or --all.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every service.")] = False,
    use: Annotated[str | None, typer.Option(help="Only keys for: data, sign.")] = None,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Give up a rotation that has activated nothing yet.")
    ] = False,
) -> None:
    """The next key of a service: every proxy learns it first, then it seals and the old one only opens."""
    options: Options = context.obj
    if cancel:
        if service is None or everything:
            raise CommandError("whose rotation?", "name the service", ExitCode.USAGE)
        data = perform(options, "rotate_cancel", service=service)
        show(context, data, lambda data: f"{data['service']}: rotation given up\n{_outcomes(data)}")
        return
    result: Any = perform(options, "rotate", service=service, everything=everything, use=use)

    def text(data: Any) -> str:
        lines = [rotation_text(row) for row in data["rotations"]]
        if not data["running"]:
            lines.append("no agent runs: `key-agent run` goes on with it")
        return "\n".join([*lines, _outcomes(data)])

    show(context, result, text)


@key_app.command("list")
def key_list(context: typer.Context, service: ServiceName) -> None:
    """A service's keys: use, version, state, since when, and which proxies hold each now."""

    def text(data: Any) -> str:
        lines = []
        for key in data["keys"]:
            held = ", ".join(key["held_by"]) or "no proxy"
            why = f" ({key['reason']})" if key["reason"] else ""
            lines.append(
                f"{key['kid']}  {_use(key)} {key['version']}  {key['state']} since "
                f"{_time(key['since_ms'])}{why}  held by {held}"
            )
        return "\n".join(lines) or "no keys"

    show(context, perform(context.obj, "key_list", service=service), text)


@key_app.command("suspend")
def key_suspend(
    context: typer.Context, service: ServiceName, kid: KeyName, reason: ReasonText = None
) -> None:
    """No proxy opens or seals with it until it is resumed."""
    _change(context, "key_suspend", service=service, kid=kid, reason=reason)


@key_app.command("resume")
def key_resume(context: typer.Context, service: ServiceName, kid: KeyName) -> None:
    """Undo a suspension. If another key has become active meanwhile, it opens only."""
    _change(context, "key_resume", service=service, kid=kid)


@key_app.command("deactivate")
def key_deactivate(
    context: typer.Context,
    service: ServiceName,
    kid: KeyName,
    reason: ReasonText = None,
    yes: YesFlag = False,
) -> None:
    """It opens what it sealed and seals no more. `rotate` does that too, and has another one seal."""
    confirm(
        context.obj,
        f"Key {kid} of {service} will seal nothing any more, for good. If it is the active one, nothing is "
        "sealed for this service until `key-agent rotate`.",
        yes=yes,
    )
    _change(context, "key_deactivate", service=service, kid=kid, reason=reason)


@key_app.command("compromise")
def key_compromise(
    context: typer.Context,
    service: ServiceName,
    kid: KeyName,
    reason: ReasonText = None,
    yes: YesFlag = False,
) -> None:
    """Others may know it: no proxy opens or seals with it from now on, and there is no way back."""
    confirm(
        context.obj,
        f"What key {kid} of {service} sealed will not be opened any more, for good. Nothing is erased.",
        yes=yes,
    )
    _change(context, "key_compromise", service=service, kid=kid, reason=reason)


@key_app.command("destroy")
def key_destroy(
    context: typer.Context,
    service: ServiceName,
    kid: KeyName,
    confirm: Annotated[
        str | None, typer.Option(metavar="KID", help="The key id once more, where nobody can be asked.")
    ] = None,
    reason: ReasonText = None,
) -> None:
    """Erase a deactivated or compromised key: what it sealed is unreadable for ever."""
    options: Options = context.obj
    if confirm is None:
        loss: Any = perform(options, "key_loss", service=service, kid=kid)
        confirm = _typed_again(options, loss_text(loss), kid)
    _change(context, "key_destroy", service=service, kid=kid, confirm=confirm, reason=reason)


def _typed_again(options: Options, warning: str, kid: str) -> str:
    """Show what will be lost, and have the key id typed. CommandError if nobody can."""
    if options.as_json or not sys.stdin.isatty():
        raise CommandError(
            warning, f"repeat the command with --confirm {kid}", ExitCode.REFUSED, code="not-confirmed"
        )
    typer.echo(warning, err=True)
    typed = str(typer.prompt("Type the key id to destroy it", err=True)).strip()
    if typed != kid:
        raise CommandError("not confirmed", "nothing was changed", ExitCode.REFUSED, code="not-confirmed")
    return typed


def loss_text(data: Any) -> str:
    """What `key destroy` asks for."""
    active = _time(data["activated_at_ms"]) if data["activated_at_ms"] else "never"
    return (
        f"{data['service']}: {_use(data)} key {data['kid']}, version {data['version']}, {data['state']} "
        f"since {_time(data['since_ms'])}, active from {active}; held by {len(data['held_by'])} proxies "
        "now.\n"
        f"Unreadable for ever: {data['unreadable']}. Backups of registry and keys bring it back nowhere."
    )


def _change(context: typer.Context, operation: str, **arguments: object) -> None:
    def text(data: Any) -> str:
        lines = [f"{data['service']}: key {data['kid']} is {data['state']}, was {data['before']}"]
        if not data["another_seals"]:
            lines.append(f"NOTHING seals for {data['service']}: `key-agent rotate {data['service']}`")
        if not data["running"]:
            lines.append("no agent runs: proxies go on with what they hold until it ends or `key-agent run`")
        return "\n".join([*lines, _outcomes(data)])

    show(context, perform(context.obj, operation, **arguments), text)


def _use(key: Any) -> str:
    return f"sign {key['algorithm']}" if key["use"] == "sign" else str(key["use"])


@proxy_app.command("add")
def proxy_add(
    context: typer.Context,
    proxy: Annotated[str, typer.Argument(metavar="PROXY_ID", help="The proxy's id, as it gives it itself.")],
    url: Annotated[str, typer.Option(help="https://host:port of its push listener.")],
    ca: Annotated[Path, typer.Option(help="Who vouches for its server certificate (PEM).")],
) -> None:
    """Make a proxy known, or change its address or authority."""
    data = perform(context.obj, "proxy_add", proxy=proxy, url=url, ca_pem=_read(ca))
    show(context, data, lambda data: f"proxy {data['proxy']} {'added' if data['new'] else 'changed'}")


@proxy_app.command("list")
def proxy_list(context: typer.Context) -> None:
    """Proxies and the services they host."""

    def text(data: Any) -> str:
        rows = [f"{row['proxy']}  {row['url']}  {', '.join(row['services'])}" for row in data["proxies"]]
        return "\n".join(rows) or "no proxies"

    show(context, perform(context.obj, "proxy_list"), text)


@proxy_app.command("remove")
def proxy_remove(context: typer.Context, proxy: Annotated[str, typer.Argument(metavar="PROXY_ID")]) -> None:
    """Take every key back from a proxy and push nothing to it any more."""
    data = perform(context.obj, "proxy_remove", proxy=proxy)
    show(context, data, lambda data: f"proxy {data['proxy']} removed\n{_outcomes(data)}")


# Backups.


@backup_app.command("export")
def backup_export(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it; must not exist.")],
) -> None:
    """Write wrapped keys, states, services and proxies to FILE, encrypted: it needs the HSM to be read."""
    if file.exists():
        raise CommandError(f"{file} exists and is not overwritten", "name another file", ExitCode.REFUSED)
    data: Any = perform(context.obj, "backup_export")
    content = base64.b64decode(data.pop("content_base64"))
    try:
        write_new_file(file, content)
    except OSError as error:
        raise CommandError(
            f"{file}: {error.strerror}", "name a file in a directory that you may write"
        ) from None
    data["file"] = str(file)
    show(
        context,
        data,
        lambda data: (
            f"{data['file']}: {data['keys']} keys of {data['services']} services, {data['bytes']} bytes\n"
            f"It opens only where KEK {data['kek']} is in the HSM. Keep it apart from the HSM's own backup."
        ),
    )


@backup_app.command("import")
def backup_import(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `backup export` wrote.")],
    trial: Annotated[
        bool, typer.Option("--try", help="Only verify it, and say what an import would do.")
    ] = False,
) -> None:
    """Fill what is missing here. What exists stays as it is, what is destroyed stays destroyed."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}", "give a file that you may read") from None
    data = perform(
        context.obj, "backup_import", content_base64=base64.b64encode(content).decode(), trial=trial
    )
    show(context, data, imported_text)


def imported_text(data: Any) -> str:
    """What `backup import` did, or with `--try` would do."""
    would = "would be " if data["trial"] else ""
    lines = [
        f"backup of {_time(data['made_at_ms'])}, every wrap opened in the HSM where its KEK is there",
        f"{len(data['keys'])} keys {would}added, {len(data['wraps'])} wraps {would}restored",
        f"{len(data['services'])} services, {len(data['proxies_added'])} proxies {would}added",
    ]
    lines += [f"KEK {kek_id} {would}added" for kek_id in data["keks"]]
    lines += [f"KEK {kek_id} is not in the HSM: {why}" for kek_id, why in data["absent_keks"].items()]
    if data["waiting"]:
        lines.append(
            f"{len(data['waiting'])} keys wait for their KEK: bring it back, then "
            "`key-agent reinstate --restore`"
        )
    lines += [f"{kid} {would}{state}: the backup knew that" for kid, state in data["ended"].items()]
    lines += [f"{kid} stays: {why}" for kid, why in data["kept"].items()]
    lines += [f"{kid} is NOT taken: {why}" for kid, why in data["refused"].items()]
    return "\n".join([*lines, _outcomes(data)])


# What people read.


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except UnicodeDecodeError:
        raise CommandError(f"{path}: not PEM", "give a certificate in PEM form", ExitCode.REFUSED) from None


def _objects(listed: Any) -> str:
    rows = [
        f"  {row['service']} ({sum(key['state'] != 'destroyed' for key in row['keys'])} keys)"
        for row in listed["services"]
    ]
    return "\n".join(rows) or "  (there are no services)"


def restorable_text(data: Any) -> str:
    """What `reinstate --restore` asks a yes for."""
    lines = []
    if data["restores_current"]:
        lines.append(
            f"The revoked KEK {data['kek']} will be trusted again and its keys pushed to every proxy."
        )
    for one in data["earlier"]:
        objects = "\n".join(f"  {row['service']} ({row['keys']} keys)" for row in one["services"])
        if one["back"]:
            lines.append(
                f"KEK {one['kek']} is back in the HSM. Its keys will be wrapped by KEK {data['kek']} and "
                f"pushed to every proxy, to open only. What they sealed becomes readable again:\n{objects}\n"
                f"Then KEK {one['kek']} is destroyed in the HSM, since nothing needs it any more."
            )
        elif one["spent"]:
            lines.append(f"Nothing is wrapped by KEK {one['kek']} any more: it will be destroyed in the HSM.")
        else:
            lines.append(
                f"KEK {one['kek']} is not back ({one['verdict']}: {one['detail']}). "
                f"Stays unreadable:\n{objects}"
            )
    return "\n".join(lines)


def restored_text(data: Any) -> str:
    """What `reinstate --restore` has done."""
    lines = [f"KEK {data['kek']} is in use"]
    for one in data["earlier"]:
        if not one["back"]:
            lines.append(f"KEK {one['kek']}: {one['problem']}")
            continue
        end = "it is destroyed in the HSM" if one["retired"] else "it is STILL in the HSM"
        end += f" ({one['problem']})" if one["problem"] else ""
        lines.append(f"KEK {one['kek']}: {one['moved']} keys are wrapped by {data['kek']} now; {end}")
        lines += [f"  {row['service']}: {row['keys']} keys open again" for row in one["services"]]
        lines += [f"  {kid} does not open: {reason}" for kid, reason in one["failed"].items()]
    return "\n".join([*lines, _outcomes(data)])


def _outcomes(data: Any) -> str:
    lines = []
    for row in data["proxies"]:
        until_ms = row.get("may_hold_keys_until_ms")
        more = f"; may hold keys until {_time(until_ms)}" if until_ms else ""
        error = f": {row['error']}" if row.get("error") else ""
        lines.append(f"  {row['proxy']}: {row['outcome']}{error}{more}")
    if any(row["outcome"] == "failed" for row in data["proxies"]):
        lines.append("  `key-agent doctor` says how to mend what failed")
    return "\n".join(lines)


def _kek_text(data: Any) -> str:
    if data["kek"] is None:
        return "no KEK yet: `key-agent kek create` makes it"
    kek, found = data["kek"], data["diagnosis"]
    lines = [
        f"KEK {kek['id']}  {kek['state']} since {_time(kek['since_ms'])}",
        f"  token {kek['token_serial']}, label {kek['label']}, wraps by {kek['method']}",
        f"  now: {found['verdict']} ({found['detail']})",
    ]
    for other in data["older"]:
        place = "coming" if other["state"] in ("pre-active", "staged") else "before"
        reason = f" ({other['reason']})" if other["reason"] else ""
        lines.append(f"  {place}: {other['id']}  {other['state']}, label {other['label']}{reason}")
    return "\n".join(lines)


def status_text(data: Any) -> str:
    """The status page of `key-agent status` (docs/key-agent.md explains each line)."""
    found = data["diagnosis"]
    proof = f": {found['verdict']} ({found['detail']})" if found else ""
    kek = data["kek"]
    lines = [
        f"agent {data['agent']} of {data['tenant']}, environment {data['environment']}: "
        + ("running" if data["running"] else "NOT running"),
        f"consent: {data['standing']} since {_time(data['since_ms'])}{proof}",
        f"KEK: {kek['id']} {kek['state']}" if kek else "KEK: none",
    ]
    if (environments := data.get("environments")) is not None and environments["united"]:
        lines += [f"environments: {line}" for line in environments_text(environments).splitlines()]
    lines += [f"problem: {problem}" for problem in data["problems"]]
    lines += [f"rotation: {rotation_text(row)}" for row in data["rotations"]]
    lines += [f"certificate: {_lifetime_text(row)}" for row in data["ending"]]
    proxies = {proxy["proxy"] for proxy in data["proxies"]}
    for service in data["services"]:
        lost = f", {service['unreadable_keys']} under a lost KEK" if service["unreadable_keys"] else ""
        lines.append(f"{service['service']}  ({service['keys']} keys{lost})")
        lines += [
            f"  {_place_text(place)}"
            for place in service["proxies"]
            if place["state"] != "withdrawn" or place["proxy"] in proxies  # one that was removed is no news
        ]
    lines += [
        f"proxy {proxy['proxy']}  {proxy['url']}  last push: {_push_text(proxy)}" for proxy in data["proxies"]
    ]
    return "\n".join(lines)


def rotation_text(row: Any) -> str:
    """Where a rotation stands, in one line."""
    text = (
        f"{row['service']} ({row['use']}) to {row['new_kid']}: {row['phase']} since {_time(row['since_ms'])}"
    )
    if row["waiting_for"]:
        text += f"; waits for {', '.join(row['waiting_for'])}, until {_time(row['until_ms'])} at most"
    if row["late"]:
        text += f"; activated without {', '.join(row['late'])}"
    return text + (f"; NOT activated: {row['problem']}" if row["problem"] else "")


def _lifetime_text(row: Any) -> str:
    name = row["kind"] if row["name"] == row["kind"] else f"{row['kind']} {row['name']}"
    if row["problem"]:
        return f"{name}: {row['problem']}"
    if row["days_left"] is None:
        return f"{name}: nobody can tell when it ends"
    end = row["not_after"][:10]
    return (
        f"{name}: EXPIRED {end}"
        if row["days_left"] < 0
        else f"{name}: ends {end}, in {row['days_left']:.0f} days"
    )


def _place_text(place: Any) -> str:
    match place["state"]:
        case "valid":
            text = (
                f"valid for {place['valid_for_s']:.0f} s, acknowledged {_time(place['acknowledged_at_ms'])}"
            )
        case "expired":
            text = f"EXPIRED {_time(place['valid_until_ms'])}"
        case "withdrawing":
            text = f"WITHDRAWING, unconfirmed; silent from {_time(place['may_hold_keys_until_ms'])}"
        case "withdrawn":
            text = f"withdrawn {_time(place['withdrawn_at_ms'])}" if place["withdrawn_at_ms"] else "withdrawn"
        case _:
            text = "never acknowledged"
    error = f"; last error {_time(place['error_at_ms'])}: {place['error']}" if place["error"] else ""
    return f"{place['proxy']}: {text}{error}"


def _push_text(proxy: Any) -> str:
    silent = ""
    if proxy["answers"] is False:
        silent = f"; not answering since {_time(proxy['answers_since_ms'])} ({proxy['answers_error']})"
    if proxy["outcome"] is None:
        return f"none since the agent started{silent}"
    error = f" ({proxy['error']}; {proxy['failures_in_a_row']} in a row)" if proxy["error"] else ""
    return f"{proxy['outcome']} {_time(proxy['last_push_at_ms'])}{error}{silent}"


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


if __name__ == "__main__":
    main()
