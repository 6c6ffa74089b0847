"""The administrator's commands on administrators and approvals: `key-agent admin ...`, `approval ...`.

1. Who signs never gives the agent a private key: it gets a signature, and judges it (approvals.py).
2. As long as there are fewer administrators than an approval needs, whoever controls the agent names them,
   and the audit log shows it. From then on each change among them takes an approval.
3. Administrators and approvals are signed rows: every agent judges by the same ones.
"""

import os
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

import msgspec

from envelope.errors import FormatError
from envelope.keys import KeyId, check_name
from key_agent.environments.changes.incident_changes import use_approval
from key_agent.environments.commands.environment_commands import EnvironmentCommands
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action, ApprovalError
from key_agent.environments.shared.documents import AdminBody, AdminState, ApprovalBody, Kind
from key_agent.operations.commands import Json
from key_agent.reencryption import losses
from key_agent.reencryption.ledger import FileLedger
from key_agent.registry.access import RefusedChangeError

if TYPE_CHECKING:
    from key_agent.environments.incidents.incident_parts import IncidentParts
    from key_agent.environments.shared.draft import Draft
    from key_agent.environments.shared.shared_view import Shared

MAX_ADMINS: Final = 32


class _Retirement(msgspec.Struct, frozen=True):
    accept_loss: bool
    keys: tuple[str, ...]


class ApprovalCommands(EnvironmentCommands):
    def _parts(self) -> "IncidentParts":
        parts = self._environments().incident_parts
        if parts is None:
            raise RefusedChangeError(
                "this agent has no part in incidents yet", "restart it: see its log for the reason"
            )
        return parts

    @property
    def _view(self) -> "Shared":
        return self._environments().peering.view

    # Administrators.

    async def admin_list(self) -> Json:
        """Who may approve."""
        return {
            "required": approvals.REQUIRED,
            "admins": [msgspec.to_builtins(body) for _, body in sorted(self._view.admins.items())],
        }

    async def admin_add(
        self, *, admin: str, public_key_pem: str, approval: str | None = None, by: str = ""
    ) -> Json:
        """Make an administrator known. From the third on with an approval."""
        try:
            check_name("administrator", admin)
        except FormatError as error:
            raise RefusedChangeError(str(error), "give a short name in lower case") from None
        public_key = approvals.read_public_key(public_key_pem)
        await self._agent.journal.record("admin-add", outcome="begun", admin=admin, by=by)
        now_ms = self._agent.now_ms()

        def change(draft: "Draft") -> None:
            known = draft.shared.admins.get(admin)
            if known is not None and known.state is AdminState.ACTIVE and known.public_key == public_key:
                return
            active = _active(draft.shared)
            if known is not None and known.state is AdminState.ACTIVE:
                raise RefusedChangeError(
                    f"{admin} is known with another key", f"`key-agent admin remove {admin}` first"
                )
            if any(body.public_key == public_key for body in active.values()):
                raise RefusedChangeError(
                    "another administrator has this key", "each one has a key of their own"
                )
            if len(active) >= MAX_ADMINS:
                raise RefusedChangeError(f"there are {MAX_ADMINS} administrators", "remove one first")
            self._check_change(draft, Action.ADMIN_ADD, admin, {"public_key": public_key}, approval)
            body = AdminBody(
                name=admin,
                public_key=public_key,
                state=AdminState.ACTIVE,
                added_at_ms=now_ms,
                added_by=approval or by or "whoever controls the agent",
            )
            draft.put(Kind.ADMIN, admin, body)

        await self._parts().incidents.write(change)
        await self._agent.journal.record("admin-add", admin=admin, by=by)
        return {"admin": admin, "public_key": public_key, "spread": await self._parts().incidents.tell()}

    async def admin_remove(self, *, admin: str, approval: str | None = None, by: str = "") -> Json:
        """An administrator's signatures count no more."""
        await self._agent.journal.record("admin-remove", outcome="begun", admin=admin, by=by)

        def change(draft: "Draft") -> None:
            known = draft.shared.admins.get(admin)
            if known is None:
                raise RefusedChangeError(f"there is no administrator {admin}", "`key-agent admin list`")
            if known.state is AdminState.REMOVED:
                return
            if len(_active(draft.shared)) == approvals.REQUIRED:
                raise RefusedChangeError(
                    f"{approvals.REQUIRED} administrators are left, and so many are needed",
                    "`key-agent admin add` another one first",
                )
            self._check_change(draft, Action.ADMIN_REMOVE, admin, {}, approval)
            draft.put(Kind.ADMIN, admin, msgspec.structs.replace(known, state=AdminState.REMOVED))

        await self._parts().incidents.write(change)
        await self._agent.journal.record("admin-remove", admin=admin, by=by)
        return {"admin": admin, "spread": await self._parts().incidents.tell()}

    def _check_change(
        self,
        draft: "Draft",
        action: Action,
        admin: str,
        payload: dict[str, object],
        approval: str | None,
    ) -> None:
        """Rule 2."""
        if len(_active(draft.shared)) < approvals.REQUIRED:
            return
        if approval is None:
            raise RefusedChangeError(
                "a change among the administrators takes an approval",
                f"`key-agent approval request {action} {admin}`, then --approve-with ID",
            )
        use_approval(
            draft,
            approval,
            tenant=self._environments().peering.tenant,
            action=action,
            subject=admin,
            payload=payload,
            now_ms=self._agent.now_ms(),
        )

    # Approvals.

    async def approval_request(
        self,
        *,
        action: str,
        subject: str,
        payload: dict[str, Any],
        by: str = "",
        valid_s: int = approvals.VALIDITY_S,
    ) -> Json:
        """Ask two administrators: the statement that they sign."""
        try:
            kind = Action(action)
        except ValueError:
            raise RefusedChangeError(
                f"nothing called {action!r} takes an approval", "one of " + ", ".join(Action)
            ) from None
        if not 60 <= valid_s <= approvals.MAX_VALIDITY_S:
            raise RefusedChangeError(
                f"{valid_s} s is no time for an approval", f"give 60 to {approvals.MAX_VALIDITY_S} seconds"
            )
        now_ms = self._agent.now_ms()
        text = approvals.payload_text(payload)
        if len(text) > approvals.MAX_PAYLOAD_BYTES:
            raise RefusedChangeError("too much for one approval", "ask for several")
        approval_id = f"a-{os.urandom(8).hex()}"
        body = ApprovalBody(
            action=kind,
            subject=subject,
            payload=text,
            payload_sha256=approvals.payload_sha256(text),
            requested_by=by or "whoever controls the agent",
            requested_at_ms=now_ms,
            expires_at_ms=now_ms + valid_s * 1000,
            signatures={},
        )
        await self._agent.journal.record(
            "approval-request", approval=approval_id, wanted=kind, subject=subject, by=by
        )
        await self._parts().incidents.write(lambda draft: draft.put(Kind.APPROVAL, approval_id, body))
        return self._approval_json(approval_id, body)

    async def approval_show(self, *, approval: str) -> Json:
        """One approval, and the statement to sign; of a loss that it accepts, what is known of it."""
        body = self._approval(approval)
        given_up = _given_up(body)
        loss = await self._known_loss(given_up) if given_up else None
        return {**self._approval_json(approval, body), "loss": loss}

    async def _known_loss(self, keys: Collection[str]) -> Json:
        """As re-encryptions on this machine know it. LedgerError."""
        return losses.known_loss(await FileLedger(self._environments().state_dir).all(), keys)

    async def approval_list(self) -> Json:
        """All of them, the newest first."""
        found = sorted(self._view.approvals.items(), key=lambda one: -one[1].requested_at_ms)
        return {"approvals": [self._approval_json(name, body) for name, body in found]}

    async def approval_sign(self, *, approval: str, admin: str, signature: str) -> Json:
        """Add an administrator's signature. The agent never sees the key it was made with."""
        self._approval(approval)
        await self._agent.journal.record("approval-sign", outcome="begun", approval=approval, admin=admin)
        tenant = self._environments().peering.tenant

        def change(draft: "Draft") -> None:
            body = draft.shared.approvals[approval]
            signer = draft.shared.admins.get(admin)
            if signer is None or signer.state is not AdminState.ACTIVE:
                raise ApprovalError("admin", f"there is no administrator {admin}", "`key-agent admin list`")
            if body.used_at_ms is not None:
                raise ApprovalError("used", f"approval {approval} is used up", "ask for another one")
            approvals.check_open(approval, body, now_ms=self._agent.now_ms())
            approvals.check_signature(signer, approvals.statement(tenant, approval, body), signature)
            if body.signatures.get(admin) != signature:
                signed = body.signatures | {admin: signature}
                draft.put(Kind.APPROVAL, approval, msgspec.structs.replace(body, signatures=signed))

        await self._parts().incidents.write(change)
        await self._agent.journal.record("approval-sign", approval=approval, admin=admin)
        await self._parts().incidents.tell()
        return self._approval_json(approval, self._approval(approval))

    def _approval(self, approval: str) -> ApprovalBody:
        if (body := self._view.approvals.get(approval)) is None:
            raise ApprovalError("unknown", f"there is no approval {approval}", "`key-agent approval list`")
        return body

    def _approval_json(self, approval: str, body: ApprovalBody) -> Json:
        tenant, now_ms = self._environments().peering.tenant, self._agent.now_ms()
        state = "open" if now_ms < body.expires_at_ms else "expired"
        if body.used_at_ms is not None:
            state = "used"
        return {
            "approval": approval,
            "state": state,
            **msgspec.to_builtins(body),
            "missing": max(0, approvals.REQUIRED - len(body.signatures)),
            "statement": approvals.statement(tenant, approval, body).decode("ascii"),
        }


def _given_up(body: ApprovalBody) -> frozenset[str]:
    """Keys whose loss it accepts. What is not written as `keys retire` compares it ends none."""
    if body.action != Action.KEYS_RETIRE:
        return frozenset()
    try:
        asked = msgspec.json.decode(body.payload, type=_Retirement)
        keys = frozenset(str(KeyId.parse(key)) for key in asked.keys)
    except (msgspec.MsgspecError, FormatError):
        return frozenset()
    return keys if asked.accept_loss else frozenset()


def _active(shared: "Shared") -> dict[str, AdminBody]:
    return {name: body for name, body in shared.admins.items() if body.state is AdminState.ACTIVE}
