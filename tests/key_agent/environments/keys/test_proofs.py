"""What is opened once is not opened again at once; whatever else there is, is."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import override

import pytest

from envelope.keys import KeyId, KeyUse, NetworkService, SigningAlgorithm
from key_agent.environments.keys.proofs import KEPT_S, Proofs
from key_agent.errors import KekRevokedError, KeySourceError
from key_agent.sources.source import (
    EnvelopeRequest,
    EnvelopeResult,
    Kek,
    KekReference,
    NewKey,
    WrapMethod,
    WrappedKey,
)
from key_agent.sources.verdict import Verdict
from tests.fakes.clock import ManualClock
from tests.fakes.key_source import FakeKeySource

REFERENCE = KekReference(kek_id="kek-b", label="sealgate", object_id=b"1", environment_id="b")


@dataclass
class CountingSource(FakeKeySource):
    opened: list[KeyId] = field(default_factory=list)

    @override
    async def seal_envelopes(self, kek: Kek, requests: Sequence[EnvelopeRequest]) -> list[EnvelopeResult]:
        self.opened += [key.key_id for request in requests for key, _ in request.keys]
        return await super().seal_envelopes(kek, requests)

    def asked(self) -> list[KeyId]:
        """Since the last time."""
        found, self.opened = self.opened, []
        return found


async def wrapped(source: FakeKeySource, count: int) -> tuple[Kek, list[WrappedKey]]:
    kek = await source.create_kek(REFERENCE)
    owner = NetworkService("acme", "files")
    return kek, await source.generate(kek, [NewKey(owner=owner) for _ in range(count)])


async def test_what_the_hsm_has_opened_is_not_opened_again_at_once_but_for_one() -> None:
    source, clock = CountingSource(), ManualClock()
    proofs = Proofs(clock)
    kek, keys = await wrapped(source, 3)
    assert await proofs.unopenable(source, kek, keys) == {}
    assert source.asked() == [key.key_id for key in keys]
    clock.shift(KEPT_S - 1)
    assert await proofs.unopenable(source, kek, keys) == {}
    assert source.asked() == [keys[0].key_id]  # the KEK works now


async def test_what_was_taken_in_counts_as_opened_and_what_is_new_is_opened() -> None:
    source = CountingSource()
    proofs = Proofs(ManualClock())
    kek, keys = await wrapped(source, 3)
    proofs.opened(keys[:2])
    assert await proofs.unopenable(source, kek, keys) == {}
    assert source.asked() == [keys[2].key_id]


async def test_after_a_while_everything_is_opened_again() -> None:
    source, clock = CountingSource(), ManualClock()
    proofs = Proofs(clock)
    kek, keys = await wrapped(source, 2)
    proofs.opened(keys)
    clock.shift(KEPT_S)
    await proofs.unopenable(source, kek, keys)
    assert source.asked() == [key.key_id for key in keys]


CHANGES: dict[str, Callable[[WrappedKey], WrappedKey]] = {
    "bytes": lambda key: replace(key, wrapped=key.wrapped[:-1] + bytes([key.wrapped[-1] ^ 1])),
    "check value": lambda key: replace(key, kcv=sha256(key.kcv).digest()[: len(key.kcv)]),
    "kek": lambda key: replace(key, kek_id="kek-c"),
    "owner": lambda key: replace(key, owner=NetworkService("acme", "mail")),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_a_row_that_was_changed_after_it_was_opened_is_found(change: str) -> None:
    source = CountingSource()
    proofs = Proofs(ManualClock())
    kek, keys = await wrapped(source, 2)
    proofs.opened(keys)
    wrong = CHANGES[change](keys[1])
    found = await proofs.unopenable(source, kek, [keys[0], wrong])
    assert list(found) == [wrong.key_id]
    assert source.asked() == [wrong.key_id]


OTHER_PLACES: dict[str, Callable[[WrappedKey], WrappedKey]] = {
    "environment": lambda key: replace(key, environment_id="c"),
    "method": lambda key: replace(key, method=WrapMethod.RSA_OAEP_256),
    "token": lambda key: replace(key, token_serial=f"{key.token_serial}0"),
    "use": lambda key: replace(key, use=KeyUse.SIGN, algorithm=SigningAlgorithm.ES256),
}


@pytest.mark.parametrize("change", OTHER_PLACES)
async def test_a_row_that_says_another_place_or_use_is_opened_again(change: str) -> None:
    source = CountingSource()
    proofs = Proofs(ManualClock())
    kek, keys = await wrapped(source, 2)
    proofs.opened(keys)
    await proofs.unopenable(source, kek, [keys[0], OTHER_PLACES[change](keys[1])])
    assert source.asked() == [keys[1].key_id]


async def test_two_rows_that_were_exchanged_are_found() -> None:
    source = CountingSource()
    proofs = Proofs(ManualClock())
    kek, (one, two) = await wrapped(source, 2)
    proofs.opened([one, two])
    exchanged = [replace(one, wrapped=two.wrapped), replace(two, wrapped=one.wrapped)]
    assert set(await proofs.unopenable(source, kek, exchanged)) == {one.key_id, two.key_id}


async def test_what_does_not_open_any_more_is_not_remembered() -> None:
    source = CountingSource()
    proofs = Proofs(ManualClock())
    kek, keys = await wrapped(source, 2)
    proofs.opened(keys)
    source.spoil(keys[0].key_id)
    for _ in range(2):
        assert list(await proofs.unopenable(source, kek, keys)) == [keys[0].key_id]
        assert keys[0].key_id in source.asked()
    # It comes first no more, so nothing but its failure has it opened.
    assert list(await proofs.unopenable(source, kek, [keys[1], keys[0]])) == [keys[0].key_id]


async def test_what_is_too_old_takes_no_room_though_nobody_looks() -> None:
    source, clock = CountingSource(), ManualClock()
    proofs = Proofs(clock)
    _, keys = await wrapped(source, 4)
    for key in keys:
        proofs.opened([key])
        clock.shift(KEPT_S)
    assert len(proofs._opened_boot_s) == 1


async def test_a_kek_that_is_gone_proves_nothing_however_much_is_remembered() -> None:
    source = CountingSource()
    proofs = Proofs(ManualClock())
    kek, keys = await wrapped(source, 2)
    proofs.opened(keys)
    source.destroy(kek)
    with pytest.raises(KekRevokedError):
        await proofs.unopenable(source, kek, keys)
    source.bring_back(kek)
    source.fail(Verdict.UNREACHABLE)
    with pytest.raises(KeySourceError):
        await proofs.unopenable(source, kek, keys)


async def test_many_are_opened_in_batches_and_what_came_before_a_failure_counts() -> None:
    source = CountingSource()
    proofs = Proofs(ManualClock())
    kek, keys = await wrapped(source, 1001)
    hanging = asyncio.Event()

    def fail_the_second(method: str) -> None:
        if method == "seal_envelopes" and len(source.opened) > 500 and not hanging.is_set():
            hanging.set()
            source.fail(Verdict.UNREACHABLE)

    source.on_call = fail_the_second
    with pytest.raises(KeySourceError):
        await proofs.unopenable(source, kek, keys)
    assert source.asked() == [key.key_id for key in keys[:1000]]
    source.recover()
    assert await proofs.unopenable(source, kek, keys) == {}
    assert source.asked() == [key.key_id for key in keys[500:]]


async def test_nothing_is_asked_for_nothing() -> None:
    source = CountingSource()
    kek, _ = await wrapped(source, 1)
    assert await Proofs(ManualClock()).unopenable(source, kek, []) == {}
    assert source.asked() == []
