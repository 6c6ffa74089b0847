"""Which destroyed keys may lose their wraps: a row alone, whoever signed it, erases nothing.

1. A key that was never active has sealed nothing: its wraps go with it.
2. Of any other key two administrators have to have signed its end, by name (`keys-retire`). What they signed
   goes on to count when one of them is an administrator no more.
3. A key that was ever used is never one again that was not, and no row goes: in one history that is not the
   word of a manager that is sound. What says so is refused (`check_kept`).
"""

from collections.abc import Iterable, Iterator, Mapping

import msgspec

from envelope.errors import FormatError, IntegrityError
from envelope.keys import KeyState
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action, ApprovalError
from key_agent.environments.shared.documents import AdminBody, AdminState, ApprovalBody, Body, DekBody, Kind

type _Bodies = Mapping[tuple[Kind, str], Body]


class _Payload(msgspec.Struct):
    keys: list[str] = []


def may_erase(
    tenant: str,
    ended: Mapping[str, tuple[DekBody | None, DekBody]],
    asked: Mapping[str, ApprovalBody],
    admins: Mapping[str, AdminBody],
) -> frozenset[str]:
    """Of *ended* those whose wraps go. By key id: the row before (None: there was none) and today's."""
    gone = {key_id: pair for key_id, pair in ended.items() if pair[1].state is KeyState.DESTROYED}
    if not gone:
        return frozenset()
    unused = {key_id for key_id, (before, after) in gone.items() if _was_unused(before, after)}
    return frozenset(unused | (gone.keys() & set(_approved(tenant, asked, admins))))


def check_kept(before: _Bodies, after: _Bodies, *, changed: Iterable[tuple[Kind, str]] | None = None) -> None:
    """Rule 3, between two moments of one history. *changed*: only these can differ. IntegrityError."""
    for key in before if changed is None else changed:
        if key not in before:
            continue
        if key not in after:
            raise IntegrityError(f"row {key[0]} {key[1]} is gone: rows of a history stay")
        was, now = before[key], after[key]
        if isinstance(was, DekBody) and isinstance(now, DekBody) and _is_undone(was, now):
            raise IntegrityError(f"key {key[1]} was {was.state} and is {now.state} now, as if never used")


def _is_undone(was: DekBody, now: DekBody) -> bool:
    is_back = now.state is KeyState.PRE_ACTIVE and was.state is not KeyState.PRE_ACTIVE
    return is_back or (was.activated_at_ms is not None and now.activated_at_ms is None)


def _was_unused(before: DekBody | None, after: DekBody) -> bool:
    return before is not None and before.state is KeyState.PRE_ACTIVE and after.activated_at_ms is None


def _approved(
    tenant: str, asked: Mapping[str, ApprovalBody], admins: Mapping[str, AdminBody]
) -> Iterator[str]:
    once = {
        name: msgspec.structs.replace(body, state=AdminState.ACTIVE) for name, body in admins.items()
    }  # rule 2
    for approval_id, body in asked.items():
        if body.action == Action.KEYS_RETIRE and body.used_at_ms is not None:
            yield from _keys_of(tenant, approval_id, body, once, used_at_ms=body.used_at_ms)


def _keys_of(
    tenant: str, approval_id: str, body: ApprovalBody, admins: Mapping[str, AdminBody], *, used_at_ms: int
) -> Iterable[str]:
    try:
        payload = msgspec.json.decode(body.payload, type=dict[str, object])
        approvals.check_granted(
            tenant,
            approval_id,
            approvals.unused(body),
            admins,
            action=Action.KEYS_RETIRE,
            subject=tenant,
            payload=payload,
            now_ms=used_at_ms,
        )
        return msgspec.convert(payload, _Payload).keys
    except (ApprovalError, FormatError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return ()
