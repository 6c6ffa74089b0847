"""`sealgate azure-credential`: the keys of storage accounts, with which SharedKey is verified and made anew.

1. As in proxy/vault/cli.py: secrets come from a file or standard input, and no command shows one again; one
   that is drawn here is printed once, or written to a new file of mode 0600.
2. A *gateway key* is good at this proxy alone: clients sign with it, the service gets the account's own.
"""

import base64
import re
import secrets
from datetime import datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from proxy.command_line.operating import operating, parse_owner
from proxy.profiles.azure_signatures import KEY_SIZE, parse_key
from proxy.tenants.vault_store import remove_credential
from proxy.vault.cli import STDIN, Drawn, check_new_file, hand_over, keep, read_secret, tell_all, tell_kept
from proxy.vault.model import Secrets
from runtime.cli import CommandError, ExitCode

azure_credential_app = typer.Typer(
    no_args_is_help=True,
    help="Storage accounts' keys: what Azure clients sign with, and what leaves is signed with.",
)
_COMMAND: Final = "azure-credential"
_ACCOUNT: Final = re.compile(r"[a-z0-9]{3,24}")

ServiceName = Annotated[
    str, typer.Argument(metavar="TENANT/SERVICE", help="A network service of profile azure-blob.")
]
Account = Annotated[str, typer.Argument(metavar="ACCOUNT", help="The storage account's name.")]


@azure_credential_app.command(
    "add", epilog="Example: sealgate azure-credential add acme/blobs mystorage --key-file key.txt"
)
def add(  # noqa: PLR0917 - typer calls it by name
    context: typer.Context,
    service: ServiceName,
    account: Account,
    key_file: Annotated[
        Path, typer.Option("--key-file", help="The account's key, as Azure shows it (base64); - reads stdin.")
    ],
    generate: Annotated[
        bool, typer.Option("--generate", help="Draw a key for clients: it is good at this proxy alone.")
    ] = False,
    generated_key_file: Annotated[
        Path | None, typer.Option("--write-key-file", help="Write the drawn key to this new file (0600).")
    ] = None,
    not_after: Annotated[
        datetime | None, typer.Option("--not-after", formats=["%Y-%m-%d"], help="Its last day (UTC).")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="In place of the one there is for this account.")
    ] = False,
) -> None:
    """Let an account's signed requests in; they are signed anew with the same key, or behind a drawn one."""
    if generated_key_file is not None and not generate:
        raise CommandError("--write-key-file is for a drawn key", "give --generate too", ExitCode.USAGE)
    if not _ACCOUNT.fullmatch(account):
        raise CommandError(
            f"not a storage account's name: {account!r}",
            "3 to 24 lower-case letters and digits are",
            ExitCode.USAGE,
        )
    check_new_file(generated_key_file, option="--write-key-file")
    its_key = _key(key_file)
    drawn = base64.b64encode(secrets.token_bytes(KEY_SIZE)).decode() if generate else None
    kept = Secrets(client_secret=drawn or its_key, upstream_secret=None if drawn is None else its_key)
    with operating(context) as operator:
        entry = keep(operator, service, account, kept, command=_COMMAND, not_after=not_after, replace=replace)
        if drawn is None:
            tell_kept(operator, service, entry)
            return
        hand_over(
            operator,
            service,
            entry,
            Drawn(secret=drawn, command=_COMMAND, word="key", label="account"),
            generated_key_file,
        )


@azure_credential_app.command("list", epilog="Example: sealgate azure-credential list acme/blobs")
def list_(context: typer.Context, service: ServiceName) -> None:
    """The accounts, without their keys."""
    tell_all(context, service)


@azure_credential_app.command(
    "remove", epilog="Example: sealgate azure-credential remove acme/blobs mystorage"
)
def remove(context: typer.Context, service: ServiceName, account: Account) -> None:
    """Requests of this account are not signed anew any more, once the proxy has read the directory."""
    with operating(context) as operator:
        remove_credential(operator.store, parse_owner(service), account, actor=operator.actor)
        operator.say({"changed": True, "removed": account}, f"{account} removed from {service}")


def _key(file: Path) -> str:
    """CommandError, which names the file alone, if there is no account key in it."""
    text = (read_secret(file) or "").strip()
    try:
        parse_key(text)
    except ValueError as error:
        where = "standard input" if file == STDIN else str(file)
        raise CommandError(
            f"{where} holds no account key: {error}",
            "give the key as Azure shows it: 88 letters of base64",
            ExitCode.USAGE,
        ) from None
    return text
