"""Pushes while the audit log is full, on a real disk too, or hangs. (Of messages: test_proxy_refusals.)"""

import asyncio
import threading
from pathlib import Path
from typing import override

import pytest

from envelope.audit import verify
from envelope.errors import KeyUnavailableError, Unavailable
from envelope.keys import KeyMaterial
from proxy.keys.cache import KeyCache
from proxy.keys.receive import Receiver
from runtime.audit import AuditLog, AuditUnavailableError
from runtime.clock import Clock
from tests.fakes.clock import ManualClock
from tests.proxy.keys.hosting import PROXY_ID, VALIDITY_S, HostedTenant, directory_of, host_tenant
from tests.proxy.keys.receiving import Proxy
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


async def test_a_full_audit_log_refuses_keys_but_never_a_withdrawal(proxy: Proxy, acme: HostedTenant) -> None:
    challenge = proxy.challenge(acme)
    first, second = acme.key(), acme.key(service="mail")
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge, first)) == ["accepted"]
    proxy.audit.is_full = True
    sealed = acme.seal(proxy.clock, challenge, second, service="mail")
    assert await proxy.push(acme, sealed) == ["audit-unavailable"]
    with pytest.raises(KeyUnavailableError):
        proxy.cache.sealing_key(acme.owner("mail"))
    proxy.cache.sealing_key(acme.owner())
    assert await proxy.push(acme, acme.seal(proxy.clock, challenge)) == ["audit-unavailable"]
    with pytest.raises(KeyUnavailableError) as caught:
        proxy.cache.sealing_key(acme.owner())
    assert caught.value.reason is Unavailable.WITHDRAWN
    with pytest.raises(AuditUnavailableError):
        proxy.challenge(acme)
    proxy.audit.is_full = False
    assert await proxy.push(acme, sealed) == ["sequence"], "what was refused is used up"


class HungDisk(AuditLog):
    """Durable events hang from the moment `is_hung` is set, until `let` is."""

    is_hung = False

    def __init__(self, path: Path, clock: Clock, descriptor: int) -> None:
        super().__init__(path, clock, descriptor)
        self.let = threading.Event()

    @override
    def _sync(self) -> None:
        if self.is_hung:
            assert self.let.wait(30)
        super()._sync()


async def test_a_hung_audit_log_refuses_keys_in_time_and_holds_up_no_withdrawal(
    acme: HostedTenant, tmp_path: Path
) -> None:
    """The push API has a few places per tenant: pushes that wait for the disk must not keep them."""
    clock = ManualClock()
    audit, cache = HungDisk.open(tmp_path / "audit.jsonl", clock), KeyCache(clock)
    receiver = Receiver(
        proxy_id=PROXY_ID,
        cache=cache,
        audit=audit,
        clock=clock,
        validity_s=VALIDITY_S,
        directory=directory_of(acme),
        audit_patience_s=3.0,  # of a disk that is not hung, too
    )
    challenge = receiver.sessions.open(
        acme.name, acme.agent_id, signing_certificate=acme.signing.certificate
    ).challenge

    async def push(*keys: KeyMaterial) -> str:
        token = acme.seal(clock, challenge, *keys)
        (receipt,) = await receiver.receive(acme.name, acme.agent_id, [token])
        return receipt.code or receipt.status

    assert await push(acme.key()) == "accepted"
    held = cache.sealing_key(acme.owner())
    audit.is_hung = True
    hanging = [asyncio.create_task(push(acme.key())) for _ in range(12)]
    codes = await asyncio.wait_for(asyncio.gather(*hanging), 30)
    assert set(codes) == {"audit-unavailable"}
    held.check()
    withdrawing = asyncio.create_task(push())
    await asyncio.sleep(0)
    with pytest.raises(KeyUnavailableError):
        held.check()
    assert await withdrawing == "audit-unavailable", "withdrawn all the same, and the agent is told"
    audit.let.set()
    audit.is_hung = False
    assert await push(acme.key()) == "accepted"
    audit.close()


async def test_no_withdrawal_waits_for_the_event_of_the_one_before(
    acme: HostedTenant, tmp_path: Path
) -> None:
    clock = ManualClock()
    audit, cache = HungDisk.open(tmp_path / "audit.jsonl", clock), KeyCache(clock)
    receiver = Receiver(
        proxy_id=PROXY_ID,
        cache=cache,
        audit=audit,
        clock=clock,
        validity_s=VALIDITY_S,
        directory=directory_of(acme),
        audit_patience_s=30,
    )
    challenge = receiver.sessions.open(
        acme.name, acme.agent_id, signing_certificate=acme.signing.certificate
    ).challenge
    services = ("drive", "mail")
    keys = [acme.seal(clock, challenge, acme.key(service=name), service=name) for name in services]
    assert [r.status for r in await receiver.receive(acme.name, acme.agent_id, keys)] == ["accepted"] * 2
    audit.is_hung = True
    tokens = [acme.seal(clock, challenge, service=name) for name in services]
    push = asyncio.create_task(receiver.receive(acme.name, acme.agent_id, tokens))
    try:
        async with asyncio.timeout(30):
            while any(status.holds for status in cache.status(map(acme.owner, services))):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    finally:
        audit.let.set()
    assert [receipt.status for receipt in await push] == ["accepted"] * 2
    assert audit.path.read_text().count('"action":"keys-withdrawn"') == 2
    audit.close()
