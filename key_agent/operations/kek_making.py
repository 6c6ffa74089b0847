"""A KEK comes to be: named in the registry, then made in the HSM, or taken over from whoever made it there.

1. The name is committed before the HSM is asked, so that a crash leaves no key that nobody knows.
2. A half-made KEK of ours is destroyed and made anew. One that the HSM's owner made is never touched: the row
   says that it was to be adopted.
"""

import os
from dataclasses import dataclass
from typing import Final, TypedDict

from key_agent.agent import Agent
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.source import Kek, KekReference, KekType

MAX_LABEL_LENGTH: Final = 64
_OBJECT_ID_PREFIX: Final = b"sealgate-kek"
_DAY_S: Final = 86_400


class _Options(TypedDict, total=False):
    kek_type: KekType
    valid_until_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KekWish:
    """What kind of KEK is wanted; nothing said leaves it to the HSM and the agent."""

    kek_type: KekType | None = None
    valid_days: int | None = None
    """The registry holds the end as well: few tokens keep a date."""
    hsm_label: str | None = None
    """Of a key to adopt; with `hsm_id`, or of both none."""
    hsm_id: bytes | None = None

    def __post_init__(self) -> None:
        if (self.hsm_label is None) is not (self.hsm_id is None):
            raise RefusedChangeError(
                "label and id together name one key in the HSM", "give both, as the HSM's own tools show them"
            )
        if self.hsm_label is not None and not 0 < len(self.hsm_label) <= MAX_LABEL_LENGTH:
            raise RefusedChangeError("no label of that length", f"at most {MAX_LABEL_LENGTH} characters")
        if self.valid_days is not None and not 1 <= self.valid_days <= 36_500:
            raise RefusedChangeError(f"{self.valid_days} days are no validity", "give 1 to 36500 days")

    @property
    def adopts(self) -> bool:
        return self.hsm_label is not None


def wish_of(
    *,
    kek_type: str | None = None,
    valid_days: int | None = None,
    hsm_label: str | None = None,
    hsm_id: str | None = None,
) -> KekWish:
    """From a command's words; the id in hex. RefusedChangeError names what is wrong."""
    try:
        kind = None if kek_type is None else KekType(kek_type)
    except ValueError:
        raise RefusedChangeError(
            f"no KEK is of type {kek_type!r}", "give one of " + ", ".join(KekType)
        ) from None
    try:
        object_id = None if hsm_id is None else bytes.fromhex(hsm_id)
    except ValueError:
        raise RefusedChangeError(f"not an id in hex: {hsm_id!r}", "CKA_ID, two digits per byte") from None
    return KekWish(kek_type=kind, valid_days=valid_days, hsm_label=hsm_label, hsm_id=object_id)


async def make_kek(agent: Agent, action: str, wish: KekWish) -> Kek:
    """Name it, and make it or take it over. The caller holds `agent.one_at_a_time` and completes the row.

    RefusedChangeError, RegistryError, AuditUnavailableError, KeySourceError: the same call goes on.
    """
    reference, is_unfinished = await agent.registry.begin_kek(
        _reference(agent, wish), adopts=wish.adopts, now_ms=agent.now_ms()
    )
    await agent.journal.record(
        action, outcome="begun", kek=reference.kek_id, label=reference.label, adopts=int(wish.adopts)
    )
    end_s = None if wish.valid_days is None else int(agent.clock.wall_s()) + wish.valid_days * _DAY_S
    # What was not asked for is not said: a source may know one type alone.
    options: _Options = {}
    if wish.kek_type is not None:
        options["kek_type"] = wish.kek_type
    if end_s is not None:
        options["valid_until_s"] = end_s
    if wish.adopts:
        return await agent.source.adopt_kek(reference, **options)
    return await agent.source.create_kek(reference, replace_unfinished=is_unfinished, **options)


def _reference(agent: Agent, wish: KekWish) -> KekReference:
    """A name no registry ever used: were this one lost, its KEK is not taken for a half-made new one."""
    kek_id = os.urandom(8).hex()
    if wish.hsm_label is not None and wish.hsm_id is not None:
        label, object_id = wish.hsm_label, wish.hsm_id
    else:
        label, object_id = f"sealgate-{kek_id}", _OBJECT_ID_PREFIX + bytes.fromhex(kek_id)[:4]
    return KekReference(kek_id=kek_id, label=label, object_id=object_id, environment_id=agent.environment_id)
