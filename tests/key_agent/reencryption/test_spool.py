"""What was put aside comes back as it was, and what is on disk is nothing to read."""

import os
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag

from key_agent.reencryption.spool import PIECE_BYTES, Spool

WHOLE = 1000


@pytest.mark.parametrize(
    "length", [0, 1, WHOLE, WHOLE + 1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 7]
)
@pytest.mark.parametrize("step", [65536, PIECE_BYTES, 2 * PIECE_BYTES + 1])
async def test_it_comes_back_as_it_was_as_often_as_it_is_read(length: int, step: int) -> None:
    content = os.urandom(length)
    with Spool(whole_bytes=WHOLE) as spool:
        for start in range(0, length, step):
            await spool.write(content[start : start + step])
        assert spool.size_bytes == length
        for _ in range(2):
            assert b"".join([piece async for piece in spool.read()]) == content


async def test_what_is_small_needs_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with Spool(whole_bytes=4 * PIECE_BYTES) as spool:
        for _ in range(4):
            await spool.write(bytes(PIECE_BYTES))
        with pytest.raises(OSError, match="nowhere"):
            await spool.write(b"x")


async def test_the_disk_sees_neither_plaintext_nor_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with Spool(whole_bytes=0) as spool:
        await spool.write(b"secret" * PIECE_BYTES)
        assert spool._file is not None
        assert os.listdir(tmp_path) == []  # noqa: PTH208 - in a coroutine
        spool._file.seek(0)
        assert b"secret" not in spool._file.read()


async def test_pieces_that_changed_places_are_found() -> None:
    with Spool(whole_bytes=0) as spool:
        await spool.write(os.urandom(2 * PIECE_BYTES))
        assert spool._file is not None
        spool._file.seek(0)
        sealed = spool._file.read()
        half = len(sealed) // 2
        spool._file.seek(0)
        spool._file.write(sealed[half:] + sealed[:half])
        with pytest.raises(InvalidTag):
            [piece async for piece in spool.read()]
