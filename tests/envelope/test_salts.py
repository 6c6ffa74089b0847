"""A salt is used once: across seals, threads and forked processes (threat 14)."""

import inspect
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from envelope import cobblestone, fields, multipart, objects
from envelope.objects import Sealer
from tests.envelope.samples import KEY_ID, OBJECT_KEY, OWNER

ROOT: Final = Path(__file__).parents[2]

FORKING: Final = """
import os, sys
from tests.envelope.samples import KEY_ID, OBJECT_KEY, OWNER
from envelope.objects import Sealer
Sealer(OBJECT_KEY, OWNER, KEY_ID)
for _ in range(4):
    if os.fork() == 0:
        salts = b"".join(Sealer(OBJECT_KEY, OWNER, KEY_ID).finalize()[32:56] for _ in range(200))
        os.write(1, salts)
        os._exit(0)
for _ in range(4):
    assert os.wait()[1] == 0
"""


def test_a_million_salts() -> None:
    # Their first 8 bytes: a collision of honest ones has a chance of 3 in 10^8.
    seen = {int.from_bytes(cobblestone._fresh_salt()[:8]) for _ in range(10**6)}
    assert len(seen) == 10**6


def test_threads() -> None:
    def salts(_: int) -> list[bytes]:
        return [Sealer(OBJECT_KEY, OWNER, KEY_ID).finalize()[32:56] for _ in range(500)]

    with ThreadPoolExecutor(8) as pool:
        seen = [salt for batch in pool.map(salts, range(8)) for salt in batch]
    assert len(set(seen)) == 4000


def test_forked_processes() -> None:
    """In a process of its own: pytest's has threads."""
    out = subprocess.run([sys.executable, "-c", FORKING], cwd=ROOT, check=True, capture_output=True).stdout
    assert len({out[at : at + 24] for at in range(0, len(out), 24)}) == 800


def test_the_same_plaintext_twice_is_two_messages() -> None:
    one, other = (Sealer(OBJECT_KEY, OWNER, KEY_ID).finalize() for _ in range(2))
    assert one[:32] == other[:32]
    assert all(one[at:to] != other[at:to] for at, to in ((32, 56), (56, 88), (88, 104)))


def test_no_public_function_takes_a_salt() -> None:
    """But those that read: what derives the keys of a message must be told its salt."""
    takers = [
        f"{module.__name__}.{name}"
        for module in (cobblestone, objects, fields, multipart)
        for name, member in vars(module).items()
        if callable(member) and getattr(member, "__module__", "") == module.__name__
        if any("salt" in parameter for parameter in inspect.signature(member).parameters)
    ]
    assert takers == ["envelope.cobblestone.derive_message_keys"]
