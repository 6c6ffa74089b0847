"""A key's wraps are erased when its end is meant; a row that says DESTROYED erases nothing by itself."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from envelope.keys import KeyState
from key_agent.environments import approvals
from key_agent.environments.approvals import Action
from key_agent.environments.documents import AdminBody, AdminState, ApprovalBody, Kind
from key_agent.environments.endings import may_erase
from tests.key_agent.environments.registries import ADMINS, KID, NOW_MS, TENANT, Holder, key, registry_of

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
    ],
    ids=[
        "another-key",
        "one-signature",
        "not-used",
        "another-name",
        "another-action",
        "expired",
        "no-payload",
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


def test_a_key_that_was_never_active_goes_with_its_wraps() -> None:
    coming = key("a", KeyState.PRE_ACTIVE)
    assert may_erase(TENANT, {KID: (coming, key("a", DESTROYED))}, {}, {}) == {KID}
    was_active = key("a", DESTROYED, activated_at_ms=NOW_MS)
    assert may_erase(TENANT, {KID: (coming, was_active)}, {}, {}) == frozenset()
    assert may_erase(TENANT, {KID: (None, key("a", DESTROYED))}, {}, {}) == frozenset()
    assert may_erase(TENANT, {KID: (coming, key("a"))}, {}, {}) == frozenset()
    assert approvals.REQUIRED == 2
