"""`key-agent proxy`: where keys are pushed to."""

from pathlib import Path
from typing import Annotated, Any

import typer

from key_agent.command_line.performing import perform, read_pem, show
from key_agent.command_line.wording import outcomes_text

proxy_app = typer.Typer(no_args_is_help=True, help="Proxies: where keys are pushed to.")


@proxy_app.command("add")
def proxy_add(
    context: typer.Context,
    proxy: Annotated[str, typer.Argument(metavar="PROXY_ID", help="The proxy's id, as it gives it itself.")],
    url: Annotated[str, typer.Option(help="https://host:port of its push listener.")],
    ca: Annotated[Path, typer.Option(help="Who vouches for its server certificate (PEM).")],
) -> None:
    """Make a proxy known, or change its address or authority."""
    data = perform(context.obj, "proxy_add", proxy=proxy, url=url, ca_pem=read_pem(ca))
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
    show(context, data, lambda data: f"proxy {data['proxy']} removed\n{outcomes_text(data)}")
