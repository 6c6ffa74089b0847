"""Another registry key: killed at any point the next start goes on, and nobody slips a key in by it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from key_agent.environments.shared import registry_key_exchange as exchange
from key_agent.environments.shared.registry_key import NAME, public_text, read_or_make_registry_key
from key_agent.environments.shared.registry_key_exchange import NEXT_NAME, finish_exchange, make_next_key
from key_agent.environments.shared.shared import SharedRegistry
from key_agent.environments.shared.shared_errors import RegistryTamperedError
from tests.key_agent.environments.registries import Holder, registry_of


@pytest.fixture
async def holder(tmp_path: Path) -> AsyncIterator[Holder]:
    async with registry_of(tmp_path, "a") as made:
        await made.write(*made.first_rows())
        yield made


def used(holder: Holder) -> str:
    return public_text(read_or_make_registry_key(holder.directory))


async def verify(holder: Holder) -> int:
    """As an agent that starts reads it: its epoch."""
    key = read_or_make_registry_key(holder.directory)
    shared = await SharedRegistry.open(holder.registry, key=key, state_dir=holder.directory)
    await shared.verify()
    return (await shared.snapshot()).epoch


async def test_it_is_used_from_the_next_start_on_with_everything_that_was_signed(holder: Holder) -> None:
    before = used(holder)
    made = make_next_key(holder.directory)
    assert made != before
    assert (used(holder), await verify(holder)) == (before, 1), "nothing has changed yet"
    assert make_next_key(holder.directory) == made, "asked again it is the same one"
    assert await finish_exchange(holder.registry, holder.directory)
    assert (used(holder), await verify(holder)) == (made, 1)
    assert not (holder.directory / NEXT_NAME).exists()
    assert await finish_exchange(holder.registry, holder.directory) is False
    assert (holder.directory / NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("step", ["write_mark", "reseal", "_take_its_place"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_killed_at_any_point_the_next_start_goes_on(
    holder: Holder, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    made = make_next_key(holder.directory)

    class KilledError(Exception):
        pass

    work = getattr(exchange, step)

    def killed(*words: object) -> None:
        if after:
            work(*words)
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(exchange, step, killed)
        # A transaction that raises is none; what comes after the commit is the next step.
        with pytest.raises(KilledError):
            await finish_exchange(holder.registry, holder.directory)
    await finish_exchange(holder.registry, holder.directory)
    assert (used(holder), await verify(holder)) == (made, 1)


async def test_what_was_tampered_with_is_not_signed_anew(holder: Holder) -> None:
    """Rows of before that somebody has put back with a seal of another key, and a foreign mark."""
    before = used(holder)
    make_next_key(holder.directory)
    await holder.sql("UPDATE shared_seal SET signature = :signature", signature="00" * 64)
    assert await finish_exchange(holder.registry, holder.directory) is False
    assert used(holder) == before
    with pytest.raises(RegistryTamperedError):
        await verify(holder)


async def test_a_mark_of_another_key_is_not_signed_anew(holder: Holder) -> None:
    before = used(holder)
    make_next_key(holder.directory)
    holder.mark.write_bytes(holder.mark.read_bytes().replace(b'"epoch":1', b'"epoch":0'))
    assert await finish_exchange(holder.registry, holder.directory) is False
    assert used(holder) == before
    with pytest.raises(RegistryTamperedError):
        await verify(holder)
