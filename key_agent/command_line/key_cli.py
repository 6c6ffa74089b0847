"""`key-agent rotate` and `key-agent key`: keys of network services, and their states.

To destroy a key its id is typed once more: nothing brings back what it sealed.
"""

import sys
from typing import Annotated, Any

import typer

from key_agent.command_line.performing import Options, YesFlag, confirm, perform, show
from key_agent.command_line.service_cli import ServiceName
from key_agent.command_line.status_cli import rotation_text
from key_agent.command_line.wording import counted, outcomes_text, time_text, use_text
from runtime.cli import CommandError, ExitCode

key_app = typer.Typer(no_args_is_help=True, help="Keys of network services, and their states.")


KeyName = Annotated[str, typer.Argument(metavar="KID", help="The key id in hex: `key list` shows it.")]
ReasonText = Annotated[str | None, typer.Option("--reason", help="Why, for the list and the audit log.")]


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
        show(context, data, lambda data: f"{data['service']}: rotation given up\n{outcomes_text(data)}")
        return
    result: Any = perform(options, "rotate", service=service, everything=everything, use=use)

    def text(data: Any) -> str:
        lines = [rotation_text(row) for row in data["rotations"]]
        if not data["running"]:
            lines.append("no agent runs: `key-agent run` goes on with it")
        return "\n".join([*lines, outcomes_text(data)])

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
                f"{key['kid']}  {use_text(key)} {key['version']}  {key['state']} since "
                f"{time_text(key['since_ms'])}{why}  held by {held}"
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
    active = time_text(data["activated_at_ms"]) if data["activated_at_ms"] else "never"
    return (
        f"{data['service']}: {use_text(data)} key {data['kid']}, version {data['version']}, {data['state']} "
        f"since {time_text(data['since_ms'])}, active from {active}; held by "
        f"{counted(len(data['held_by']), 'proxy', 'proxies')} now.\n"
        f"Unreadable for ever: {data['unreadable']}. Backups of registry and keys bring it back nowhere."
    )


def _change(context: typer.Context, operation: str, **arguments: object) -> None:
    def text(data: Any) -> str:
        lines = [f"{data['service']}: key {data['kid']} is {data['state']}, was {data['before']}"]
        if not data["another_seals"]:
            lines.append(f"NOTHING seals for {data['service']}: `key-agent rotate {data['service']}`")
        if not data["running"]:
            lines.append("no agent runs: proxies go on with what they hold until it ends or `key-agent run`")
        return "\n".join([*lines, outcomes_text(data)])

    show(context, perform(context.obj, operation, **arguments), text)
