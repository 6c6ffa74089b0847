"""What a proxy and its worker processes say to each other, over a socket pair.

1. A frame is 4 bytes of length and one message in MessagePack. Requests go down, each gets one answer, in
   the order in which the work is done: an answer names its request.
2. No key crosses: envelopes are passed on as they came, sealed, and every worker opens them itself.
3. Both ends are the same installation. What is not understood ends the connection, and with it the worker.
"""

import asyncio
from typing import Any, Final

import msgspec

from envelope.errors import SealgateError
from proxy.environments import Word
from proxy.keys.relay import Relayed

LENGTH_SIZE: Final = 4
MAX_FRAME_BYTES: Final = 96 << 20
"""1,000 envelopes of 64 KiB, which is more than the push API takes at once."""


class WireError(SealgateError):
    """The other side does not keep to the protocol."""


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first request. *settings*: the proxy's, as JSON."""

    number: int
    settings: bytes
    instance: str


class Open(msgspec.Struct, frozen=True, tag=True):
    """Open the listeners: the keys are here."""


class Take(msgspec.Struct, frozen=True, tag=True):
    """Open these envelopes and have them in force."""

    envelopes: Relayed


class Reload(msgspec.Struct, frozen=True, tag=True):
    """The directory has reached *revision*: serve what it says."""

    revision: int


class Tell(msgspec.Struct, frozen=True, tag=True):
    """What an agent of *tenant* says of the environment."""

    tenant: str
    word: Word


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Are you there, and is all well?"""


class Scrape(msgspec.Struct, frozen=True, tag=True):
    """Your metrics."""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Take no more connections, let what is under way end within *grace_s*, then end."""

    grace_s: float


class Done(msgspec.Struct, frozen=True, tag=True):
    """To Start, Open, Reload, Stop, Ping; *problems*: why something is not served as it should be."""

    problems: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()


class Taken(msgspec.Struct, frozen=True, tag=True):
    """To Take: for each envelope the code of its refusal, "" for none."""

    codes: tuple[str, ...]


class Scraped(msgspec.Struct, frozen=True, tag=True):
    """To Scrape: Prometheus text."""

    text: bytes


class Failed(msgspec.Struct, frozen=True, tag=True):
    """To any request: it could not be done, and the worker ends."""

    cause: str
    next_step: str


type Request = Start | Open | Take | Reload | Tell | Ping | Scrape | Stop
type Answer = Done | Taken | Scraped | Failed


class _Frame[T](msgspec.Struct, frozen=True, array_like=True):
    number: int
    message: T


_encoder: Final = msgspec.msgpack.Encoder()
_requests: Final[Any] = msgspec.msgpack.Decoder(
    _Frame[Start | Open | Take | Reload | Tell | Ping | Scrape | Stop]
)
_answers: Final[Any] = msgspec.msgpack.Decoder(_Frame[Done | Taken | Scraped | Failed])


def encode(number: int, message: Request | Answer) -> bytes:
    """A frame, its length first."""
    body = _encoder.encode(_Frame(number, message))
    if len(body) > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {len(body)} bytes")
    return len(body).to_bytes(LENGTH_SIZE) + body


async def read_request(stream: asyncio.StreamReader) -> tuple[int, Request]:
    """WireError; EOFError (IncompleteReadError) when the other side has gone."""
    frame: _Frame[Request] = await _read(stream, _requests)
    return frame.number, frame.message


async def read_answer(stream: asyncio.StreamReader) -> tuple[int, Answer]:
    """As `read_request`."""
    frame: _Frame[Answer] = await _read(stream, _answers)
    return frame.number, frame.message


async def _read(stream: asyncio.StreamReader, decoder: Any) -> Any:
    size = int.from_bytes(await stream.readexactly(LENGTH_SIZE))
    if size > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {size} bytes")
    try:
        return decoder.decode(await stream.readexactly(size))
    except msgspec.DecodeError as error:
        raise WireError(str(error)) from None
