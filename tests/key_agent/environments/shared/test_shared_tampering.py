"""Whatever somebody does to a database or the mark beside it: it is noticed, and nothing of it is served.

And what is restored from another environment is all of it, never older than what was here, and only what
the known agents have signed.
"""

import asyncio
import shutil
from pathlib import Path

import msgspec
import pytest

from envelope.errors import IntegrityError
from envelope.keys import KeyState
from key_agent.environments.shared.documents import Kind
from key_agent.environments.shared.shared_errors import RegistryTamperedError, StaleTermError
from key_agent.environments.states import EnvironmentState
from tests.key_agent.environments.registries import KID, Holder, key, registry_of

SUSPENDED = KeyState.SUSPENDED


async def _make(place: Path) -> None:
    async with registry_of(place, "a") as a, registry_of(place, "b") as b:
        await a.write(*a.first_rows())
        await a.write((Kind.ENVIRONMENT, "b", b.environment(state=EnvironmentState.JOINING)))
        b.shared.pin("agent-a", a.public)
        await b.take(await a.shared.since(0))
    shutil.copytree(place / "b", place / "b-old")
    async with registry_of(place, "a") as a, registry_of(place, "b") as b:
        # A signed row that says less than the one before it: what an attacker would like to undo.
        await b.take(await a.write((Kind.DEK, KID, key("a", SUSPENDED, suspended_from=KeyState.ACTIVE))))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tampering")
    asyncio.run(_make(place))
    return place


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy of both environments, to be spoilt."""
    shutil.copytree(made, tmp_path / "site")
    return tmp_path / "site"


async def tampered(b: Holder) -> str:
    with pytest.raises(RegistryTamperedError) as raised:
        await b.shared.verify()
    with pytest.raises(RegistryTamperedError):
        await b.shared.snapshot()  # it stays so
    return str(raised.value)


@pytest.mark.parametrize(
    "statement",
    [
        # Signed rows.
        "UPDATE shared_row SET body = replace(body, 'suspended', 'active') WHERE kind = 'dek'",
        "UPDATE shared_row SET term = 2 WHERE kind = 'dek'",
        "UPDATE shared_row SET epoch = 2 WHERE kind = 'dek'",
        "UPDATE shared_row SET signer = 'agent-b' WHERE kind = 'dek'",
        "UPDATE shared_row SET id = '33333333333333333333333333333333' WHERE kind = 'dek'",
        "UPDATE shared_row SET kind = 'nonsense' WHERE kind = 'dek'",
        "UPDATE shared_row SET signature = replace(signature, substr(signature, 1, 2), '00')",
        "UPDATE shared_row SET body = body || ' ' WHERE kind = 'service'",
        "DELETE FROM shared_row WHERE kind = 'dek'",
        "DELETE FROM shared_row",
        "INSERT INTO shared_row SELECT 'admin', id, term, 2, signer, body, signature FROM shared_row LIMIT 1",
        # The seal.
        "DELETE FROM shared_seal",
        "UPDATE shared_seal SET epoch = epoch + 1",
        "UPDATE shared_seal SET term = term + 1",
        "UPDATE shared_seal SET digest = '00'",
        "UPDATE shared_seal SET signature = '00'",
        # What refresh and push read.
        "UPDATE dek SET state = 'active'",
        "UPDATE dek SET kcv = x'00'",
        "UPDATE dek SET owner_environment_id = 'b'",
        "UPDATE dek SET version = 9",
        "UPDATE dek SET suspended_from = NULL",
        "UPDATE environment SET state = 'active' WHERE id = 'b'",
        "UPDATE network_service SET removed = 1",
        "UPDATE key_ring SET purpose = 'sign'",
        "UPDATE tenant SET home_environment_id = 'b'",
        "DELETE FROM dek",
    ],
)
async def test_an_edited_database_is_noticed(place: Path, statement: str) -> None:
    async with registry_of(place, "b") as b:
        await b.shared.verify()
        await b.sql(statement)
        await tampered(b)
    async with registry_of(place, "b") as b:  # a restart does not help
        await tampered(b)


async def test_an_older_database_is_noticed_though_every_row_of_it_is_signed(place: Path) -> None:
    for file in (place / "b").glob("registry.db*"):
        file.unlink()
    for file in (place / "b-old").glob("registry.db*"):
        shutil.copy(file, place / "b" / file.name)
    async with registry_of(place, "b") as b:
        assert "epoch 3 was here already" in await tampered(b)


async def test_a_mark_that_is_missing_foreign_damaged_or_newer_is_noticed(place: Path) -> None:
    async with registry_of(place, "b") as b, registry_of(place, "a") as a:
        good, foreign = b.mark.read_bytes(), a.mark.read_bytes()
        for content in (None, foreign, good[:-9], good.replace(b'"epoch":3', b'"epoch":2'), b"", b"\xff"):
            b.mark.unlink()
            if content is not None:
                b.mark.write_bytes(content)
            await tampered(b)
            b.mark.write_bytes(good)
            await b.shared.verify()


async def test_an_older_mark_of_ours_is_what_a_crash_leaves(place: Path) -> None:
    shutil.copy(place / "b-old" / "registry.mark", place / "b" / "registry.mark")
    async with registry_of(place, "b") as b:
        await b.shared.verify()
        assert b'"epoch":3' in b.mark.read_bytes()


async def test_what_was_tampered_with_is_replaced_by_what_another_environment_has(place: Path) -> None:
    async with registry_of(place, "a") as a, registry_of(place, "b") as b:
        await b.sql("UPDATE shared_row SET body = replace(body, 'suspended', 'active') WHERE kind = 'dek'")
        await b.sql("UPDATE dek SET state = 'active'")
        await tampered(b)
        await b.shared.restore(await a.shared.since(0), now_ms=1)
        await b.shared.verify()
        assert (await b.shared.snapshot()).deks[KID].state is SUSPENDED
        assert [row[0] for row in await b.sql("SELECT state FROM dek")] == ["suspended"]


async def test_nothing_older_than_what_was_here_is_restored(place: Path) -> None:
    async with registry_of(place, "a") as a, registry_of(place, "b") as b:
        everything = await a.shared.since(0)
        await b.take(await a.write((Kind.DEK, KID, key("a", KeyState.COMPROMISED))))
        await b.sql("DELETE FROM shared_seal")
        await tampered(b)
        with pytest.raises(StaleTermError):
            await b.shared.restore(everything, now_ms=1)


async def test_a_stranger_restores_nothing_though_the_database_vouches_for_it(place: Path) -> None:
    """Whoever can write the database can write an environment's row that names a key of their own."""
    async with registry_of(place, "b") as b, registry_of(place, "x") as x:
        await x.write(*x.first_rows())
        for state in (KeyState.SUSPENDED, KeyState.DEACTIVATED, KeyState.COMPROMISED):
            await x.write((Kind.DEK, KID, key("x", state)))
        theirs = await x.shared.since(0)
        (row,) = (row for row in theirs.rows if row.kind is Kind.ENVIRONMENT)
        await b.sql(
            "INSERT INTO shared_row VALUES (:kind, :id, :term, :epoch, :signer, :body, :signature)",
            **msgspec.structs.asdict(row) | {"kind": "environment"},
        )
        await tampered(b)
        with pytest.raises(IntegrityError):
            await b.shared.restore(theirs, now_ms=1)


async def test_who_is_known_by_the_mark_restores_what_the_rows_do_not_vouch_for(place: Path) -> None:
    async with registry_of(place, "a") as a, registry_of(place, "b") as b:
        await b.sql("DELETE FROM shared_row")
        await tampered(b)
        await b.shared.restore(await a.shared.since(0), now_ms=1)
        await b.shared.verify()
        assert set((await b.shared.snapshot()).environments) == {"a", "b"}
