"""Spools: bounded all together, nameless, read as often as wanted, gone when closed."""

import os
import resource
from pathlib import Path

import pytest

from envelope.errors import MisuseError
from proxy import refusals
from proxy.bodies.spool import MEMORY_BYTES, PIECE_BYTES, Spool, Spools
from proxy.refusals import RefusedError


async def whole(spool: Spool) -> bytes:
    return b"".join([piece async for piece in spool.pieces()])


@pytest.mark.parametrize("size", [0, 1, MEMORY_BYTES, MEMORY_BYTES + 1, 3 * PIECE_BYTES + 7])
@pytest.mark.parametrize("step", [100_000, MEMORY_BYTES, 1 << 24])
async def test_what_was_written_is_read_as_often_as_wanted(tmp_path: Path, size: int, step: int) -> None:
    spools = Spools(directory=tmp_path)
    content = os.urandom(size)
    with spools.open("acme") as spool:
        for at in range(0, size, step):
            spool.write(content[at : at + step])
        assert spool.size_bytes == spools.held_bytes == size
        assert await whole(spool) == await whole(spool) == content
        assert spool.read(size // 3, size // 2) == content[size // 3 : size // 2]
        part = [piece async for piece in spool.pieces(size // 3, size // 2)]
        assert b"".join(part) == content[size // 3 : size // 2]
        assert os.listdir(tmp_path) == []  # noqa: PTH208 - it has no name
    assert spools.held_bytes == 0


def test_all_together_are_bounded() -> None:
    spools = Spools(limit_bytes=1000, share=1)
    first, second = spools.open("acme"), spools.open("globex")
    first.write(bytes(600))
    with pytest.raises(RefusedError) as caught:
        second.write(bytes(401))
    assert caught.value.refusal is refusals.SPOOL_FULL
    second.write(bytes(400))
    first.close()
    first.close()
    assert spools.held_bytes == 400
    second.write(bytes(600))
    second.close()
    forgotten = spools.open("acme")
    forgotten.write(bytes(1000))
    del forgotten
    assert spools.held_bytes == 0


def test_a_tenant_has_its_part() -> None:
    spools = Spools(limit_bytes=1000, share=0.5)
    with spools.open("acme") as first, spools.open("acme") as second, spools.open("globex") as other:
        first.write(bytes(400))
        with pytest.raises(RefusedError) as caught:
            second.write(bytes(101))
        assert caught.value.refusal is refusals.SPOOL_SHARE
        second.write(bytes(100))
        other.write(bytes(500))
        with spools.open("initech") as late, pytest.raises(RefusedError) as caught:
            late.write(b"x")
        assert caught.value.refusal is refusals.SPOOL_FULL
    assert spools.held_bytes == 0


def test_a_full_disk_is_a_refusal(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    spools = Spools(directory=tmp_path)
    with spools.open("acme") as spool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MEMORY_BYTES, hard))
        try:
            with pytest.raises(RefusedError) as caught:
                spool.write(bytes(2 * MEMORY_BYTES))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.refusal is refusals.SPOOL_FULL
    assert spools.held_bytes == 0


def test_a_directory_that_is_not_there_is_a_refusal(tmp_path: Path) -> None:
    with Spools(directory=tmp_path / "absent").open("acme") as spool, pytest.raises(RefusedError):
        spool.write(bytes(2 * MEMORY_BYTES))


def test_what_was_not_written_is_not_read() -> None:
    spool = Spools().open("acme")
    spool.write(b"abc")
    for start, stop in ((0, 4), (-1, 2), (2, 1)):
        with pytest.raises(MisuseError):
            spool.read(start, stop)
    spool.close()
    with pytest.raises(MisuseError):
        spool.read(0, 0)
    with pytest.raises(MisuseError):
        spool.write(b"x")
