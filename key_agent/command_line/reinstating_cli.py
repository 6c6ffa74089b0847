"""`key-agent reinstate`: after a revocation a new KEK and new keys, or an old KEK that is back.

What makes objects unreadable, or readable again, is named before the yes.
"""

from typing import Annotated, Any

import typer

from key_agent.command_line.kek_cli import HsmId, HsmLabel, KekTypeName, ValidDays
from key_agent.command_line.performing import Options, YesFlag, confirm, perform, show
from key_agent.command_line.wording import counted, objects_text, outcomes_text
from runtime.cli import CommandError


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
            + objects_text(perform(options, "service_list"))
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
    show(context, result, lambda data: f"KEK {data['kek']} is in use\n{outcomes_text(data)}")


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


def restorable_text(data: Any) -> str:
    """What `reinstate --restore` asks a yes for."""
    lines = []
    if data["restores_current"]:
        lines.append(
            f"The revoked KEK {data['kek']} will be trusted again and its keys pushed to every proxy."
        )
    for one in data["earlier"]:
        objects = "\n".join(f"  {row['service']} ({counted(row['keys'], 'key')})" for row in one["services"])
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
        lines.append(f"KEK {one['kek']}: {counted(one['moved'], 'key')} moved to {data['kek']}; {end}")
        lines += [f"  {row['service']}: open again: {counted(row['keys'], 'key')}" for row in one["services"]]
        lines += [f"  {kid} does not open: {reason}" for kid, reason in one["failed"].items()]
    return "\n".join([*lines, outcomes_text(data)])
