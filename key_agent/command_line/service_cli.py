"""`key-agent service`: network services at proxies, what keys are made for."""

from pathlib import Path
from typing import Annotated, Any

import typer

from key_agent.command_line.performing import Options, YesFlag, confirm, perform, read_pem, show
from key_agent.command_line.wording import outcomes_text, use_text

service_app = typer.Typer(no_args_is_help=True, help="Network services: what keys are made for.")


ServiceName = Annotated[str, typer.Argument(metavar="SERVICE", help="SERVICE or TENANT/SERVICE.")]


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
        key = f"new key {data['new_key']}" if data["new_key"] else "with the keys that the service has"
        return f"{data['service']} at {data['proxy']}: {key}\n{outcomes_text(data)}"

    pem = read_pem(certificate)
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
                f"    {key['kid']}  {use_text(key)} {key['version']}  {key['state']}" for key in row["keys"]
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
    show(context, data, lambda data: f"{data['service']} removed\n{outcomes_text(data)}")
