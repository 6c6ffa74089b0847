"""When no environment counts any more: whom two administrators appoint to be the first again, and with what.

1. While no environment counts nobody's word does. What the newest term's holder writes then stays in its own
   registry; no other environment takes it over.
2. Two administrators appoint one environment (`environment-recover`). They sign who it is, the registry it
   goes on from, the registry key and the KEK that it has now, by fingerprint, and from which KEK of its own
   its keys may come: none if every KEK is lost. It begins the next term with that (terms.py).
3. From then on the others take over what it writes, though it heals, until an environment counts again. That
   is all it is for: with one environment that counts the road is closed.
4. Its own KEK of before unwraps for this alone: keys come from there under the KEK of now, and nothing else.
"""

from typing import TYPE_CHECKING, Final

import msgspec

from envelope.errors import FormatError
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import Grounds

if TYPE_CHECKING:
    from key_agent.environments.shared.shared_view import Shared

_NOT_WHAT_WAS_SIGNED: Final = "not what a recovery is approved by"


class Succession(msgspec.Struct, frozen=True, kw_only=True):
    """From which KEK the keys of an environment come under which other one of its own."""

    old_kek: str | None
    """None: from none."""
    lost: bool
    """What is not under the new one is lost: no KEK of any environment opens it any more."""
    new_kek: str
    kek_fingerprint: str
    """Of the new one, as two administrators have compared it."""


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """Who is appointed, now."""

    environment: str
    term: int
    approval: str
    succession: Succession


def recovery_payload(
    *, agent: str, environment: str, registry_key: str, term: int, epoch: int, digest: str, by: Succession
) -> dict[str, object]:
    """What two administrators sign: *agent* holds the term after *term*, from that epoch of it on."""
    return {
        "agent": agent,
        "builds_on": {"digest": digest, "epoch": epoch, "term": term},
        "environment": environment,
        "kek_fingerprint": by.kek_fingerprint,
        "lost": by.lost,
        "new_kek": by.new_kek,
        "old_kek": by.old_kek,
        "registry_key": registry_key,
        "term": term + 1,
    }


def read_succession(payload: str) -> Succession:
    """The KEKs that a payload names. FormatError."""
    try:
        return msgspec.json.decode(payload, type=Succession)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        raise FormatError(_NOT_WHAT_WAS_SIGNED) from None


def is_recovery(grounds: Grounds | None) -> bool:
    """Whether a term was begun by such an approval, in its own words; terms.py judges it."""
    return (
        grounds is not None
        and grounds.approval is not None
        and grounds.asked is not None
        and grounds.asked.action == Action.ENVIRONMENT_RECOVER
    )


def none_counts(shared: "Shared") -> bool:
    """Whether there are environments, and every one of them is withdrawn."""
    bodies = shared.environments.values()
    return bool(bodies) and not any(body.state.counts for body in bodies)


def is_in_other_hands(shared: "Shared") -> bool:
    """Whether the newest term's holder writes nothing: none counts, and its registry key was exposed."""
    if not shared.terms or not none_counts(shared):
        return False
    body = shared.terms[max(shared.terms)]
    own = shared.environments.get(body.environment)
    return own is not None and own.registry_key_exposed and own.registry_key == body.registry_key


def appointed(shared: "Shared") -> Recovery | None:
    """The environment that is appointed, as long as none counts (rule 3)."""
    if not shared.terms or not none_counts(shared):
        return None
    term = max(shared.terms)
    body = shared.terms[term]
    grounds = body.grounds
    if grounds is None or not is_recovery(grounds) or grounds.asked is None or grounds.approval is None:
        return None
    return Recovery(
        environment=body.environment,
        term=int(term),
        approval=grounds.approval,
        succession=read_succession(grounds.asked.payload),
    )
