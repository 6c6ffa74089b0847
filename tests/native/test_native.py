"""cryptography's own Cobblestone-256 (>= 50) judges ours: it opens what we seal, we open what it seals, and
it refuses what we refuse.

It lives in a second environment, because mitmproxy holds the main one below 49: `.venv-native`, or the
interpreter that SEALGATE_NATIVE_PYTHON names. `make test` makes it. If it is missing these tests fail and say
how.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest

from envelope import derive, fields
from envelope.base64url import b64u_decode
from envelope.cobblestone import MessageOpener, MessageSealer
from envelope.errors import FormatError, IntegrityError, SealgateError
from envelope.objects import CHUNK_SIZE, HEADER_SIZE, Bind, Header, Opener
from tests.envelope.samples import (
    BOUNDARY_LENGTHS,
    FIELD_KEY,
    KEY_ID,
    OBJECT_KEY,
    OWNER,
    PATH,
    always,
    cut,
    pattern,
    run,
    seal,
)

ROOT: Final = Path(__file__).parents[2]
PYTHON: Final = Path(os.environ.get("SEALGATE_NATIVE_PYTHON", ROOT / ".venv-native" / "bin" / "python"))
HOW: Final = (
    f"{PYTHON} is missing. Make it with `make test`, or by hand:\n"
    "  python3 -m venv .venv-native && "
    ".venv-native/bin/pip install --require-hashes -r requirements-native.lock"
)

type Job = dict[str, Any]


def _judge(jobs: list[Job]) -> list[dict[str, str]]:
    if not PYTHON.exists():
        pytest.fail(HOW, pytrace=False)
    done = subprocess.run(
        [PYTHON, "-I", str(Path(__file__).with_name("judge.py"))],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, f"{done.stderr}\n{HOW}"
    answer = json.loads(done.stdout)
    assert int(answer["version"].split(".")[0]) >= 50
    assert len(answer["results"]) == len(jobs)
    results: list[dict[str, str]] = answer["results"]
    return results


def _job(
    do: str, data: bytes, *, key: bytes = OBJECT_KEY, context: bytes | None = None, step: int = 10**6
) -> Job:
    return {
        "do": do,
        "key": key.hex(),
        "context": (_context() if context is None else context).hex(),
        "data": data.hex(),
        "step": step,
    }


def _context(bind: Bind = Bind.NOTHING, name: bytes = b"") -> bytes:
    header = Header(KEY_ID, bind).encode()
    return derive.lp(b"sealgate/v1 body") + header + derive.scope(OWNER) + derive.lp(name)


def test_it_opens_what_we_seal() -> None:
    cases = [(size, step) for size in BOUNDARY_LENGTHS for step in (100, 16400, 10**6)]
    jobs = [_job("open", seal(pattern(size))[HEADER_SIZE:], step=step) for size, step in cases]
    named = seal(b"hello", bind=Bind.NAME, name=b"/a")[HEADER_SIZE:]
    jobs.append(_job("open", named, context=_context(Bind.NAME, b"/a")))
    token = fields.seal_field(FIELD_KEY, OWNER, KEY_ID, path=PATH, value=b"hello")
    parts = (b"sealgate/v1 field", KEY_ID.raw, b"tenant-a", b"drive", PATH.encode())
    field_context = b"".join(map(derive.lp, parts))
    jobs.append(_job("open", b64u_decode(token.split(".")[2]), key=FIELD_KEY, context=field_context))
    expected = [pattern(size) for size, _ in cases] + [b"hello", b"hello"]
    assert _judge(jobs) == [{"data": plain.hex()} for plain in expected]


def test_we_open_what_it_seals() -> None:
    cases = [(size, step) for size in BOUNDARY_LENGTHS for step in (1000, 10**6)]
    sealed = _judge([_job("seal", pattern(size), step=step) for size, step in cases])
    for (size, step), answer in zip(cases, sealed, strict=True):
        stored = Header(KEY_ID).encode() + bytes.fromhex(answer["data"])
        assert run(Opener(OWNER, always()), cut(stored, step)) == pattern(size)


def test_it_refuses_what_we_refuse() -> None:
    plain = pattern(CHUNK_SIZE + 50)
    message = seal(plain)[HEADER_SIZE:]
    full = seal(pattern(CHUNK_SIZE))[HEADER_SIZE:]
    records = list(cut(message[56:], 16400))
    damaged = [
        message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :] for at in range(0, len(message), 97)
    ]
    damaged += [
        message[:size] for size in (0, 1, 55, 56, 57, 71, 72, 56 + 16400, 56 + 16416, len(message) - 1)
    ]
    damaged += [message + tail for tail in (b"\0", bytes(16), bytes(16400), message)]
    damaged += [full[: 56 + 16400], full + bytes(16), full[56:] + full[:56]]
    damaged += [message[:56] + b"".join(order) for order in (records[::-1], records[:1] * 2, records[1:])]
    jobs = [_job("open", data) for data in damaged]
    jobs.append(_job("open", message, key=bytes(range(50, 82))))
    jobs.append(_job("open", message, context=_context(Bind.NAME, b"/a")))
    for job, answer in zip(jobs, _judge(jobs), strict=True):
        assert "refused" in answer
        opener = MessageOpener((bytes.fromhex(job["key"]),), bytes.fromhex(job["context"]))
        with pytest.raises(SealgateError) as refusal:
            run(opener, [bytes.fromhex(job["data"])])
        assert isinstance(refusal.value, FormatError | IntegrityError)


def test_it_judges_at_all() -> None:
    """An untouched message among damaged ones opens: it does not simply refuse everything."""
    message = run(MessageSealer(OBJECT_KEY, b"c"), [b"hello"])
    good, bad = _judge([_job("open", message, context=b"c"), _job("open", message, context=b"d")])
    assert good == {"data": b"hello".hex()}
    assert "refused" in bad
