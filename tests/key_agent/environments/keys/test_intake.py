"""What is delivered is taken in only if the signed rows, the state and the HSM say so."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from envelope.keys import KeyId, KeyState, KeyUse
from key_agent.environments.keys.wrap_messages import Look, SealedKey, Stored
from key_agent.environments.shared.documents import Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.states import EnvironmentState
from key_agent.registry.states import KekState
from key_agent.sources.source import Rewrapped, Route
from tests.environments.key_site import FILES, KeySite, key_site
from tests.fakes.key_source import FakeKeySource
from tests.key_agent.environments.keys.parcels import parcels_for, put_state
from tests.pki import Tenant


@pytest.fixture
async def site(tmp_path: Path, acme: Tenant) -> AsyncIterator[KeySite]:
    async with key_site(tmp_path, acme, "ab") as made:
        await made.unite()
        await made["a"].manager.ensure_service(FILES, KeyUse.DATA, None)
        await made.keys_active()
        await made.in_step()
        yield made


async def test_what_is_in_the_hsm_when_its_environment_is_withdrawn_is_not_stored(
    site: KeySite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """System B, claim 7: a healing environment stores nothing that it is given."""
    delivery = await parcels_for(site, "b")
    await site["b"].sql("DELETE FROM dek_wrap")
    imported = site["b"].source.import_keys

    async def slow(*arguments: Any, **more: Any) -> Rewrapped:
        made: Rewrapped = await imported(*arguments, **more)
        await put_state(site, "b", EnvironmentState.HEALING)
        return made

    monkeypatch.setattr(site["b"].source, "import_keys", slow)
    found = await site["b"].wraps.intake.store(delivery, sender="agent-a")
    assert found.verified == ()
    assert set(found.failed) == {key.key_id for key in delivery.keys}
    assert await site["b"].wrapped() == {}


@pytest.mark.parametrize("state", [KekState.REVOKED, KekState.DEACTIVATED])
async def test_what_is_in_the_hsm_when_its_kek_is_taken_back_or_followed_is_not_stored(
    site: KeySite, monkeypatch: pytest.MonkeyPatch, state: KekState
) -> None:
    """The environment is sound, and says so: only the row of the KEK tells."""
    delivery = await parcels_for(site, "b")
    await site["b"].sql("DELETE FROM dek_wrap")
    imported, registry = site["b"].source.import_keys, site["b"].registry

    async def slow(*arguments: Any, **more: Any) -> Rewrapped:
        made: Rewrapped = await imported(*arguments, **more)
        await registry.set_kek_state(delivery.kek_id, state, "by the test", now_ms=site["b"].now_ms())
        return made

    monkeypatch.setattr(site["b"].source, "import_keys", slow)
    found = await site["b"].wraps.intake.store(delivery, sender="agent-a")
    assert (found.verified, set(found.failed)) == ((), {key.key_id for key in delivery.keys})
    assert await registry.wraps_under(delivery.kek_id) == 0


async def test_what_does_not_fit_the_signed_rows_is_stored_nowhere(site: KeySite) -> None:
    before = await site["b"].wrapped()
    good = await parcels_for(site, "b")
    one, two = good.keys

    async def stored(*keys: SealedKey, **changes: str) -> Stored:
        delivery = msgspec.structs.replace(good, keys=keys, **changes)
        return await site["b"].wraps.intake.store(delivery, sender="agent-a")

    flipped = msgspec.structs.replace(one, sealed=one.sealed[:-1] + bytes([one.sealed[-1] ^ 1]))
    exchanged = msgspec.structs.replace(one, sealed=two.sealed)
    unknown = msgspec.structs.replace(one, key_id="77" * 16)
    other_route = msgspec.structs.replace(one, route=Route.PUBLIC)
    for wrong in (flipped, exchanged, unknown, other_route, msgspec.structs.replace(one, sealed=b"")):
        found = await stored(wrong)
        assert (found.verified, list(found.failed)) == ((), [wrong.key_id])
    assert (await stored(one, kek_id="kek-a")).verified == ()
    assert (await stored(one, environment="a")).verified == ()
    assert await site["b"].wrapped() == before
    # One bad parcel spoils no other.
    await site["b"].sql("DELETE FROM dek_wrap WHERE dek_id = :kid", kid=two.key_id)
    assert (await stored(flipped, two)).verified == (two.key_id,)
    assert await site["b"].opens(before)


async def test_what_was_taken_in_is_not_opened_again_at_once_unless_it_was_changed(site: KeySite) -> None:
    """The fake HSM would not open it any more: that is seen for a row that is another one now."""
    delivery = await parcels_for(site, "b")
    await site["b"].sql("DELETE FROM dek_wrap")
    kids = sorted((await site["b"].wraps.intake.store(delivery, sender="agent-a")).verified)
    source, kek = site["b"].source, await site["b"].kek()
    assert isinstance(source, FakeKeySource)
    look = Look(kek_id=kek.reference.kek_id, keys=tuple(kids), prove=True)
    held = [str(key.key_id) for key in await site["b"].registry.wrapped_keys(kek.reference.kek_id)]
    spoiled = next(kid for kid in kids if kid != held[0])  # one is always opened
    source.spoil(KeyId.parse(spoiled))
    assert await site["b"].wraps.intake.missing(look) == {}
    await site["b"].sql("UPDATE dek_wrap SET token_serial = 'another' WHERE dek_id = :kid", kid=spoiled)
    assert list(await site["b"].wraps.intake.missing(look)) == [spoiled]


async def test_a_destroyed_key_is_not_brought_back(site: KeySite) -> None:
    delivery = await parcels_for(site, "b")
    gone = delivery.keys[0].key_id

    def change(draft: Draft) -> None:
        body = draft.shared.deks[gone]
        draft.put(Kind.DEK, gone, msgspec.structs.replace(body, state=KeyState.DESTROYED))

    await site["a"].change(change)
    await site.in_step()
    assert gone not in await site["b"].wrapped()
    found = await site["b"].wraps.intake.store(delivery, sender="agent-a")
    assert gone in found.failed
    assert gone not in await site["b"].wrapped()
