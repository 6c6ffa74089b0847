"""Keys that another manager's history had more restricted than ours has: they stay so.

1. Where a history is replaced by another one (shared.py, rule 2), what was taken away in the old one is kept
   beside the rows, in the mark, until the rows say it themselves.
2. A key that the old history has used is deactivated, not unused, while the new one has not used it yet.
"""

from collections.abc import Mapping

import msgspec

from envelope.keys import KeyState
from key_agent.environments.shared.documents import Body, DekBody, Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.shared.shared_view import Key
from key_agent.environments.states import restrictiveness

type Restrictions = Mapping[str, KeyState]
"""By key id."""


def put_restrictions(draft: Draft, restrictions: Restrictions) -> None:
    """What another history had restricted is written down by the new one."""
    for key_id, state in restrictions.items():
        body = draft.shared.deks.get(key_id)
        if body is not None and restrictiveness(body.state) < restrictiveness(state):
            draft.put(
                Kind.DEK,
                key_id,
                msgspec.structs.replace(
                    body, state=state, since_ms=draft.now_ms, reason="restricted under another manager"
                ),
            )


def restrictions_between(
    kept: Restrictions, before: Mapping[Key, Body], after: Mapping[Key, Body]
) -> dict[str, KeyState]:
    """*kept* and what *before* says, where *after*, which takes its place, does not say it."""
    both = dict(kept)
    for (kind, row_id), body in before.items():
        if kind is Kind.DEK and isinstance(body, DekBody):
            known = both.get(row_id, body.state)
            both[row_id] = max(known, body.state, key=restrictiveness)
    return still(both, after)


def restricted(bodies: Mapping[Key, Body], restrictions: Restrictions) -> Mapping[Key, Body]:
    """*bodies* as the tables are to have them: keys at least as restricted as another history had them."""
    if not restrictions:
        return bodies
    changed = dict(bodies)
    for key_id, state in restrictions.items():
        body = changed.get((Kind.DEK, key_id))
        if isinstance(body, DekBody) and restrictiveness(body.state) < restrictiveness(state):
            changed[Kind.DEK, key_id] = msgspec.structs.replace(body, state=state)
    return changed


def still(restrictions: Restrictions, after: Mapping[Key, Body]) -> dict[str, KeyState]:
    """Those that the rows of now do not say themselves."""
    kept: dict[str, KeyState] = {}
    for key_id, state in restrictions.items():
        body = after.get((Kind.DEK, key_id))
        if not isinstance(body, DekBody):
            if state is not KeyState.PRE_ACTIVE:
                kept[key_id] = state  # should it come back, it has been used
            continue
        taken_away = restrictiveness(state) > restrictiveness(KeyState.DEACTIVATED)
        if taken_away and restrictiveness(body.state) < restrictiveness(state):
            kept[key_id] = state
        elif body.state is KeyState.PRE_ACTIVE and state is not KeyState.PRE_ACTIVE:
            kept[key_id] = KeyState.DEACTIVATED  # it has sealed: its wraps are not those of an unused key
    return kept
