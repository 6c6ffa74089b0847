"""The sealing core against `openssl speed` on the same machine: rows `core_seal` and `core_open`.

1. Ours: objects of 4 MiB in pieces of 64 KiB, the size in which bodies come from sockets; 16 KiB chunks, key
   derivation and framing included, every output buffer dropped at once as after a write to a socket.
2. Theirs: AES-256-GCM over one 16 KiB buffer, in place, over and over.
3. Both by CPU time (`openssl speed` counts that by itself), interleaved, medians of the rounds, one core.
4. OpenSSL 3.0 has no path for VAES, the OpenSSL inside `cryptography` has: hence two goals.
"""

import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from envelope import derive
from envelope.keys import KeyId, NetworkService
from envelope.objects import Opener, Sealer

ROUNDS: Final = 5
PIECE_BYTES: Final = 64 * 1024
OBJECT_BYTES: Final = 4 * 1024 * 1024
ROUND_S: Final = 0.6
BASELINE: Final = ("openssl", "speed", "-seconds", "1", "-evp", "aes-256-gcm", "-bytes", "16384")

_OWNER: Final = NetworkService("tenant-a", "drive")
_KEY_ID: Final = KeyId(bytes(range(16)))
_KEY: Final = derive.object_key(bytes(range(32)), _OWNER, _KEY_ID)


def run() -> list[dict[str, Any]]:
    """Two rows: GB/s of plaintext, the baseline's GB/s in the same rounds, the ratio of the medians."""
    plain = _pieces(bytes(OBJECT_BYTES))
    sealed = _pieces(_seal_whole(plain))
    rates: dict[str, list[float]] = {"core_seal": [], "core_open": [], "openssl": []}
    for _ in range(ROUNDS):
        rates["core_seal"].append(_rate(lambda: _seal(plain)))
        rates["openssl"].append(_openssl())
        rates["core_open"].append(_rate(lambda: _open(sealed)))
    baseline = statistics.median(rates["openssl"])
    return [_row(name, statistics.median(rates[name]), baseline) for name in ("core_seal", "core_open")]


def _row(name: str, value: float, baseline: float) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(value, 2),
        "unit": "GB/s",
        "baseline": round(baseline, 2),
        "baseline_name": "openssl speed, AES-256-GCM, 16 KiB",
        "ratio": round(value / baseline, 2),
        "goal": 1.5 if _has_vaes() else 0.9,
    }


def _pieces(data: bytes) -> list[memoryview]:
    view = memoryview(data)
    return [view[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]


def _seal_whole(pieces: list[memoryview]) -> bytes:
    sealer = Sealer(_KEY, _OWNER, _KEY_ID)
    return b"".join([*(sealer.update(piece) for piece in pieces), sealer.finalize()])


def _seal(pieces: list[memoryview]) -> None:
    sealer = Sealer(_KEY, _OWNER, _KEY_ID)
    for piece in pieces:
        sealer.update(piece)
    sealer.finalize()


def _open(pieces: list[memoryview]) -> None:
    opener = Opener(_OWNER, lambda _: _KEY)
    for piece in pieces:
        opener.update(piece)
    opener.finalize()


def _rate(work: Callable[[], None]) -> float:
    """GB/s of *work*, which handles OBJECT_BYTES, repeated for about ROUND_S of CPU time."""
    times = 0
    begin_s = now_s = time.process_time()
    while now_s - begin_s < ROUND_S:
        work()
        times += 1
        now_s = time.process_time()
    return times * OBJECT_BYTES / (now_s - begin_s) / 1e9


def _openssl() -> float:
    text = subprocess.run(BASELINE, check=True, capture_output=True, text=True).stdout
    found = re.search(r"^AES-256-GCM\s+([0-9.]+)k\s*$", text, re.MULTILINE | re.IGNORECASE)
    if found is None:
        raise ValueError(f"unexpected output of {' '.join(BASELINE)}:\n{text}")
    return float(found[1]) * 1000 / 1e9


def _has_vaes() -> bool:
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and re.search(r"^flags\s*:.*\bvaes\b", cpu.read_text(), re.MULTILINE) is not None
