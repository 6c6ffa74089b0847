"""Writes tests/vectors/sealgate-v1.json, the fixed vectors of docs/format.md.

    python -m tests.vectors.make            write the file
    python -m tests.vectors.make --check    exit status 1 if it would change

1. Deterministic: the only random input, salts, is replaced by fixed ones through the private seam of
   envelope/cobblestone.py. This tool is the only user of that seam; a test holds it to that.
2. Everything another implementation needs stands in the file: inputs, derived keys, contexts, outputs, and
   what must be refused with the reason.
3. Long plaintext is given by rule (`byte i = 7 i mod 256`) and its output by length and SHA-256.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from envelope import cobblestone, derive, fields, multipart, objects
from envelope.keys import ANONYMOUS, KeyId, NetworkService
from envelope.objects import Bind, Header, Sealer

FILE: Final = Path(__file__).with_name("sealgate-v1.json")

type Vector = dict[str, Any]

_OWNER: Final = NetworkService("tenant-a", "drive")
_KEY_ID: Final = KeyId(bytes(range(0xA0, 0xB0)))
_MATERIAL: Final = bytes(range(32))
_SALT: Final = bytes(range(0x40, 0x58))
_SALTS: Final = (_SALT, bytes(range(0x70, 0x88)), bytes(range(0x90, 0xA8)), bytes(range(0xB0, 0xC8)))
_UPLOAD: Final = bytes(range(0x60, 0x70))
_PATH: Final = "$.customer.name"
_NAME: Final = "/reports/Größe.txt".encode()
_LONGEST_IN_HEX: Final = 600

LENGTHS: Final = (0, 1, 15, 16, 1024, 16383, 16384, 16385, 32767, 32768, 2**20, 2**32 + 5, 2**52 - 1)


@contextlib.contextmanager
def fixed_salts(*salts: bytes) -> Iterator[None]:
    """Within, the messages sealed take *salts* one after the other; exactly as many must be sealed."""
    rest = iter(salts)
    original = cobblestone._fresh_salt
    cobblestone._fresh_salt = lambda: next(rest)
    try:
        yield
    finally:
        cobblestone._fresh_salt = original
    if next(rest, None) is not None:
        raise ValueError("a salt was not used")


def ruled_plain(size: int) -> bytes:
    return bytes(7 * index % 256 for index in range(size))


def document() -> Vector:
    """The whole file as JSON data."""
    return {
        "format": "SGT-1",
        "about": "Vectors of docs/format.md, written by tests/vectors/make.py. Bytes are hex, text UTF-8.",
        "material": _MATERIAL.hex(),
        "owner": {"tenant": _OWNER.tenant, "service": _OWNER.service},
        "key_id": str(_KEY_ID),
        "derived": _derived(),
        "lengths": [{"plain": plain, "sealed": objects.sealed_length(plain)} for plain in LENGTHS],
        "impossible_lengths": [0, 1, 88, 103, 88 + 16400, 88 + 16400 + 15, 88 + 2 * 16400],
        "objects": _objects(),
        "fields": _fields(),
        "composites": _composites(),
        "refused": _refused(),
    }


def _derived() -> Vector:
    return {
        "object_key": derive.object_key(_MATERIAL, _OWNER, _KEY_ID).hex(),
        "field_key": derive.field_key(_MATERIAL, _OWNER, _KEY_ID).hex(),
        "deterministic_key": derive.deterministic_key(_MATERIAL, _OWNER, _KEY_ID).hex(),
        "path": _PATH,
        "index_key": derive.index_key(_MATERIAL, _OWNER, _KEY_ID, _PATH).hex(),
        "fpe_key": derive.fpe_key(_MATERIAL, _OWNER, _KEY_ID, _PATH).hex(),
        "key_check_value": derive.key_check_value(_MATERIAL, _OWNER, _KEY_ID).hex(),
        "anonymous_object_key": derive.object_key(_MATERIAL, _OWNER, ANONYMOUS).hex(),
        "kek_id": "kek-1",
        "environment_id": "env-1",
        "ekm_binding": derive.ekm_binding(_OWNER, _KEY_ID, kek_id="kek-1", environment_id="env-1").hex(),
    }


def _objects() -> list[Vector]:
    return [
        _object("hello", b"hello"),
        _object("empty", b""),
        _object(
            "full-chunk", ruled_plain(16384), rule="byte i = 7 i mod 256; two chunks, the last one empty"
        ),
        _object("three-chunks", ruled_plain(40000), rule="byte i = 7 i mod 256"),
        _object("name-bound", b"hello", bind=Bind.NAME, name=_NAME),
        _object("caller-bound", b"hello", bind=Bind.CALLER, name=b"file/42"),
        _object("anonymous", b"hello", key_id=ANONYMOUS),
    ]


def _object(
    title: str,
    plain: bytes,
    *,
    key_id: KeyId = _KEY_ID,
    bind: Bind = Bind.NOTHING,
    name: bytes = b"",
    rule: str | None = None,
) -> Vector:
    sealed = _seal(plain, key_id=key_id, bind=bind, name=name)
    header = Header(key_id, bind).encode()
    context = derive.lp(b"sealgate/v1 body") + header + derive.scope(_OWNER) + derive.lp(name)
    vector: Vector = {"title": title, "key_id": str(key_id), "bind": int(bind), "name": name.hex()}
    vector |= {"salt": _SALT.hex(), "context": context.hex()}
    vector |= {"plain": plain.hex()} if rule is None else {"plain_rule": rule, "plain_bytes": len(plain)}
    if len(sealed) <= _LONGEST_IN_HEX:
        vector["sealed"] = sealed.hex()
    return vector | {"sealed_bytes": len(sealed), "sealed_sha256": hashlib.sha256(sealed).hexdigest()}


def _fields() -> list[Vector]:
    key = derive.field_key(_MATERIAL, _OWNER, _KEY_ID)
    deterministic = derive.deterministic_key(_MATERIAL, _OWNER, _KEY_ID)
    vectors: list[Vector] = []
    for title, value in (("hello", b"hello"), ("empty", b""), ("umlaut", "Größe".encode())):
        with fixed_salts(_SALT):
            token = fields.seal_field(key, _OWNER, _KEY_ID, path=_PATH, value=value)
        vectors.append(
            {"title": title, "path": _PATH, "plain": value.hex(), "salt": _SALT.hex(), "token": token}
        )
        token = fields.seal_deterministic(deterministic, _OWNER, _KEY_ID, path=_PATH, value=value)
        vectors.append(
            {"title": f"{title}, deterministic", "path": _PATH, "plain": value.hex(), "token": token}
        )
    return vectors


def _composites() -> list[Vector]:
    return [
        _composite("two-parts", ((1, b"hello, "), (7, b"world"))),
        _composite("empty-part", ((1, b""), (2, b"world")), name=_NAME),
        _composite("one-part", ((10_000, b"hello"),)),
    ]


def _composite(title: str, parts: tuple[tuple[int, bytes], ...], *, name: bytes = b"") -> Vector:
    key = derive.object_key(_MATERIAL, _OWNER, _KEY_ID)
    salts = _SALTS[: len(parts) + 1]
    stored, listed = b"", []
    with fixed_salts(*salts):
        for number, plain in parts:
            sealer = multipart.part_sealer(key, _OWNER, _KEY_ID, upload=_UPLOAD, number=number)
            message = bytes(sealer.update(plain)) + sealer.finalize()
            listed.append(multipart.Part(number, len(message), sealer.commitment))
            stored += message
        manifest = multipart.Manifest(_UPLOAD, tuple(listed))
        stored += multipart.seal_ending(key, _OWNER, _KEY_ID, manifest, name=name)
    return {
        "title": title,
        "upload_ref": _UPLOAD.hex(),
        "name": name.hex(),
        "salts": [salt.hex() for salt in salts],
        "parts": [{"number": number, "plain": plain.hex()} for number, plain in parts],
        "manifest": manifest.encode().hex(),
        "stored": stored.hex(),
    }


def _refused() -> list[Vector]:
    """Objects that a reader with policy bind 0 must refuse, each for one reason."""
    good = _seal(b"hello")
    long = _seal(ruled_plain(100), salt=_SALTS[1])
    parts = {
        "magic in other spelling": b"\x89sgt" + good[4:],
        "version 2": good[:8] + b"\x02" + good[9:],
        "suite 2, reserved": good[:9] + b"\x02" + good[10:],
        "suite 3, reserved": good[:9] + b"\x03" + good[10:],
        "header length 33": good[:11] + b"\x21" + good[12:],
        "another key id": good[:12] + bytes(range(0xB0, 0xC0)) + good[28:],
        "bind 1 where 0 is the policy": good[:28] + b"\x01" + good[29:],
        "bind 5, unknown": good[:28] + b"\x05" + good[29:],
        "reserved byte": good[:29] + b"\x01" + good[30:],
        "salt of another message": good[:32] + bytes(range(0x70, 0x88)) + good[56:],
        "commitment": good[:56] + bytes([good[56] ^ 1]) + good[57:],
        "ciphertext": good[:88] + bytes([good[88] ^ 1]) + good[89:],
        "tag": good[:-1] + bytes([good[-1] ^ 1]),
        "one byte less": good[:-1],
        "no last chunk": good[:88],
        "only the header": good[:32],
        "one byte more": good + b"\x00",
        "last chunk of a longer object": good[:88] + long[88:],
        "bound to another tenant": _seal(b"hello", owner=NetworkService("tenant-b", "drive")),
        "moved boundary between tenant and service": _seal(
            b"hello", owner=NetworkService("tenant", "adrive")
        ),
        "a part": _seal(b"hello", bind=Bind.PART, name=_UPLOAD + bytes(4)),
    }
    return [{"title": title, "stored": stored.hex()} for title, stored in parts.items()]


def _seal(
    plain: bytes,
    *,
    owner: NetworkService = _OWNER,
    key_id: KeyId = _KEY_ID,
    bind: Bind = Bind.NOTHING,
    name: bytes = b"",
    salt: bytes = _SALT,
) -> bytes:
    with fixed_salts(salt):
        sealer = Sealer(derive.object_key(_MATERIAL, owner, key_id), owner, key_id, bind=bind, name=name)
    return bytes(sealer.update(plain)) + sealer.finalize()


def text() -> str:
    return json.dumps(document(), indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__, file=sys.stderr)
        return 2
    if arguments == ["--check"]:
        return int(FILE.read_text(encoding="utf-8") != text())
    FILE.write_text(text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
