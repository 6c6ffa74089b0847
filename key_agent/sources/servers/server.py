"""What the worker asks of a key server: a named key that wraps and opens, and what the server says of it.

1. The key-encryption key never leaves the server; KM passes through this process and is wiped by the caller.
2. "It refused this ciphertext", "it refuses this key" and "nobody answered" are three different things: an
   `Unopened` value, a `KeyGoneError`, a `ServerUnavailableError`. Only what the server itself has said about
   the key can become a revocation, and only together with the canary key that is still there
   (diagnosis.py).
3. One thread, one connection, and after any exception a new one: a late answer must never be taken for the
   next question's.
4. A KEK is the server's key `<label>-<id in hex>`, beside the canary key that every KEK shares.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from key_agent.sources.source import KekReference, WrapMethod
from key_agent.sources.verdict import Verdict

MAX_BATCH: Final = 100
"""Items per call; OpenBao 2.7.2 takes 200 with associated data, and refuses 250."""
CANARY_NAME: Final = "sealgate-canary"


def name_of(reference: KekReference) -> str:
    """The name of its key at the server. An adopted key may have an empty id: then it is the label alone."""
    suffix = reference.object_id.hex()
    return f"{reference.label}-{suffix}" if suffix else reference.label


class Standing(StrEnum):
    """What a server says of a named key."""

    USABLE = "usable"
    ABSENT = "absent"  # not there, or not for us: the canary key tells which
    DISABLED = "disabled"  # there, and by its owner's word not to be used for opening
    AMBIGUOUS = "ambiguous"
    FOREIGN = "foreign"  # of that name, but not a key such as we make


@dataclass(frozen=True, slots=True)
class Found:
    standing: Standing
    detail: str = ""


class ServerUnavailableError(Exception):
    """No answer that says anything about a key: network, TLS, sealed, and its two kinds below."""

    verdict = Verdict.UNREACHABLE
    retry_after_s = 0.0


class ServerDeniedError(ServerUnavailableError):
    """The server does not let us: our credentials, or what they may do."""

    verdict = Verdict.DENIED


class ServerThrottledError(ServerUnavailableError):
    """The server has had more requests than it allows. *retry_after_s*: when it takes another; 0: unknown."""

    verdict = Verdict.THROTTLED

    def __init__(self, detail: str, *, retry_after_s: float = 0.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class KeyGoneError(Exception):
    """The server does not use this key (any more): absent, disabled, or not permitted to us."""


class Unsupported(Exception):  # noqa: N818 - it is an answer
    """The server or our permissions do not allow this administrative act."""


@dataclass(frozen=True, slots=True)
class Unopened:
    """One ciphertext that the key did not open. `reason` is for people and holds no data."""

    reason: str
    is_disallowed: bool = False
    """The server has this version of the key and by its owner's word does not use it."""


@dataclass(frozen=True, slots=True)
class Item:
    """What is to be sealed or opened, and the place it is bound to."""

    data: bytes
    binding: bytes


class KeyServer(ABC):
    """Raises ServerUnavailableError and, where it says so, KeyGoneError or Unsupported; nothing else."""

    method: WrapMethod

    @abstractmethod
    def identity(self) -> str:
        """What is pinned as the KEK's token serial: another server, or an emptied one, has another."""

    @abstractmethod
    def find(self, name: str) -> Found:
        """How the key *name* stands; says nothing about whether it is still the same key."""

    @abstractmethod
    def create(self, name: str) -> None:
        """Make a key that cannot be exported. Unsupported. The caller has seen that there is none."""

    @abstractmethod
    def destroy(self, name: str) -> None:
        """Destroy every key *name*; none is no error. Unsupported."""

    @abstractmethod
    def set_enabled(self, name: str, *, enabled: bool) -> None:
        """Unsupported where the server cannot take it back."""

    @abstractmethod
    def random(self, size: int) -> bytes:
        """*size* random bytes: the server's generator where it offers one, mixed with the kernel's."""

    @abstractmethod
    def sealed_size(self, size: int) -> int | None:
        """Length that *size* bytes are wrapped to; None where it is the server's business."""

    @abstractmethod
    def seal(self, name: str, items: Sequence[Item]) -> list[bytes]:
        """Each item wrapped, at most MAX_BATCH. KeyGoneError."""

    @abstractmethod
    def open(self, name: str, items: Sequence[Item]) -> list[bytes | Unopened]:
        """Each item opened. KeyGoneError if the key itself is refused, rather than an item."""

    @abstractmethod
    def describe(self) -> dict[str, object]:
        """For `doctor`. No secret."""

    @abstractmethod
    def close(self) -> None:
        """Drop the connection; the next call makes a new one. Never raises."""
