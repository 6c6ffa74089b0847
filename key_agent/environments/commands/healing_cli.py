"""Healing's part of `key-agent env`: given up, made sound, taken back (docs/runbooks.md).

1. To give an environment up asks nothing and needs no manager. To take it back has an order, and each command
   says what it waits for.
"""

from typing import Annotated, Any

import typer

from key_agent.command_line.performing import perform, show
from key_agent.environments.commands.cli import environment_app
from runtime.cli import CommandError, ExitCode

EnvironmentName = Annotated[str, typer.Argument(metavar="ENVIRONMENT", help="Its id.")]


@environment_app.command("declare")
def env_declare(context: typer.Context, reason: Annotated[str, typer.Option(help="What was seen.")]) -> None:
    """Give this environment up, here and now: no manager is needed, everybody who hears it acts on it."""
    data = perform(context.obj, "env_declare", reason=reason)
    show(context, data, lambda data: f"{data['environment']} acts as {data['state']}: {data['reason']}")


@environment_app.command("new-kek")
def env_new_kek(
    context: typer.Context,
    kek_type: Annotated[str | None, typer.Option("--type", help="aes-256, rsa-3072 or ec-p256.")] = None,
    valid_days: Annotated[int | None, typer.Option(help="It ends so many days from now.")] = None,
    hsm_label: Annotated[str | None, typer.Option(help="Adopt the key of this label; with --hsm-id.")] = None,
    hsm_id: Annotated[str | None, typer.Option(help="CKA_ID in hex of the key to adopt.")] = None,
) -> None:
    """Make a new KEK for this environment while it heals; keys come under it when it rejoins."""
    data = perform(
        context.obj,
        "env_new_kek",
        kek_type=kek_type,
        valid_days=valid_days,
        hsm_label=hsm_label,
        hsm_id=hsm_id,
    )
    show(
        context,
        data,
        lambda data: (
            f"KEK {data['kek']} ({data['type']}) made\nfingerprint {data['fingerprint']}: for "
            f"`key-agent env heal-complete {data['environment']} --kek ...` at the manager"
        ),
    )


@environment_app.command("heal-complete")
def env_heal_complete(
    context: typer.Context,
    environment: EnvironmentName,
    attest: Annotated[str, typer.Option(help="The change that made it sound, for the rows and the log.")],
    new_certs: Annotated[
        bool, typer.Option("--new-certs", help="Its certificates and keys were exchanged.")
    ] = False,
    kek: Annotated[
        str | None, typer.Option(help="The new KEK's fingerprint, as `env new-kek` printed it there.")
    ] = None,
) -> None:
    """State that an environment is sound again. Nothing is stored there before `env rejoin`."""
    data = perform(
        context.obj,
        "env_heal_complete",
        environment=environment,
        attestation=attest,
        new_certificates=new_certs,
        kek=kek,
    )
    show(context, data, lambda data: f"{data['environment']}: {data['state']}")


@environment_app.command("rejoin")
def env_rejoin(
    context: typer.Context,
    environment: EnvironmentName,
    patience_s: Annotated[float, typer.Option(help="For how long the load balancers are waited for.")] = 30.0,
) -> None:
    """Confirmed by the load balancers, every key stored and proven there, a canary, active."""
    data: Any = perform(context.obj, "env_rejoin", environment=environment, patience_s=patience_s)

    def text(data: Any) -> str:
        lines = [f"{data['environment']}: {data['state']}"]
        lines += [f"  {name}: {why}" for name, why in data["problems"].items()]
        return "\n".join(lines)

    show(context, data, text)
    if data["problems"]:
        raise CommandError(
            f"{len(data['problems'])} things could not be proven at {environment}: it heals again",
            "mend them, then `key-agent env heal-complete` and `env rejoin`",
            ExitCode.FAILED,
            code="not-proven",
        )
