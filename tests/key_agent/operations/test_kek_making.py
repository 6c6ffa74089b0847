"""What kind of KEK can be wished for, and that nothing of the HSM's owner is touched."""

import pytest

from key_agent.operations.kek_making import KekWish, wish_of
from key_agent.registry.store import RefusedChangeError
from key_agent.sources.source import KekReference, KekType
from tests.key_agent.conftest import Bench


def test_words_become_a_wish() -> None:
    assert wish_of() == KekWish()
    assert not wish_of().adopts
    wish = wish_of(kek_type="rsa-3072", valid_days=365, hsm_label="bank-kek", hsm_id="00ff")
    assert wish == KekWish(
        kek_type=KekType.RSA_3072, valid_days=365, hsm_label="bank-kek", hsm_id=b"\x00\xff"
    )
    assert wish.adopts


@pytest.mark.parametrize(
    "words",
    [
        {"kek_type": "des"},
        {"hsm_id": "xx", "hsm_label": "a"},
        {"hsm_id": "00"},
        {"hsm_label": "a"},
        {"hsm_label": "", "hsm_id": "00"},
        {"hsm_label": "a" * 65, "hsm_id": "00"},
        {"valid_days": 0},
        {"valid_days": 40_000},
    ],
)
def test_other_words_are_refused(words: dict[str, str]) -> None:
    with pytest.raises(RefusedChangeError):
        wish_of(**words)  # type: ignore[arg-type]


async def test_a_kek_gets_the_end_that_was_wished_for(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        await operations.kek_create(valid_days=30)
        row = await agent.registry.current_kek()
        assert row is not None
        assert row.kek is not None
        assert row.kek.valid_until_s == int(bench.clock.wall_s()) + 30 * 86_400


async def test_a_refused_adoption_leaves_no_kek_and_no_harm(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        with pytest.raises(Exception, match="bank-kek"):
            await operations.kek_create(hsm_label="bank-kek", hsm_id="01")
        assert await agent.registry.current_kek() is None
        await operations.kek_create()
        assert len(bench.source.keks) == 1


async def test_a_key_of_the_hsms_owner_is_adopted_and_keys_move_to_the_next(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        bench.source.make_key(_named("bank-kek", b"\x01"))
        await operations.kek_create(hsm_label="bank-kek", hsm_id="01")
        await bench.provision(operations)
        row = await agent.registry.current_kek()
        assert row is not None
        assert row.kek is not None
        assert row.kek.is_adopted
        assert row.reference.label == "bank-kek"
        bench.source.make_key(_named("bank-kek-2", b"\x02"))
        result = await operations.kek_rotate(hsm_label="bank-kek-2", hsm_id="02")
        assert (result["label"], result["moved"]) == ("bank-kek-2", 1)


async def test_no_rotation_to_the_very_key_that_it_would_destroy_at_its_end(bench: Bench) -> None:
    async with bench.agent() as (agent, operations):
        bench.source.make_key(_named("bank-kek", b"\x01"))
        await operations.kek_create(hsm_label="bank-kek", hsm_id="01")
        await bench.provision(operations)
        with pytest.raises(RefusedChangeError, match="in the HSM is KEK"):
            await operations.kek_rotate(hsm_label="bank-kek", hsm_id="01")
        with pytest.raises(RefusedChangeError, match="in the HSM is KEK"):
            await operations.kek_rotate(hsm_label="bank-kek-01", hsm_id="")
        assert len(bench.source.keks) == 1
        assert len(await agent.registry.keks()) == 1
        assert (await operations.kek_rotate())["moved"] == 1


def _named(label: str, object_id: bytes) -> KekReference:
    """As the HSM's owner knows it."""
    return KekReference(kek_id="", label=label, object_id=object_id, environment_id="")
