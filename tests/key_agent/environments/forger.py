"""What a breached agent makes that has its registry key, and every row and head that was ever sent."""

from typing import Any, Final, Protocol, cast

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import (
    ApprovalBody,
    Body,
    Delta,
    EnvironmentBody,
    Grounds,
    Kind,
    TermBody,
    digest_of,
    read_body,
    row_digest,
    sign_head,
    sign_row,
)
from key_agent.environments.shared.registry_key import public_text
from key_agent.environments.shared.terms import promotion_payload, term_id
from key_agent.environments.states import EnvironmentState
from tests.key_agent.environments.registries import NOW_MS, TENANT, Admins

INVENTED: Final = Admins("mallory", "trent")
"""Administrators that nobody has appointed."""


class HasKey(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def key(self) -> Ed25519PrivateKey: ...


class Forger:
    """Makes what it likes of rows that it has seen, with the registry key of *holder*."""

    def __init__(self, holder: HasKey, seen: Delta) -> None:
        self.holder = holder
        self.rows = {row.key: row for row in seen.rows}
        self.seen = seen
        self.term, self.epoch = seen.term, seen.epoch_to

    @property
    def public(self) -> str:
        return public_text(self.holder.key)

    def put(self, kind: Kind, row_id: str, body: Body, *, term: int | None = None, epoch: int = 0) -> None:
        row = sign_row(
            self.holder.key,
            tenant=TENANT,
            kind=kind,
            row_id=row_id,
            body=body,
            term=self.term if term is None else term,
            epoch=epoch or self.epoch,
            signer=f"agent-{self.holder.name}",
        )
        self.rows[row.key] = row

    def begin(self, term: int, **more: Any) -> None:
        """A term of its own, on the newest real head."""
        newest = max((row for row in self.rows.values() if row.kind is Kind.TERM), key=lambda row: row.id)
        grounds = Grounds(built_on=self.seen.head, **more)
        self.term, self.epoch = term, self.seen.epoch_to + 1
        body = TermBody(
            agent=f"agent-{self.holder.name}",
            environment=self.holder.name,
            registry_key=self.public,
            since_ms=NOW_MS,
            cause="by myself",
            previous=row_digest(newest).hex(),
            grounds=grounds,
        )
        self.put(Kind.TERM, term_id(term), body)

    def delta(self, *, signer: str | None = None) -> Delta:
        rows = tuple(self.rows.values())
        digest = digest_of((row.key, row_digest(row)) for row in rows)
        head = sign_head(self.holder.key, tenant=TENANT, term=self.term, epoch=self.epoch, digest=digest)
        return Delta(
            tenant=TENANT,
            term=self.term,
            epoch_from=0,
            epoch_to=self.epoch,
            rows=rows,
            digest=digest,
            signer=signer or f"agent-{self.holder.name}",
            signature=head.signature,
        )

    def appoint_itself(self, term: int, *, at_ms: int = NOW_MS) -> None:
        """As its term's holder, once: it signs one more epoch of its old term, in which it is sound and has
        administrators of its own, and begins *term* on that. They approve of it.
        """
        name = self.holder.name
        self.epoch += 1
        mine = cast("EnvironmentBody", read_body(Kind.ENVIRONMENT, self.rows[Kind.ENVIRONMENT, name].body))
        sound = msgspec.structs.replace(mine, state=EnvironmentState.ACTIVE, registry_key_exposed=False)
        self.put(Kind.ENVIRONMENT, name, sound)
        for kind, row_id, body in INVENTED.rows():
            self.put(kind, row_id, body)
        self.follow_itself(term, at_ms=at_ms)

    def follow_itself(self, term: int, *, at_ms: int = NOW_MS) -> None:
        """It begins *term* on what it has signed last; its administrators approve of it."""
        self.seen = self.delta()
        base, name = self.seen.head, self.holder.name
        payload = promotion_payload(
            agent=f"agent-{name}", environment=name, registry_key=self.public,
            term=base.term, epoch=base.epoch, digest=base.digest,
        )  # fmt: skip
        approval, asked = INVENTED.approval(
            Action.ENVIRONMENT_PROMOTE, name, payload, by="mallory trent", at_ms=at_ms
        )
        shown = [(Kind.ENVIRONMENT, name), *((Kind.ADMIN, admin) for admin in INVENTED.keys)]
        self.begin(term, approval=approval, asked=used(asked), rows=tuple(self.rows[key] for key in shown))


def used(asked: ApprovalBody) -> ApprovalBody:
    return msgspec.structs.replace(asked, used_at_ms=asked.requested_at_ms, used_for="-")
