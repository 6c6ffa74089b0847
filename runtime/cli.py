"""Plumbing of both commands: results, errors and exit codes that scripts can rely on.

1. Results go to stdout, text or with `--json` one JSON document; errors and logs go to stderr.
2. An error names the cause and the next step, with `--json` as `{"error": {"code", "cause", "next_step",
   "exit_code"}}` on stderr, so that stdout holds a result or nothing.
3. Exit codes are stable:
       0 OK            done
       1 FAILED        tried and failed
       2 USAGE         the command line or the configuration is wrong; nothing was tried
       3 REFUSED       a rule forbids it (bad certificate, revoked KEK, damaged object)
       4 UNAVAILABLE   something needed is not there now (HSM, proxy, database, audit log); worth trying again
   and, as with every program, 130 after Ctrl-C.
4. No traceback reaches the user: of an unexpected error the type and place are shown, not the text, which
   nobody has checked for secrets. `SEALGATE_TRACEBACK=1` prints the traceback for developers.
5. Options of the whole program (`--json`, `--config FILE`, `--check-config`, `--version`) may stand before or
   after the subcommand.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from envelope.certificates import CertificateError
from envelope.errors import EnvelopeError, FormatError, IntegrityError, KeyUnavailableError, SealgateError
from runtime.audit import AuditUnavailableError
from runtime.settings import SettingsError


class ExitCode(IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 3
    UNAVAILABLE = 4


class CommandError(Exception):
    """Ends a command: what went wrong, what to do next, with which exit code."""

    def __init__(
        self, cause: str, next_step: str, exit_code: ExitCode = ExitCode.FAILED, *, code: str | None = None
    ) -> None:
        super().__init__(cause)
        self.cause = cause
        self.next_step = next_step
        self.exit_code = exit_code
        self.code = code or exit_code.name.lower()

    def as_json(self) -> dict[str, object]:
        return {
            "error": {
                "code": self.code,
                "cause": self.cause,
                "next_step": self.next_step,
                "exit_code": int(self.exit_code),
            }
        }

    def as_text(self) -> str:
        return f"error: {self.cause}\n  next: {self.next_step}"


_DISTRIBUTION: Final = "sealgate"  # both programs are of it
_INTERRUPTED: Final = 130  # what typer makes of Ctrl-C, as shells do

# What an error of ours means to the shell when no command said it better. The first match counts.
_EXIT_CODES: Final[Mapping[type[Exception], tuple[ExitCode, str]]] = {
    SettingsError: (ExitCode.USAGE, "mend the configuration, then check it with --check-config"),
    AuditUnavailableError: (ExitCode.UNAVAILABLE, "free the disk that holds the audit log, then try again"),
    KeyUnavailableError: (ExitCode.UNAVAILABLE, "check the key agent and its HSM, then try again"),
    CertificateError: (
        ExitCode.REFUSED,
        "have the tenant's root issue a certificate as certs/README.md describes",
    ),
    EnvelopeError: (ExitCode.REFUSED, "check the key agent that sent it"),
    IntegrityError: (ExitCode.REFUSED, "restore the object from a good copy"),
    FormatError: (ExitCode.REFUSED, "check the name or the file that was given"),
    SealgateError: (ExitCode.FAILED, "see the log for details"),
}


def make_app(program: str, help_text: str) -> typer.Typer:
    """An app as `run` expects it: no completion scripts, no tracebacks that print local variables."""
    return typer.Typer(
        name=program,
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def emit(data: object, *, as_json: bool, text: Callable[[], str] | str) -> None:
    """Write a result to stdout: *data* as JSON, or *text*."""
    if as_json:
        line = json.dumps(data, ensure_ascii=False, indent=2)
    else:
        line = text if isinstance(text, str) else text()
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@dataclass(frozen=True, slots=True)
class Options[S]:
    """The options of the whole program, as a command finds them in its context's `obj`; S: the settings."""

    config_file: Path
    as_json: bool
    read: Callable[[Path, Mapping[str, str]], S]

    def load(self) -> S:
        """SettingsError names what does not fit."""
        return self.read(self.config_file, os.environ)

    def emit(self, data: object, text: Callable[[], str] | str) -> None:
        emit(data, as_json=self.as_json, text=text)


def add_options[S](
    app: typer.Typer,
    *,
    default_config: Path,
    config_variable: str,
    read: Callable[[Path, Mapping[str, str]], S],
    check: Callable[[S], Iterable[str]],
) -> None:
    """Declare `Options`. *check*: what `--check-config` finds wrong beyond *read*, as sentences."""

    @app.callback(invoke_without_command=True)
    def options(
        context: typer.Context,
        config_file: Annotated[
            Path, typer.Option("--config", envvar=config_variable, help="Configuration file.")
        ] = default_config,
        as_json: Annotated[bool, typer.Option("--json", help="Results and errors as JSON.")] = False,
        check_config: Annotated[
            bool, typer.Option("--check-config", help="Check the configuration and end.")
        ] = False,
        version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
    ) -> None:
        chosen = context.obj = Options(config_file, as_json, read)
        if version:
            found = importlib.metadata.version(_DISTRIBUTION)
            chosen.emit({"version": found}, f"{app.info.name} {found}")
            raise typer.Exit
        if check_config:
            if problems := list(check(chosen.load())):
                raise SettingsError(str(config_file), "", allowed="\n  ".join(problems))
            chosen.emit(
                {"config": str(config_file), "ok": True}, f"{config_file}: good, and the files that it names"
            )
            raise typer.Exit
        if context.invoked_subcommand is None:
            raise CommandError("no command given", f"see {app.info.name} --help", ExitCode.USAGE)


def run(app: typer.Typer, argv: Sequence[str] | None = None) -> NoReturn:
    """Run the program and end the process with its exit code. What it makes is this user's alone."""
    os.umask(0o077)
    sys.exit(main(app, sys.argv[1:] if argv is None else argv))


def main(app: typer.Typer, argv: Sequence[str]) -> int:
    """Run the program; the exit code. Every error is printed as rules 2 and 4 say."""
    as_json = "--json" in _before_rest(argv)
    command = typer.main.get_command(app)
    try:
        result = command.main(args=_hoist(command, argv), prog_name=app.info.name, standalone_mode=False)
    except BrokenPipeError:
        # The reader has gone (`| head`): nobody to tell. Keep the interpreter from telling on exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except Exception as error:  # noqa: BLE001 - rule 4: the last line of defence of a command
        failure = explain(error, program=str(app.info.name))
        _report(failure, as_json=as_json)
        if os.environ.get("SEALGATE_TRACEBACK") == "1":
            traceback.print_exception(error)
        return failure.exit_code
    if result == _INTERRUPTED:
        failure = CommandError("interrupted", "run the command again", code="interrupted")
        _report(failure, as_json=as_json)
    return int(result) if isinstance(result, int) else ExitCode.OK


def explain(error: Exception, *, program: str) -> CommandError:
    """What to tell the user about *error*."""
    match error:
        case CommandError():
            return error
        case typer.TyperException():
            usage = error.exit_code == ExitCode.USAGE
            exit_code = ExitCode.USAGE if usage else ExitCode.FAILED
            # An empty message: help was shown because nothing was asked for.
            return CommandError(
                error.format_message() or "no command given",
                f"see {_command_path(error, program)} --help",
                exit_code,
            )
        case typer.Abort():
            return CommandError("cancelled", "run the command again", code="cancelled")
        case SealgateError():
            exit_code, next_step = next(_EXIT_CODES[kind] for kind in _EXIT_CODES if isinstance(error, kind))
            return CommandError(
                str(error),
                getattr(error, "next_step", next_step),
                exit_code,
                code=getattr(error, "code", None),
            )
        case FileNotFoundError() | IsADirectoryError() | NotADirectoryError() if error.filename:
            return CommandError(
                f"{error.filename}: {error.strerror}", "give the path of an existing file", ExitCode.USAGE
            )
        case OSError() if error.strerror:
            place = f"{error.filename}: " if error.filename else ""
            return CommandError(f"{place}{error.strerror}", "check that it exists and this user may use it")
        case _:
            return CommandError(
                f"internal error: {type(error).__name__} {_place(error)}",
                f"report this as a bug; SEALGATE_TRACEBACK=1 {program} ... shows where it happened",
                code="internal",
            )


def _report(failure: CommandError, *, as_json: bool) -> None:
    shown = json.dumps(failure.as_json(), ensure_ascii=False) if as_json else failure.as_text()
    with contextlib.suppress(OSError):  # nobody reads it: the exit code still speaks
        sys.stderr.write(shown + "\n")


def _command_path(error: Exception, program: str) -> str:
    context = getattr(error, "ctx", None)
    return str(context.command_path) if context else program


def _place(error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""  # noqa: PTH119


def _before_rest(argv: Sequence[str]) -> Sequence[str]:
    return argv[: list(argv).index("--")] if "--" in argv else argv


def _hoist(command: Any, argv: Sequence[str]) -> list[str]:
    """*argv* with the program's own options moved before the subcommand (rule 5)."""
    takes_value = {
        name: not parameter.is_flag
        for parameter in command.params
        for name in parameter.opts
        if name[:2] == "--"
    }
    for below in _commands_below(command):
        for parameter in below.params:
            for name in parameter.opts:  # a subcommand's own option of that name stays with it
                takes_value.pop(name, None)
    head: list[str] = []
    tail: list[str] = []
    words = iter(_before_rest(argv))
    for word in words:
        name, equals, _ = word.partition("=")
        if name not in takes_value:
            tail.append(word)
        elif equals or not takes_value[name]:
            head.append(word)
        elif (value := next(words, None)) is not None:
            head += [word, value]
        else:
            tail.append(word)  # its value is missing: let the parser say so where it stands
    return head + tail + list(argv[len(_before_rest(argv)) :])


def _commands_below(command: Any) -> Iterator[Any]:
    for below in getattr(command, "commands", {}).values():
        yield below
        yield from _commands_below(below)
