"""What agents say to each other about wraps, as JSON.

1. A member that is not known is refused, and every list has an end.
2. Key material is in none of them: parcels are, which one worker sealed for another (sources/parcels.py).
"""

from typing import Annotated, Final

import msgspec

from envelope.errors import FormatError
from envelope.keys import KeyId, KeyUse, NetworkService
from key_agent.environments.peers.peer_api import PeerCall
from key_agent.sources.source import Parcel, Route

BATCH: Final = 500
"""Keys in one request to an HSM and to a peer."""

type Kid = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
type Name = Annotated[str, msgspec.Meta(min_length=1, max_length=127)]
type Kids = Annotated[tuple[Kid, ...], msgspec.Meta(max_length=200_000)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Between agents, as JSON."""


class SealedKey(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    key_id: Kid
    route: Route
    sealed: Annotated[bytes, msgspec.Meta(max_length=16384)]


class Delivery(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parcels for one KEK of one environment."""

    environment: Name
    kek_id: Name
    keys: Annotated[tuple[SealedKey, ...], msgspec.Meta(max_length=BATCH)]


class Stored(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of keys that were to be wrapped."""

    verified: Kids
    failed: dict[Kid, str]

    def __or__(self, other: "Stored") -> "Stored":
        verified = tuple(dict.fromkeys(self.verified + other.verified))
        failed = {kid: why for kid, why in (self.failed | other.failed).items() if kid not in verified}
        return Stored(verified=verified, failed=failed)


NOTHING_STORED: Final = Stored(verified=(), failed={})


class Look(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of *keys* has no sound wrap under that KEK? With *prove* the HSM opens them (proofs.py)."""

    kek_id: Name
    keys: Kids
    prove: bool = False


class Missing(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    missing: dict[Kid, str]


class Ask(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whose proxies have *keys*?"""

    keys: Kids


class Waiting(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    waiting: dict[Kid, str]
    """What is waited for; a key that is not here is ready."""


class Bring(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The manager has another environment send *keys* to a third."""

    environment: Name
    keys: Annotated[tuple[Kid, ...], msgspec.Meta(max_length=BATCH)]


class Make(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The manager has another environment's HSM make keys: service, use and algorithm of each."""

    wanted: Annotated[
        tuple[tuple[Name, KeyUse, str | None], ...], msgspec.Meta(min_length=1, max_length=BATCH)
    ]


class MadeKey(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kcv: Annotated[str, msgspec.Meta(pattern="^(?:[0-9a-f]{2})*$", max_length=128)]
    parcel: SealedKey
    """For the manager's environment."""


class Made(Message, frozen=True, kw_only=True, forbid_unknown_fields=True):
    keys: Annotated[tuple[MadeKey, ...], msgspec.Meta(max_length=BATCH)]


def read_message[T: Message](call: PeerCall, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(call.body, type=kind)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise FormatError(str(error)[:200]) from None


def parcel_of(sealed: SealedKey, owner: NetworkService, kek_id: str, environment: str) -> Parcel:
    return Parcel(
        owner=owner,
        key_id=KeyId.parse(sealed.key_id),
        kek_id=kek_id,
        environment_id=environment,
        route=sealed.route,
        sealed=sealed.sealed,
    )


def sealed_key(parcel: Parcel) -> SealedKey:
    return SealedKey(key_id=str(parcel.key_id), route=parcel.route, sealed=parcel.sealed)
