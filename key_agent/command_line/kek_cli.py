"""`key-agent kek`: the key-encryption key in the HSM, made, moved from, looked at, revoked."""

from typing import Annotated, Any

import typer

from key_agent.command_line.performing import Options, YesFlag, confirm, perform, show
from key_agent.command_line.wording import counted, objects_text, outcomes_text, time_text
from runtime.cli import CommandError, ExitCode

kek_app = typer.Typer(no_args_is_help=True, help="The key-encryption key in the HSM.")


KekTypeName = Annotated[
    str | None, typer.Option("--type", help="aes-256, rsa-3072 or ec-p256. Default: the first that works.")
]
ValidDays = Annotated[int | None, typer.Option(help="The KEK ends so many days from now. Default: never.")]
HsmLabel = Annotated[
    str | None, typer.Option(help="Adopt the key of this label that the HSM's owner made; with --hsm-id.")
]
HsmId = Annotated[str | None, typer.Option(help="CKA_ID in hex of the key to adopt.")]


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
            f"{counted(data['moved'], 'key')} moved\nKEK {data['replaced']}: {end}"
        )

    show(context, data, text)
    if data["problem"]:
        raise CommandError(data["problem"], "mend the cause, then repeat `key-agent kek rotate`")


@kek_app.command("status")
def kek_status(context: typer.Context) -> None:
    """What the registry says of the KEK, and a fresh look at it in the HSM."""
    show(context, perform(context.obj, "kek_status"), kek_text)


@kek_app.command("revoke")
def kek_revoke(context: typer.Context, yes: YesFlag = False) -> None:
    """Take every key back and destroy the KEK in the HSM. What was sealed under it becomes unreadable."""
    options: Options = context.obj
    if not yes:
        confirm(
            options,
            "The KEK will be destroyed in the HSM. Unless a backup of the HSM brings it back, every object "
            "of these services becomes unreadable for ever:\n"
            + objects_text(perform(options, "service_list")),
            yes=yes,
        )
    data: Any = perform(options, "kek_revoke")
    state = "destroyed in the HSM" if data["destroyed"] else "NOT destroyed in the HSM"
    show(context, data, lambda data: f"KEK {data['kek']}: withdrawn, {state}\n{outcomes_text(data)}")
    silent = [row["proxy"] for row in data["proxies"] if row["may_hold_keys_until_ms"]]
    if data["problems"]:
        raise CommandError("; ".join(data["problems"]), "mend the cause, then repeat `key-agent kek revoke`")
    if silent:
        raise CommandError(
            f"not confirmed by {', '.join(silent)}: keys may be valid there until the times above",
            "leave `key-agent run` running: it keeps trying until then",
            ExitCode.UNAVAILABLE,
        )


def kek_text(data: Any) -> str:
    if data["kek"] is None:
        return "no KEK yet: `key-agent kek create` makes it"
    kek, found = data["kek"], data["diagnosis"]
    lines = [
        f"KEK {kek['id']}  {kek['state']} since {time_text(kek['since_ms'])}",
        f"  token {kek['token_serial']}, label {kek['label']}, wraps by {kek['method']}",
        f"  now: {found['verdict']} ({found['detail']})",
    ]
    for other in data["older"]:
        place = "coming" if other["state"] in ("pre-active", "staged") else "before"
        reason = f" ({other['reason']})" if other["reason"] else ""
        lines.append(f"  {place}: {other['id']}  {other['state']}, label {other['label']}{reason}")
    return "\n".join(lines)
