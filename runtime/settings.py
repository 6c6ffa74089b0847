"""Settings: a TOML file, overridden by the environment, checked against a schema.

1. A schema is a `msgspec.Struct` (frozen, forbid_unknown_fields) of such structs; units stand in the names,
   and settings that must fit each other are checked in `__post_init__` (ValueError).
2. What the schema does not know is refused, in the file and in the environment.
3. The environment overrides: `PREFIX_SECTION__KEY`, deeper `PREFIX_SECTION__SUB__KEY`, top level
   `PREFIX__KEY`. The value is read as its type in the schema; lists and tables in TOML's notation. A name of
   the prefix without a double underscore is not a setting (`SEALGATE_CONFIG`).
4. A relative `Path` is relative to the file's directory, so a configuration can be moved as a whole.
5. Secrets are not settings: a setting `*_file` names the file, `read_secret_file` reads it and insists on its
   mode. A value under a secret-looking name never stands in an error.
"""

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from envelope.errors import SealgateError
from runtime.observe import is_secret_name

MAX_SECRET_BYTES: Final = 64 * 1024

type _Document = dict[str, Any]


class SettingsError(SealgateError):
    """A setting that cannot be used.

    `file` (or the environment variable), `line` if known, `key` in dotted form ("" for the whole file),
    `value` as far as it may be shown, `allowed`: what would be right.
    """

    def __init__(
        self, file: str, key: str, *, allowed: str, value: str | None = None, line: int | None = None
    ) -> None:
        self.file = file
        self.key = key
        self.value = value
        self.allowed = allowed
        self.line = line
        place = file if line is None else f"{file}:{line}"
        setting = f"{key} = {value}: " if key and value is not None else f"{key}: " if key else ""
        super().__init__(f"{place}: {setting}{allowed}")


def load[T: msgspec.Struct](path: Path, schema: type[T], *, environment: Mapping[str, str], prefix: str) -> T:
    """The settings in *path*, overridden by *environment*.

    SettingsError names file (or variable), key, value and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(
            str(path), "", allowed="this configuration file does not exist; --config FILE names another"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(str(path), "", allowed=f"not readable as UTF-8 text: {error}") from None
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(str(path), "", allowed=f"not TOML: {error}") from None
    variables = _override(document, schema, environment, prefix)

    def decode(kind: type, value: Any) -> Any:
        if kind is Path and isinstance(value, str):
            if not value:
                raise ValueError("Expected a path, got an empty string")
            return path.parent / Path(value).expanduser()
        # What msgspec shows as the error, with the place.
        raise TypeError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")

    try:
        return msgspec.convert(document, schema, dec_hook=decode)
    except msgspec.ValidationError as error:
        raise _explain(error, path, text, document=document, schema=schema, variables=variables) from None


def unusable_files(files: Mapping[str, Path], *, secrets: Mapping[str, Path]) -> Iterator[str]:
    """A sentence on each file, by its setting, that cannot be read; *secrets* must be ours alone."""
    for key, path in files.items():
        try:
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            yield f"{key} = {path}: {error.strerror}"
    for key, path in secrets.items():
        try:
            secret = read_secret_file(path)
        except SettingsError as error:
            yield f"{key} = {path}: {error.allowed}"
        else:
            secret[:] = bytes(len(secret))


def read_secret_file(path: Path) -> bytearray:
    """The content of *path* without one final newline, in a buffer that the caller wipes.

    SettingsError if it is missing, empty, too large, not a regular file, or open to group or others.
    """
    file = str(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SettingsError(file, "", allowed=f"the secret cannot be read: {error.strerror}") from None
    try:
        return _read_secret(descriptor, file)
    finally:
        os.close(descriptor)


def _read_secret(descriptor: int, file: str) -> bytearray:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise SettingsError(file, "", allowed="a secret must be a regular file")
    if status.st_mode & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise SettingsError(file, "", allowed=f"mode {mode:04o} opens a secret to others: chmod 600 {file}")
    if status.st_size > MAX_SECRET_BYTES:
        raise SettingsError(
            file, "", allowed=f"{status.st_size} bytes; a secret has at most {MAX_SECRET_BYTES}"
        )
    secret = bytearray(status.st_size)
    with memoryview(secret) as view:
        filled = 0
        # Into our own buffer: `bytes` on the way could not be wiped.
        while filled < len(secret) and (count := os.readv(descriptor, [view[filled:]])):
            filled += count
    del secret[filled:]
    if secret.endswith(b"\n"):
        del secret[-2 if secret.endswith(b"\r\n") else -1 :]
    if not secret:
        raise SettingsError(file, "", allowed="the secret is empty")
    return secret


def _override(
    document: _Document, schema: type[msgspec.Struct], environment: Mapping[str, str], prefix: str
) -> dict[str, str]:
    """Write the environment's settings into *document*; {dotted key: variable}."""
    variables = {}
    for variable, text in sorted(environment.items()):
        if not variable.startswith(f"{prefix}_") or "__" not in variable.removeprefix(prefix):
            continue
        # The empty section is the top level.
        keys = variable.removeprefix(prefix).removeprefix("_").removeprefix("_").lower().split("__")
        dotted = ".".join(keys)
        kind = _type_at(schema, keys, variable)
        table = document
        for key in keys[:-1]:
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise SettingsError(variable, dotted, allowed=f"{key} is not a section in the file")
        table[keys[-1]] = _parse(text, kind, variable, dotted)
        variables[dotted] = variable
    return variables


def _type_at(schema: type[msgspec.Struct], keys: list[str], variable: str) -> Any:
    kind: Any = schema
    for depth, key in enumerate(keys):
        struct = _struct_in(kind)
        known = {field.encode_name: field.type for field in msgspec.structs.fields(struct)} if struct else {}
        if key not in known:
            where = ".".join(keys[:depth]) or "the top level"
            allowed = f"{where} has no setting {key}{_suggest(key, known)}"
            raise SettingsError(variable, ".".join(keys), allowed=allowed)
        kind = known[key]
    return kind


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    """The struct in `Struct`, `Struct | None`, `Annotated[Struct, ...]`."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind
    for argument in getattr(kind, "__args__", ()):
        if found := _struct_in(argument):
            return found
    return None


def _parse(text: str, kind: Any, variable: str, dotted: str) -> Any:
    info = msgspec.inspect.type_info(kind)
    options = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    if any(
        isinstance(option, msgspec.inspect.StrType | msgspec.inspect.EnumType | msgspec.inspect.CustomType)
        or (isinstance(option, msgspec.inspect.LiteralType) and isinstance(option.values[0], str))
        for option in options
    ):
        return text
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    if list(parsed) != ["value"]:  # nothing, or more than one setting in one variable
        names = " or ".join(sorted(_describe(option) for option in options))
        raise SettingsError(
            variable, dotted, value=_shown(dotted, text), allowed=f"expected {names} in TOML's notation"
        )
    return parsed["value"]


def _describe(info: msgspec.inspect.Type) -> str:
    return type(info).__name__.removesuffix("Type").lower()


_AT: Final = re.compile(r"(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?", re.DOTALL)
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING: Final = re.compile(r"Object missing required field `(.*)`", re.DOTALL)
_STEP: Final = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")


def _explain(
    error: msgspec.ValidationError,
    path: Path,
    text: str,
    *,
    document: _Document,
    schema: type[msgspec.Struct],
    variables: Mapping[str, str],
) -> SettingsError:
    """msgspec's sentence as file, line, key, value, and what is allowed."""
    match = _AT.fullmatch(str(error))
    what = match["what"] if match else str(error)
    steps = [key or f"[{index}]" for key, index in _STEP.findall((match and match["path"]) or "$")]
    allowed = what[:1].lower() + what[1:]
    value: object = None
    if unknown := _UNKNOWN.fullmatch(what):
        allowed = f"unknown setting{_suggest(unknown[1], _names_at(schema, steps))}"
        steps.append(unknown[1])
    elif missing := _MISSING.fullmatch(what):
        allowed = "required and not set"
        steps.append(missing[1])
    else:
        value = _value_at(document, steps)
    dotted = ".".join(steps).replace(".[", "[")
    shown = None if value is None or isinstance(value, dict) else _shown(dotted, value)
    if variable := variables.get(dotted):
        return SettingsError(variable, dotted, value=shown, allowed=allowed)
    line = _line_of(text, [step for step in steps if not step.startswith("[")])
    return SettingsError(str(path), dotted, value=shown, allowed=allowed, line=line)


def _names_at(schema: type[msgspec.Struct], steps: list[str]) -> list[str]:
    kind: Any = schema
    for step in steps:
        struct = _struct_in(kind)
        if struct and not step.startswith("["):
            kind = next(field.type for field in msgspec.structs.fields(struct) if field.encode_name == step)
    struct = _struct_in(kind)
    return [field.encode_name for field in msgspec.structs.fields(struct)] if struct else []


def _suggest(key: str, known: Mapping[str, Any] | list[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def _value_at(document: _Document, steps: list[str]) -> object:
    value: Any = document
    for step in steps:
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step != "[...]":
            value = value[int(step[1:-1])]
    return value


def _shown(dotted: str, value: object) -> str:
    last = dotted.rpartition(".")[2]
    if is_secret_name(last):
        return "<not shown>"
    shown = repr(value) if not isinstance(value, str) else f'"{value}"'
    return shown if len(shown) <= 200 else shown[:200] + "..."


def _line_of(text: str, keys: list[str]) -> int | None:
    """The line that sets *keys*, or else that opens the nearest table around it. For people: best effort."""
    found: dict[tuple[str, ...], int] = {}
    for number, path in _lines(text):
        found.setdefault(path, number)
    for length in range(len(keys), 0, -1):
        if line := found.get(tuple(keys[:length])):
            return line
    return None


_HEADER: Final = re.compile(r"\s*\[\[?([^\[\]]+)\]\]?\s*(?:#.*)?")
_ASSIGNMENT: Final = re.compile(r"\s*([A-Za-z0-9_.\"'-]+)\s*=")


def _lines(text: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _HEADER.fullmatch(line):
            table = tuple(part.strip().strip("\"'") for part in header[1].split("."))
            yield number, table
        elif assignment := _ASSIGNMENT.match(line):
            yield number, (*table, *(part.strip("\"'") for part in assignment[1].split(".")))
