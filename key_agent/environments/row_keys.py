"""Whose signature counts for which epochs of the shared rows.

1. An agent's registry key counts for the rows it signed while its environment's row named it; of a key that
   was replaced, what it signed before.
2. A key that is pinned counts until a row names one for that agent.
3. Environments that a delta brings along are believed one after the other, each by a key known before.
"""

from collections.abc import Iterable, Mapping
from typing import Self, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from envelope.errors import IntegrityError
from key_agent.environments.documents import (
    Body,
    Delta,
    EnvironmentBody,
    Kind,
    SharedRow,
    check_row,
    read_body,
    read_registry_key,
)


class RowKeys:
    """Those of one set of rows."""

    def __init__(self) -> None:
        self._known: dict[str, list[tuple[Ed25519PublicKey, int | None]]] = {}

    @classmethod
    def of(cls, bodies: Mapping[tuple[Kind, str], Body], pins: Mapping[str, str]) -> Self:
        keys = cls()
        for body in bodies.values():
            if isinstance(body, EnvironmentBody):
                keys.admit(body)
        for agent_id, text in pins.items():
            if agent_id not in keys._known:
                keys._add(agent_id, text, None)
        return keys

    def admit(self, body: EnvironmentBody) -> None:
        if body.registry_key:
            self._add(body.agent_id, body.registry_key, None)
        for former in body.former_keys:
            self._add(former.agent_id, former.registry_key, former.until_epoch)

    def admitting(self, rows: Iterable[SharedRow], tenant: str) -> Self:
        """These environments' rows are believed one after the other, each by a key that was known before."""
        waiting = list(rows)
        while waiting:
            left = []
            for row in waiting:
                if not self._is_right(tenant, row):
                    left.append(row)
                    continue
                self.admit(cast("EnvironmentBody", read_body(row.kind, row.body)))
            if len(left) == len(waiting):
                self.check(tenant, left[0])  # says what is wrong with it
            waiting = left
        return self

    def newest(self) -> dict[str, Ed25519PublicKey]:
        return {
            agent_id: key for agent_id, known in self._known.items() for key, until in known if until is None
        }

    def check(self, tenant: str, row: SharedRow) -> None:
        """IntegrityError unless a key of its signer's, good at its epoch, has signed it."""
        fitting = self._fitting(row)
        if not fitting:
            check_row(tenant, row, {})
        for key in fitting[:-1]:
            try:
                check_row(tenant, row, {row.signer: key})
            except IntegrityError:
                continue
            return
        check_row(tenant, row, {row.signer: fitting[-1]})

    def _is_right(self, tenant: str, row: SharedRow) -> bool:
        try:
            self.check(tenant, row)
        except IntegrityError:
            return False
        return True

    def _fitting(self, row: SharedRow) -> list[Ed25519PublicKey]:
        known = self._known.get(row.signer, ())
        return [key for key, until in known if until is None or row.epoch <= until]

    def _add(self, agent_id: str, text: str, until: int | None) -> None:
        known = self._known.setdefault(agent_id, [])
        entry = (read_registry_key(text), until)
        if entry not in known:
            known.append(entry)


def named_in(delta: Delta, keys: RowKeys, tenant: str) -> dict[str, Ed25519PublicKey]:
    """Keys of environments that *delta* itself makes known: whoever relays it may be one of them."""
    rows = [row for row in delta.rows if row.kind is Kind.ENVIRONMENT]
    return keys.admitting(rows, tenant).newest()
