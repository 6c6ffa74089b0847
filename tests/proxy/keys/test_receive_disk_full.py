"""The proxy's audit log on a disk that is full, for real. (On the way of messages: test_proxy_refusals.)"""

from pathlib import Path

import pytest

from envelope.audit import verify
from envelope.errors import KeyUnavailableError, Unavailable
from proxy.keys.cache import KeyCache
from proxy.keys.receive import Receiver
from runtime.audit import AuditLog, AuditUnavailableError
from tests.fakes.clock import ManualClock
from tests.proxy.keys.hosting import PROXY_ID, VALIDITY_S, directory_of, host_tenant
from tests.small_disk import small_disk


def _append_until_refused(audit: AuditLog) -> int:
    """The last page has room yet: for so many."""
    for number in range(10_000):
        try:
            audit.append("filling", durable=False)
        except AuditUnavailableError:
            return number
    raise AssertionError("a full disk takes everything")


async def test_no_keys_come_in_and_every_key_goes_out(tmp_path: Path) -> None:
    acme = host_tenant(tmp_path)
    clock = ManualClock()
    cache = KeyCache(clock)
    with small_disk(tmp_path / "disk", size_kib=256) as disk:
        audit = AuditLog.open(disk.path / "audit.jsonl", clock)
        receiver = Receiver(
            proxy_id=PROXY_ID,
            cache=cache,
            audit=audit,
            clock=clock,
            validity_s=VALIDITY_S,
            directory=directory_of(acme),
        )
        certificate = acme.signing.certificate
        challenge = receiver.sessions.open(
            acme.name, acme.agent_id, signing_certificate=certificate
        ).challenge

        async def push(*tokens: str) -> list[str]:
            receipts = await receiver.receive(acme.name, acme.agent_id, tokens)
            return [receipt.code or receipt.status for receipt in receipts]

        assert await push(acme.seal(clock, challenge, acme.key())) == ["accepted"]
        recorded = audit.head.seq
        disk.fill()
        recorded += _append_until_refused(audit)
        with pytest.raises(AuditUnavailableError, match="No space left on device"):
            audit.append("filling")
        late = acme.key(service="mail")
        assert await push(acme.seal(clock, challenge, late, service="mail")) == ["audit-unavailable"]
        with pytest.raises(KeyUnavailableError):
            cache.sealing_key(acme.owner("mail"))
        cache.sealing_key(acme.owner())  # what was acknowledged holds
        assert await push(acme.seal(clock, challenge)) == ["audit-unavailable"]
        with pytest.raises(KeyUnavailableError) as caught:
            cache.sealing_key(acme.owner())
        assert caught.value.reason is Unavailable.WITHDRAWN, "told, and done all the same"

        disk.clear()
        assert await push(acme.seal(clock, challenge, late, service="mail")) == ["accepted"]
        cache.sealing_key(acme.owner("mail"))
        audit.close()
        with audit.path.open("rb") as lines:
            assert verify(lines).seq > recorded
