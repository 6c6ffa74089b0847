"""`sealgate inspect`: what can be said of stored bytes without a key."""

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from envelope.inspect import Description, Kind, describe
from proxy.command_line.operating import options_of
from runtime.cli import ExitCode

_INSPECTED_BYTES: Final = 1 << 20
_TAIL_BYTES: Final = 16


def inspect(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A stored object or field.")],
) -> None:
    """Say what can be said of stored bytes without a key; exit code 3 if they are damaged."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        data = stream.read(_INSPECTED_BYTES)
        stream.seek(max(0, size - _TAIL_BYTES))
        tail = stream.read(_TAIL_BYTES)
    description = describe(data, stored_bytes=max(size, len(data)), tail=tail)
    options_of(context).emit(_description_json(description), lambda: _description_text(description))
    if description.problems:
        raise typer.Exit(ExitCode.REFUSED)


def _description_json(description: Description) -> dict[str, object]:
    return {
        "kind": description.kind.value,
        "stored_bytes": description.stored_bytes,
        "version": description.version,
        "suite": description.suite,
        "key_id": None if description.key_id is None else str(description.key_id),
        "bind": None if description.bind is None else description.bind.name.lower(),
        "plain_bytes": description.plain_bytes,
        "parts": description.parts,
        "problems": list(description.problems),
        "authenticated": False,
    }


def _description_text(description: Description) -> str:
    facts = _description_json(description)
    if description.kind is Kind.PLAIN:
        lines = ["not sealed by Sealgate", f"  stored_bytes {description.stored_bytes}"]
    else:
        lines = [f"sealed {description.kind.value} (nothing below is authenticated: that needs the key)"]
        names = ("version", "suite", "key_id", "bind", "stored_bytes", "plain_bytes", "parts")
        lines += [f"  {name} {facts[name]}" for name in names if facts[name] is not None]
    return "\n".join(lines + [f"  problem: {problem}" for problem in description.problems])
