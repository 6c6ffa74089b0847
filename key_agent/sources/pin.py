"""The PIN: read from its file, tried once, and never again while the token would refuse it.

1. Real tokens lock after a few wrong PINs. So **one** attempt reaches the token; then this gate is closed
   until the PIN file changes. A note keeps it closed across a restart, for a service manager restarts at
   once.
2. The note says which file was refused by device, inode, modification time and size: no hash of a guessable
   PIN.
3. A note about another token or module says nothing about this one.
4. A gate that cannot write its note stays closed in memory all the same.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, override

import msgspec
import structlog

from key_agent.errors import KeySourceError, LoginRefusedError
from key_agent.sources.verdict import Verdict
from runtime.files import replace_file

PIN_SIZE_LIMIT: Final = 1024
_log = structlog.get_logger(__name__)


class RefusedPin(msgspec.Struct, frozen=True, kw_only=True):
    """The note: which PIN file was refused, by which token."""

    module_path: str
    token_label: str
    device: int
    inode: int
    mtime_ns: int
    size_bytes: int
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """A PIN as it was read, and the note to leave should the token refuse it."""

    text: str
    note: RefusedPin

    @override
    def __repr__(self) -> str:
        return "Pin(...)"


class PinGate:
    def __init__(self, pin_file: Path, note_file: Path, *, module_path: Path, token_label: str) -> None:
        self._pin_file = pin_file
        self._note_file = note_file
        self._module_path = str(module_path)
        self._token_label = token_label
        self._refused: RefusedPin | None = None

    def read(self) -> Pin:
        """The PIN, to be tried once. One line break at the end of the file does not belong to it.

        LoginRefusedError: this very file was refused before. KeySourceError: unreadable, or others can.
        """
        try:
            # Non-blocking: a FIFO must not hang the agent.
            descriptor = os.open(self._pin_file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise KeySourceError(f"PIN file {self._pin_file}: {error.strerror}") from None
        try:
            # Status and content of one and the same file.
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
                raise KeySourceError(
                    f"PIN file {self._pin_file}: only its owner may read it (chmod 600), a regular file"
                )
            note = self._note(status)
            self._check(note)
            content = os.read(descriptor, PIN_SIZE_LIMIT + 1)
        finally:
            os.close(descriptor)
        if len(content) > PIN_SIZE_LIMIT:
            raise KeySourceError(f"PIN file {self._pin_file}: longer than {PIN_SIZE_LIMIT} bytes")
        try:
            text = content.decode().removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise KeySourceError(f"PIN file {self._pin_file}: not UTF-8") from None
        if not text:
            raise KeySourceError(f"PIN file {self._pin_file}: is empty")
        return Pin(text=text, note=note)

    def refuse(self, note: RefusedPin, verdict: Verdict) -> None:
        """The token refused the PIN of *note*: close the gate, durably."""
        self._refused = msgspec.structs.replace(note, verdict=verdict)
        try:
            replace_file(self._note_file, msgspec.json.encode(self._refused))
        except OSError as error:
            _log.error(
                "the note about the refused PIN cannot be written; a restart would try the PIN again",
                file=str(self._note_file),
                reason=error.strerror,
            )

    def _note(self, status: os.stat_result) -> RefusedPin:
        return RefusedPin(
            module_path=self._module_path,
            token_label=self._token_label,
            device=status.st_dev,
            inode=status.st_ino,
            mtime_ns=status.st_mtime_ns,
            size_bytes=status.st_size,
            verdict=Verdict.AUTH_PIN,
        )

    def _check(self, note: RefusedPin) -> None:
        for refused in (self._refused, self._read_note()):
            if refused is not None and msgspec.structs.replace(refused, verdict=note.verdict) == note:
                raise LoginRefusedError(
                    f"the token refused the PIN in {self._pin_file} and it will not be tried again; "
                    "write the right PIN into that file",
                    verdict=refused.verdict,
                )

    def _read_note(self) -> RefusedPin | None:
        try:
            return msgspec.json.decode(self._note_file.read_bytes(), type=RefusedPin)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            # An unreadable note must not open the gate: it may be the one that keeps the token from locking.
            raise KeySourceError(
                f"{self._note_file}: unreadable ({type(error).__name__}); check the PIN, then delete the file"
            ) from None
