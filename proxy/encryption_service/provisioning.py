"""What commands of the encryption service have in common: arguments, and how soon a change is heeded.

1. As in proxy/cli.py: the directory is changed whether the proxy runs or not, doing again what is there
   changes nothing, removing what is not there fails.
2. A running proxy takes a change over within `proxy.reload_s`; every answer says so (`effective_within_s`).
"""

from collections.abc import Callable
from typing import Annotated

import typer

from proxy.command_line.operating import Operator
from proxy.encryption_service.model import DialectName, Op

TenantName = Annotated[str, typer.Argument(metavar="TENANT", help="Tenant id.")]
OnlyTenant = Annotated[str | None, typer.Option("--tenant", metavar="TENANT", help="Of this tenant only.")]
Dialect = Annotated[DialectName, typer.Argument(metavar="DIALECT", help="native, xks, transit or kacls.")]
Operations = Annotated[
    list[Op] | None, typer.Option("--operation", help="Allow this operation only; repeatable. Default: all.")
]


def say_effective(operator: Operator, data: dict[str, object], text: Callable[[], str] | str) -> None:
    """Say *data*, with the revision, and how soon a running proxy heeds it."""
    within_s = operator.settings.proxy.reload_s
    facts = {"revision": operator.store.revision(), "effective_within_s": within_s}
    written = text if isinstance(text, str) else text()
    operator.say({**data, **facts}, f"{written}\na running proxy heeds it within {within_s:g} s")
