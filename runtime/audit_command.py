"""`audit verify`, of both programs: whether an audit log's chain holds, and where it stands.

1. It only reads, also beside the process that writes the log.
2. The chain has no key and a cut end leaves it whole (envelope/audit.py rule 3): the head that is printed,
   kept elsewhere, is what `--expect` proves the log against later.
3. Of a program that runs as several processes every process has a log: all of them are verified. `--expect`
   is about the first, or the one named by `--file`.
4. All files of a log that are there are one chain. `--file` may name a closed one, which stands for itself.
5. Exit code 3 for a broken chain, with its first wrong line; 2 if there is no such file.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from envelope.audit import BrokenChainError, Head, parse_head
from envelope.errors import FormatError
from runtime.audit import mend_broken
from runtime.audit_files import read_files
from runtime.cli import CommandError, ExitCode, Options


def add_audit[S](
    program: typer.Typer,
    *,
    audit_file: Callable[[S], Path],
    more_files: Callable[[S], Sequence[Path]] = lambda _settings: (),
) -> None:
    """Add the commands to *program*. *audit_file*: where its settings say that the log is.

    *more_files*: the logs of further processes, verified with it.
    """
    commands = typer.Typer(no_args_is_help=True, help="The audit log: a hash chain of events.")
    program.add_typer(commands, name="audit")

    @commands.callback()
    def audit() -> None:
        """Keeps `verify` a command of its own."""

    @commands.command("verify", epilog=f"Example: {program.info.name} audit verify --json")
    def verify(
        context: typer.Context,
        file: Annotated[
            Path | None, typer.Option("--file", metavar="FILE", help="Another log than the configured one.")
        ] = None,
        expect: Annotated[
            str | None,
            typer.Option("--expect", metavar="SEQ:HASH", help="A head recorded earlier: must be in it."),
        ] = None,
    ) -> None:
        """Verify the log and print its head, to be recorded elsewhere; exit code 3 if it is broken."""
        options: Options[S] = context.obj
        expected = None if expect is None else _head(expect)
        more: Sequence[Path] = ()
        if file is None:
            settings = options.load()
            file, more = audit_file(settings), more_files(settings)
        data = _verified(file, expected)
        text = _told(data) + (f"\n  {expect} is in it" if expect is not None else "")
        if more:
            others = [_verified(path, None) for path in more]
            data["more"] = others
            text = "\n".join([text, *map(_told, others)])
        options.emit(data, text)


def _told(data: Mapping[str, object]) -> str:
    text = f"{data['file']}: {data['events']} events, chain holds\n  head {data['head']}"
    if not data["events"]:
        text += "\n  empty: whether it was cut to nothing only a recorded head can tell (--expect)"
    if data["torn_bytes"]:
        text += f"\n  {data['torn_bytes']} bytes of a torn last line"
    if closed := data.get("closed"):
        text += f"\n  closed files: {closed}"
    if begins := data.get("begins_after"):
        text += f"\n  begins after event {begins}: the files before it are elsewhere"
    return text


def _head(text: str) -> Head:
    try:
        return parse_head(text)
    except FormatError as error:
        raise CommandError(
            f"--expect: {error}", "give a head as `audit verify` printed it", ExitCode.USAGE
        ) from None


def _verified(path: Path, expected: Head | None) -> dict[str, object]:
    try:
        files = read_files(path, expected=expected)
    except OSError as error:
        raise CommandError(
            f"{path}: {error.strerror}", "give the log's file, as a user who may read it", ExitCode.USAGE
        ) from None
    except BrokenChainError as error:
        raise CommandError(
            f"{path} is broken at {error}", mend_broken(path), ExitCode.REFUSED, code="audit-broken"
        ) from None
    head = files.written.head
    data: dict[str, object] = {
        "file": str(path), "events": head.seq, "head": str(head), "torn_bytes": len(files.written.torn)
    }  # fmt: skip
    if files.closed:
        data["closed"] = len(files.closed)
    if files.start.seq:
        data["begins_after"] = str(files.start)
    return data
