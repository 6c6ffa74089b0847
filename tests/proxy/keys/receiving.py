"""A proxy that envelopes come to: a receiver with all its parts, on a clock that only the test moves."""

from pathlib import Path
from typing import override

from envelope.audit import Value
from proxy.keys.cache import KeyCache
from proxy.keys.receive import Receiver
from proxy.tenants.model import Directory
from runtime.audit import AuditLog, AuditUnavailableError
from tests.fakes.clock import ManualClock
from tests.proxy.keys.hosting import PROXY_ID, VALIDITY_S, HostedTenant


class FullDisk(AuditLog):
    """A real log, refused from the moment `is_full` is set."""

    is_full = False

    @override
    def append(self, action: str, *, outcome: str = "ok", durable: bool = True, **fields: Value) -> None:
        if self.is_full:
            raise AuditUnavailableError("cannot be written: No space left on device", "free the disk")
        super().append(action, outcome=outcome, durable=durable, **fields)


class Proxy:
    """The receiving side with all its parts."""

    def __init__(self, directory: Directory, path: Path) -> None:
        self.clock = ManualClock()
        self.cache = KeyCache(self.clock)
        self.audit = FullDisk.open(path / "audit.jsonl", self.clock)
        self.receiver = self._make(directory)

    def _make(self, directory: Directory) -> Receiver:
        return Receiver(
            proxy_id=PROXY_ID,
            cache=self.cache,
            audit=self.audit,
            clock=self.clock,
            validity_s=VALIDITY_S,
            directory=directory,
        )

    def restart(self) -> None:
        """Forget what a process forgets."""
        self.cache = KeyCache(self.clock)
        self.receiver = self._make(self.receiver.directory)

    def challenge(self, tenant: HostedTenant) -> bytes:
        certificate = tenant.signing.certificate
        return self.receiver.sessions.open(
            tenant.name, tenant.agent_id, signing_certificate=certificate
        ).challenge

    async def push(self, tenant: HostedTenant, *tokens: str) -> list[str]:
        """What became of each: `accepted` or the code."""
        receipts = await self.receiver.receive(tenant.name, tenant.agent_id, tokens)
        return [receipt.code or receipt.status for receipt in receipts]

    def events(self) -> str:
        return self.audit.path.read_text()
