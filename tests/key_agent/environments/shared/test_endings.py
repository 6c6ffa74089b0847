"""A key's wraps are erased when its end is meant; a row that says DESTROYED erases nothing by itself."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from envelope.errors import IntegrityError
from envelope.keys import KeyState
from key_agent.environments.shared import approvals
from key_agent.environments.shared.approvals import Action
from key_agent.environments.shared.documents import (
    AdminBody,
    AdminState,
    ApprovalBody,
    DekBody,
    Kind,
    ServiceBody,
)
from key_agent.environments.shared.endings import may_erase
from tests.key_agent.environments.forger import Forger
from tests.key_agent.environments.registries import (
    ADMINS,
    KID,
    NEXT_KID,
    NOW_MS,
    SERVICE,
    TENANT,
    Holder,
    key,
    registry_of,
)

DESTROYED = KeyState.DESTROYED
ADMIN_BODIES = {name: body for _, name, body in ADMINS.rows() if isinstance(body, AdminBody)}


def approval(*keys: str, by: str = "ann bob", accept_loss: bool = True) -> tuple[str, ApprovalBody]:
    payload: dict[str, object] = {"accept_loss": accept_loss, "keys": sorted(keys)}
    name, asked = ADMINS.approval(Action.KEYS_RETIRE, TENANT, payload, by=by)
    return name, msgspec.structs.replace(asked, used_at_ms=NOW_MS, used_for="keys-retire")


def changed(**changes: object) -> tuple[str, ApprovalBody]:
    name, asked = approval(KID)
    return name, msgspec.structs.replace(asked, **changes)


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[tuple[Holder, Holder]]:
    """The manager's, and another one that holds a wrap of the key."""
    async with AsyncExitStack() as stack:
        a, b = [await stack.enter_async_context(registry_of(tmp_path, name)) for name in "ab"]
        await a.write(*a.first_rows())
        await a.write((Kind.ENVIRONMENT, "b", b.environment()))
        b.shared.pin("agent-a", a.public)
        await b.take(await a.shared.since(0))
        await b.sql(
            "INSERT INTO kek (id, environment_id, version, label, object_id, state, state_since_ms, "
            "created_at_ms, updated_at_ms) VALUES ('kek-b', 'b', 1, 'kek-b', x'01', 'active', 1, 1, 1)"
        )
        await b.sql(
            "INSERT INTO dek_wrap (dek_id, kek_id, format, route, wrap_alg, wrapped, wrapped_sha256, "
            "token_serial, state, made_at_ms, verified_at_ms, created_at_ms, updated_at_ms) "
            "VALUES (:kid, 'kek-b', 1, 'kms', 'gcm', x'01', x'01', '-', 'verified', 1, 1, 1, 1)",
            kid=KID,
        )
        yield a, b


async def wraps(holder: Holder) -> int:
    return int((await holder.sql("SELECT count(*) FROM dek_wrap"))[0][0])


async def test_a_manager_alone_destroys_a_key_in_name_and_erases_nothing(
    pair: tuple[Holder, Holder],
) -> None:
    a, b = pair
    found = await b.take(await a.write((Kind.DEK, KID, key("a", DESTROYED))))
    assert found.deks[KID].state is DESTROYED
    assert [row[0] for row in await b.sql("SELECT state FROM dek")] == ["destroyed"]  # nobody uses it
    assert await wraps(b) == 1  # and it can be brought back


async def test_what_two_administrators_have_signed_is_erased(pair: tuple[Holder, Holder]) -> None:
    a, b = pair
    name, asked = approval(KID)
    await b.take(await a.write((Kind.APPROVAL, name, asked), (Kind.DEK, KID, key("a", DESTROYED))))
    assert await wraps(b) == 0


@pytest.mark.parametrize(
    "asked",
    [
        approval("33" * 16),
        approval(KID, by="ann"),
        changed(used_at_ms=None),
        ("a-0000000000000000", approval(KID)[1]),
        changed(action="admin-remove"),
        changed(used_at_ms=2**50),
        changed(payload="[]"),
        changed(payload='{"keys":' + "[" * 60_000),
    ],
    ids=[
        "another-key",
        "one-signature",
        "not-used",
        "another-name",
        "another-action",
        "expired",
        "no-payload",
        "no-bottom",
    ],
)
def test_an_approval_of_anything_else_erases_nothing(asked: tuple[str, ApprovalBody]) -> None:
    ended = {KID: (key("a"), key("a", DESTROYED))}
    assert may_erase(TENANT, ended, dict([asked]), ADMIN_BODIES) == frozenset()
    assert may_erase(TENANT, ended, dict([approval(KID)]), ADMIN_BODIES) == {KID}


def test_what_administrators_signed_counts_when_one_of_them_has_left() -> None:
    ended = {KID: (key("a"), key("a", DESTROYED))}
    left = ADMIN_BODIES | {"ann": msgspec.structs.replace(ADMIN_BODIES["ann"], state=AdminState.REMOVED)}
    assert may_erase(TENANT, ended, dict([approval(KID)]), left) == {KID}


USED = key("a", activated_at_ms=NOW_MS)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        (key("a"), key("a", KeyState.PRE_ACTIVE)),
        (key("a", KeyState.COMPROMISED), key("a", KeyState.PRE_ACTIVE)),
        (key("a", DESTROYED), key("a", KeyState.PRE_ACTIVE)),
        (USED, msgspec.structs.replace(USED, state=KeyState.PRE_ACTIVE)),
        (USED, key("a")),
        (USED, key("a", DESTROYED)),
    ],
    ids=["active", "compromised", "destroyed", "with-its-time", "time-cleared", "time-cleared-at-its-end"],
)
@pytest.mark.parametrize("whole", [False, True], ids=["delta", "everything"])
async def test_a_manager_alone_does_not_make_a_used_key_an_unused_one(
    pair: tuple[Holder, Holder], was: DekBody, now: DekBody, whole: bool
) -> None:
    """Its next word would be that the key is destroyed, and the wraps of an unused key go with it."""
    a, b = pair
    await b.take(await a.write((Kind.DEK, KID, was), (Kind.SERVICE, SERVICE, ServiceBody(removed=True))))
    before = await b.shared.snapshot()
    delta = await a.write((Kind.DEK, KID, now))
    with pytest.raises(IntegrityError, match="as if never used"):
        await b.take(await a.shared.since(0) if whole else delta)
    await a.write((Kind.DEK, KID, key("a", DESTROYED)))
    with contextlib.suppress(IntegrityError):
        await b.take(await a.shared.since(0))
    assert await wraps(b) == 1
    assert (await b.shared.snapshot()).epoch >= before.epoch
    await b.shared.verify()


async def test_a_manager_alone_leaves_no_row_out(pair: tuple[Holder, Holder]) -> None:
    """A key that was gone could come back as one that was never used."""
    a, b = pair
    forger = Forger(a, await a.shared.since(0))
    forger.epoch += 1
    forger.put(Kind.SERVICE, SERVICE, ServiceBody(removed=True))
    del forger.rows[Kind.DEK, KID]
    with pytest.raises(IntegrityError, match="is gone"):
        await b.take(forger.delta())
    assert (await b.shared.snapshot()).deks[KID].state is KeyState.ACTIVE
    # Neither does the next one, in a term that begins where this one ended.
    await b.promote(ADMINS)
    follower = Forger(b, await b.shared.since(0))
    del follower.rows[Kind.DEK, KID]
    with pytest.raises(IntegrityError, match="is gone"):
        await a.take(follower.delta())
    assert (await a.shared.snapshot()).deks[KID].state is KeyState.ACTIVE


async def test_what_the_losing_half_of_a_split_has_sealed_with_is_not_erased_by_the_other(
    pair: tuple[Holder, Holder], tmp_path: Path
) -> None:
    """c, promoted later, has never seen the key in use, and gives it up."""
    a, b = pair
    async with registry_of(tmp_path, "c") as c:
        coming = (Kind.DEK, NEXT_KID, key("a", KeyState.PRE_ACTIVE, 2))
        await b.take(await a.write((Kind.ENVIRONMENT, "c", c.environment()), coming))
        await b.sql("UPDATE dek_wrap SET dek_id = :kid", kid=NEXT_KID)
        c.shared.pin("agent-a", a.public)
        await c.take(await a.shared.since(0))
        for holder, at_ms in ((b, NOW_MS), (c, NOW_MS + 1)):
            signed = ADMINS.promotion(holder, await holder.shared.snapshot(), at_ms=at_ms)
            await holder.shared.begin_term(2, cause="-", now_ms=NOW_MS + 2, approval=signed)
        used = key("a", KeyState.ACTIVE, 2, activated_at_ms=NOW_MS)
        await b.write((Kind.DEK, KID, key("a", KeyState.DEACTIVATED)), (Kind.DEK, NEXT_KID, used), term=2)
        await b.take(await c.shared.since(0))
        found = await b.sql("SELECT state FROM dek WHERE id = :kid", kid=NEXT_KID)
        assert [row[0] for row in found] == ["deactivated"]  # it opens what it has sealed
        await b.shared.verify()
        given_up = (Kind.DEK, NEXT_KID, key("a", DESTROYED, 2))
        view = await b.take(await c.write(given_up, term=2))
        assert view.deks[NEXT_KID].state is DESTROYED
        assert await wraps(b) == 1
        await b.shared.verify()


async def test_a_key_that_another_history_left_out_does_not_come_back_as_an_unused_one(
    pair: tuple[Holder, Holder], tmp_path: Path
) -> None:
    """c's term goes on from before the key was made; then c, breached, invents it anew and destroys it."""
    a, b = pair
    async with registry_of(tmp_path, "c") as c:
        await b.take(await a.write((Kind.ENVIRONMENT, "c", c.environment())))
        c.shared.pin("agent-a", a.public)
        await c.take(await a.shared.since(0))
        used = (Kind.DEK, NEXT_KID, key("a", KeyState.DEACTIVATED, 2, activated_at_ms=NOW_MS))
        await b.take(await a.write(used))
        await b.sql("UPDATE dek_wrap SET dek_id = :kid", kid=NEXT_KID)
        await c.promote(ADMINS)
        await c.write((Kind.SERVICE, SERVICE, ServiceBody(rotate_after_days=9)), term=2)
        view = await b.take(await c.shared.since(0))
        assert NEXT_KID not in view.deks
        await b.shared.verify()
        for state in (KeyState.PRE_ACTIVE, DESTROYED):
            await b.take(await c.write((Kind.DEK, NEXT_KID, key("a", state, 2)), term=2))
            await b.shared.verify()
        assert await wraps(b) == 1


def test_a_key_that_was_never_active_goes_with_its_wraps() -> None:
    coming = key("a", KeyState.PRE_ACTIVE)
    assert may_erase(TENANT, {KID: (coming, key("a", DESTROYED))}, {}, {}) == {KID}
    was_active = key("a", DESTROYED, activated_at_ms=NOW_MS)
    assert may_erase(TENANT, {KID: (coming, was_active)}, {}, {}) == frozenset()
    assert may_erase(TENANT, {KID: (None, key("a", DESTROYED))}, {}, {}) == frozenset()
    assert may_erase(TENANT, {KID: (coming, key("a"))}, {}, {}) == frozenset()
    assert approvals.REQUIRED == 2
