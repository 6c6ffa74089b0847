"""The mark: the newest shared registry that this agent has had, kept outside of the database.

1. Whoever can write the database can put back an older one whose rows are all signed. The mark, a file in
   `state_dir` signed with the agent's registry key, says how far it was.
2. It is written after each commit and before anything that rests on it leaves. A database that is newer than
   the mark is what a crash between the two leaves: its own seal has to be right then (shared.py).
3. It also names who holds the newest term, and the digests of the rows that the next one would be judged by
   (terms.py), and whether that holder was withdrawn: when the rows are not to be believed, these say whose
   rows may take their place.
4. Where a manager's history was overruled by another manager's, keys that were more restricted in it stay so
   (`restrictions`) until the rows of the new one say it too.
"""

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Self

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from envelope.keys import KeyState
from key_agent.environments.shared.documents import Hex, Kind, Ms, Name, Number, Text
from key_agent.environments.shared.shared_errors import RegistryTamperedError
from key_agent.environments.shared.shared_state import State
from key_agent.environments.shared.terms import Holder, Known, Terms, goes_on
from runtime.files import replace_file

NAME: Final = "registry.mark"
_DOMAIN: Final = b"sealgate/v1 registry mark\0"


class MarkHolder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who holds a term."""

    term: Number
    start: Number
    agent: Name
    registry_key: Text
    digest: Hex
    rank: tuple[Ms, str]

    @classmethod
    def of(cls, holder: Holder) -> Self:
        return cls(
            term=holder.term,
            start=holder.start,
            agent=holder.agent,
            registry_key=holder.registry_key,
            digest=holder.digest.hex(),
            rank=holder.rank,
        )

    @property
    def held(self) -> Holder:
        return Holder(
            term=self.term,
            start=self.start,
            agent=self.agent,
            environment="",
            registry_key=self.registry_key,
            digest=bytes.fromhex(self.digest),
            rank=self.rank,
        )


class Mark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    tenant: Name
    environment: Name
    term: Number
    epoch: Number
    digest: Hex
    restrictions: dict[Annotated[str, msgspec.Meta(max_length=64)], KeyState] = {}
    holder: MarkHolder | None = None
    """Of the newest term."""
    rows: dict[Annotated[str, msgspec.Meta(max_length=200)], Hex] = {}
    """`kind id` -> digest, of environments and administrators."""
    withdrawn: bool | msgspec.UnsetType = msgspec.UNSET
    """Of *holder*: what it writes next is not to be taken (terms.py, rule 5). Not there: it may go on."""
    signature: Hex = ""

    @property
    def known(self) -> Known:
        """Whom to believe when the rows themselves are not to be believed."""
        digests: dict[tuple[Kind, str], bytes] = {}
        for name, digest in self.rows.items():
            kind, _, row_id = name.partition(" ")
            digests[Kind(kind), row_id] = bytes.fromhex(digest)
        terms = Terms(() if self.holder is None else (self.holder.held,))
        return Known(
            position=self.position,
            digest=self.digest,
            terms=terms,
            digests=digests,
            withdrawn=self.withdrawn is True,
        )

    @property
    def position(self) -> tuple[int, int]:
        return (self.term, self.epoch)


class MarkError(Exception):
    """The file is damaged, foreign, or not signed with this agent's key."""


class MarkFile:
    """The mark of one agent, as it was read or written last."""

    def __init__(self, state_dir: Path, key: Ed25519PrivateKey, *, tenant: str, environment: str) -> None:
        self._state_dir = state_dir
        self._key = key
        self._tenant = tenant
        self._environment = environment
        self._mark: Mark | None = None

    @property
    def is_there(self) -> bool:
        return self._mark is not None

    @property
    def restrictions(self) -> Mapping[str, KeyState]:
        """Rule 4."""
        return {} if self._mark is None else self._mark.restrictions

    async def read(self) -> Mark | None:
        """None: there is no file. RegistryTamperedError: it is none of this agent's."""
        try:
            self._mark = await asyncio.to_thread(
                read_mark, self._state_dir, self._key, tenant=self._tenant, environment=self._environment
            )
        except (MarkError, OSError) as error:
            raise RegistryTamperedError(str(error)) from None
        return self._mark

    async def follow(self, state: State, restrictions: Mapping[str, KeyState]) -> None:
        """*state* was committed. RegistryTamperedError: where it cannot be written, what was stored cannot be
        proven later.
        """
        shared, known, holder = state.shared, state.known, state.terms.newest
        is_over = holder is not None and not goes_on(known, holder)
        await self._keep(
            Mark(
                tenant=self._tenant,
                environment=self._environment,
                term=shared.term,
                epoch=shared.epoch,
                digest=shared.digest,
                restrictions=dict(restrictions),
                holder=None if holder is None else MarkHolder.of(holder),
                rows={f"{key[0]} {key[1]}": digest.hex() for key, digest in known.digests.items()},
                withdrawn=True if is_over else msgspec.UNSET,
            )
        )

    async def lower(self, after: State) -> None:
        """Another history of the same term may be shorter than ours: after a crash it has to be believed."""
        if self._mark is None:
            return
        start = after.terms.newest
        lowest = (after.shared.term, 0) if start is None else (start.term, start.start)
        if lowest < self._mark.position:
            await self._keep(msgspec.structs.replace(self._mark, term=lowest[0], epoch=0, digest=""))

    async def _keep(self, mark: Mark) -> None:
        try:
            await asyncio.to_thread(write_mark, self._state_dir, self._key, mark)
        except OSError as error:
            raise RegistryTamperedError(f"the mark cannot be written: {error}") from None
        self._mark = mark


def read_mark(state_dir: Path, key: Ed25519PrivateKey, *, tenant: str, environment: str) -> Mark | None:
    """The mark of this agent; None if there is no file. MarkError, OSError."""
    path = state_dir / NAME
    if not os.path.lexists(path):
        return None
    try:
        mark = msgspec.json.decode(path.read_bytes(), type=Mark)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise MarkError(f"{path} is damaged ({type(error).__name__})") from None
    try:
        key.public_key().verify(bytes.fromhex(mark.signature), _signed(mark))
    except (InvalidSignature, ValueError):
        raise MarkError(f"{path} is not signed with the registry key beside it") from None
    if (mark.tenant, mark.environment) != (tenant, environment):
        raise MarkError(f"{path} is of environment {mark.environment} of {mark.tenant}")
    return mark


def write_mark(state_dir: Path, key: Ed25519PrivateKey, unsigned: Mark) -> None:
    """On the disk when it returns. OSError."""
    mark = msgspec.structs.replace(unsigned, signature=key.sign(_signed(unsigned)).hex())
    replace_file(state_dir / NAME, msgspec.json.encode(mark))


def _signed(mark: Mark) -> bytes:
    return _DOMAIN + msgspec.json.encode(msgspec.structs.replace(mark, signature=""), order="sorted")
