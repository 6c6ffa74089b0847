"""What the audit log says of envelopes: events on disk, in a time that an agent waits.

1. One event for each envelope; those of one push are on disk together, by the sync of the last one.
2. A log that hangs is one that cannot be written: a push API with all its places waiting for a disk would
   take no withdrawal.
3. What is refused is refused though it cannot be recorded.
"""

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import structlog

from proxy.keys.envelopes import Opened
from runtime.audit import AuditLog, AuditUnavailableError

AUDIT_PATIENCE_S: Final = 5.0
"""For one event on disk. Less than an agent waits for its answer (10 s)."""

_log: Final = structlog.get_logger("keys.push_audit")


class PushAudit:
    def __init__(self, audit: AuditLog, *, patience_s: float, is_durable: bool) -> None:
        """*is_durable* False: another process has put the same events on disk, ours may follow."""
        self._audit = audit
        self._patience_s = patience_s
        self._is_durable = is_durable
        # Of its own: were the disk to hang, nobody else's work waits behind these events.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push-audit")

    async def accepted(self, envelopes: Sequence[Opened]) -> None:
        """Return when it is on disk that their keys are accepted. AuditUnavailableError: it may not be."""
        await self._recorded(functools.partial(self._append_accepted, envelopes))

    async def withdrawn(self, envelopes: Sequence[Opened]) -> None:
        """As `accepted`, for keys that are taken back."""
        await self._recorded(functools.partial(self._append_withdrawn, envelopes))

    def refused(self, tenant: str, agent_id: str, service: str | None, code: str) -> None:
        try:
            self._audit.append(
                "envelope-refused",
                outcome="refused",
                durable=False,
                tenant=tenant,
                agent=agent_id,
                service=service,
                code=code,
            )
        except AuditUnavailableError as unwritten:
            _log.error("audit log cannot be written", reason=str(unwritten))  # it is refused already

    async def _recorded(self, work: Callable[[], None]) -> None:
        """Return when *work* has its events on disk. AuditUnavailableError if it fails or takes too long."""
        try:
            async with asyncio.timeout(self._patience_s):
                await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except TimeoutError:
            raise AuditUnavailableError(
                f"{self._audit.path} did not take an event within {self._patience_s:g} s",
                "find out what the disk waits for",
            ) from None

    def _append_accepted(self, accepted: Sequence[Opened]) -> None:
        for number, opened in enumerate(accepted, start=1):
            claims = opened.claims
            self._audit.append(
                "keys-accepted",
                durable=self._is_durable and number == len(accepted),
                service=str(claims.owner),
                agent=claims.issuer,
                sequence=claims.sequence,
                operation=claims.operation.value,
                keys=len(claims.keys),
                expires_at_s=claims.expires_at_s,
            )

    def _append_withdrawn(self, withdrawn: Sequence[Opened]) -> None:
        for number, opened in enumerate(withdrawn, start=1):
            claims = opened.claims
            self._audit.append(
                "keys-withdrawn",
                durable=self._is_durable and number == len(withdrawn),
                service=str(claims.owner),
                agent=claims.issuer,
                sequence=claims.sequence,
            )
