"""What a manager is about to write: bodies are put, and seen as they leave the rows, before anything is."""

from typing import Final, cast

import msgspec

from key_agent.environments.shared.documents import Body, EnvironmentBody, FormerKey, Kind, TenantBody
from key_agent.environments.shared.shared_view import FIELDS, Key, Shared, changed


class Draft:
    """What a write is about to change: `put` bodies, look at `shared` as they leave it."""

    def __init__(self, shared: Shared, *, tenant_id: str, now_ms: int) -> None:
        self.epoch: Final = shared.epoch + 1
        """The epoch this write will have."""
        self.now_ms: Final = now_ms
        self.changed: dict[Key, Body] = {}
        self._tenant_id = tenant_id
        self._kinds: dict[Kind, dict[str, Body]] = {}
        self._before = shared
        self._shared: Shared = shared

    @property
    def shared(self) -> Shared:
        return self._shared

    def put(self, kind: Kind, row_id: str, body: Body) -> None:
        """Set a row. One that is as it was changes nothing."""
        if kind is Kind.TENANT:
            self._shared = changed(self._shared, tenant=cast("TenantBody", body))
        else:
            if kind not in self._kinds:  # the first of its kind: from now on ours to change
                self._kinds[kind] = dict(getattr(self._shared, FIELDS[kind]))
                self._shared = changed(self._shared, **{FIELDS[kind]: self._kinds[kind]})
            self._kinds[kind][row_id] = body
        if self._body_before(kind, row_id) == body:
            self.changed.pop((kind, row_id), None)
        else:
            self.changed[kind, row_id] = body

    def _body_before(self, kind: Kind, row_id: str) -> Body | None:
        if kind is Kind.TENANT:
            return self._before.tenant if row_id == self._tenant_id else None
        found: Body | None = getattr(self._before, FIELDS[kind]).get(row_id)
        return found


def with_former_keys(body: EnvironmentBody, before: EnvironmentBody | None, epoch: int) -> EnvironmentBody:
    """Which keys it had, and until when."""
    former = () if before is None else before.former_keys
    if (
        before is not None
        and before.registry_key
        and (before.agent_id, before.registry_key)
        != (
            body.agent_id,
            body.registry_key,
        )
    ):
        gone = FormerKey(agent_id=before.agent_id, registry_key=before.registry_key, until_epoch=epoch - 1)
        former = (*former, gone)
    return msgspec.structs.replace(body, former_keys=former)
