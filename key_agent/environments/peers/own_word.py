"""An environment's own word, without any manager, that it is not to be trusted.

1. It is written beside the database, so a restart does not undo it. A file that cannot be read says so too.
2. It ends when the signed row says it.
"""

from pathlib import Path
from typing import Final

import msgspec
import structlog

from runtime.files import replace_file

log = structlog.get_logger(__name__)

DECLARATION_NAME: Final = "healing.json"


class Notice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The word, as others are told it. Its agent's certificate proves it."""

    environment: str
    reason: str
    at_ms: int


class Declaration:
    """The word, as this environment keeps it."""

    def __init__(self, state_dir: Path) -> None:
        self._file = state_dir / DECLARATION_NAME
        self.reason = _read(self._file)
        """None: it has not been given."""

    def write(self) -> None:
        """On the disk when it returns. OSError."""
        replace_file(self._file, msgspec.json.encode({"reason": self.reason}))

    def end(self) -> None:
        """Rule 2. Where the file cannot be removed, the next start says it once more."""
        self.reason = None
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the own word stays on the disk", file=str(self._file), cause=error.strerror)


def _read(file: Path) -> str | None:
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{file}: {error.strerror}"
    try:
        return str(msgspec.json.decode(content, type=dict[str, str])["reason"])
    except (msgspec.MsgspecError, UnicodeError, KeyError):
        return f"{file} says so, and not why"
