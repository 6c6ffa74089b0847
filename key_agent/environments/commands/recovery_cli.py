"""`key-agent env recovery`, `recover`, `new-registry-key`: who comes back first (docs/runbooks.md).

1. The file is signed as a promotion is: by `key-agent env sign`, on machines of the administrators.
2. What is lost is said before anybody signs, by its name.
"""

from typing import Annotated, Any

import typer

from key_agent.command_line.performing import confirm, perform, show
from key_agent.command_line.wording import counted
from key_agent.environments.commands.cli import (
    NewFile,
    WrittenFile,
    digest_text,
    environment_app,
    read_to_sign,
    spread_text,
    write_to_sign,
)


@environment_app.command("recovery")
def recovery(
    context: typer.Context,
    file: NewFile,
    old_kek: Annotated[
        str | None,
        typer.Option(help="The KEK of before that its keys come from. Default: the newest one that works."),
    ] = None,
    lost: Annotated[
        bool, typer.Option("--lost", help="Every KEK of every environment is gone: its keys are given up.")
    ] = False,
) -> None:
    """Write FILE, for two administrators to sign (`env sign`): that this environment comes back first.

    For when every environment is breached: docs/runbooks.md.
    """
    data: Any = perform(context.obj, "env_recovery", old_kek=old_kek, lost=lost)
    write_to_sign(file, data)

    def text(data: Any) -> str:
        source = "no KEK of before" if data["old_kek"] is None else f"KEK {data['old_kek']}"
        lines = [
            f"{data['environment']} comes back first: {counted(data['kept'], 'key')}, from {source}",
            f"KEK {data['new_kek']}, fingerprint {data['kek_fingerprint']}",
            f"registry key, fingerprint {data['registry_fingerprint']}",
            f"registry at epoch {data['epoch']}, {digest_text(data['digest'])}",
        ]
        lines += [
            f"{name} claims epoch {epoch}: what is newer there is lost; recover that one if you can"
            for name, epoch in data["newer"].items()
        ]
        if data["lost"]:
            lines.append(
                f"LOST FOR EVER, {counted(len(data['lost']), 'key')}, and with them what they have sealed:"
            )
            lines += [f"  {one['kid']}  {one['service']}  {one['state']}" for one in data["lost"]]
            lines.append("they have to be ended before it can return: `key-agent keys retire --accept-loss`")
        lines.append(
            f"{file}: two administrators sign it, `key-agent env sign {file} --admin NAME --key FILE`; then "
            f"`key-agent env recover {file}` here"
        )
        return "\n".join(lines)

    shown = {name: value for name, value in data.items() if name != "asked"}
    show(context, {"file": str(file), **shown}, text)


@environment_app.command("recover")
def recover(
    context: typer.Context,
    file: WrittenFile,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """This environment comes back first, by what two administrators have signed in FILE; it leads then."""
    data, _ = read_to_sign(file)
    confirm(
        context.obj,
        "No environment counts. This one will be the manager's, and the others take over what it has.",
        yes=yes,
    )
    result = perform(context.obj, "env_recover", approval=data["approval"], asked=data["asked"])

    def text(data: Any) -> str:
        lines = [
            f"{data['environment']} is the manager's environment, term {data['term']}; it heals as before",
            spread_text(data),
            f"next: `key-agent env heal-complete {data['environment']} --attest ... --new-certs --kek ...`",
            f"then: `key-agent env rejoin {data['environment']}`",
        ]
        return "\n".join(line for line in lines if line)

    show(context, result, text)


@environment_app.command("new-registry-key")
def new_registry_key(context: typer.Context) -> None:
    """Make another registry key: the breached agent's may be in other hands. Used from its next start on."""
    show(
        context,
        perform(context.obj, "env_new_registry_key"),
        lambda data: (
            f"fingerprint {data['fingerprint']}\nrestart the agent; then `key-agent env recovery FILE` here"
        ),
    )
