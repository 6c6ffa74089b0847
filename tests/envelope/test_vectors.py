"""Fixed vectors: the project's own, the reference ones beside the repository, and Wycheproof's."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any, Final

import pytest

from envelope import derive, fields, multipart, objects
from envelope.cobblestone import MessageOpener, derive_message_keys
from envelope.errors import FormatError, IntegrityError, MisuseError, SealgateError
from envelope.keys import ANONYMOUS, KeyId, NetworkService
from envelope.objects import Bind, Opener, Sealer
from tests.envelope.samples import KEY_ID, MATERIAL, OWNER, cut, refused, run
from tests.vectors import make, reference

type Vector = dict[str, Any]

ROOT: Final = Path(__file__).parents[2]
BESIDE: Final = ROOT.parent / "shared" / "vectors"
WYCHEPROOF: Final = "c2sp_chunked_encryption_aes_256_gcm_test.json"
REFERENCE_OWNER: Final = (OWNER.tenant, OWNER.service)

OWN: Final[Vector] = json.loads(make.FILE.read_text(encoding="utf-8"))


def _titled(vectors: list[Vector]) -> list[Any]:
    return [pytest.param(vector, id=vector["title"]) for vector in vectors]


def _plain(vector: Vector) -> bytes:
    return (
        make.ruled_plain(vector["plain_bytes"]) if "plain_rule" in vector else bytes.fromhex(vector["plain"])
    )


def test_making_the_vectors_again_changes_nothing() -> None:
    assert make.FILE.read_text(encoding="utf-8") == make.text()
    assert make.main(["--check"]) == 0


def test_only_the_vector_tool_reaches_for_the_salt_seam() -> None:
    users = [
        path.relative_to(ROOT).as_posix()
        for folder in ("envelope", "runtime", "key_agent", "proxy", "tests", "bench", "certs")
        for path in (ROOT / folder).rglob("*.py")
        if "_fresh_salt" in path.read_text(encoding="utf-8")
    ]
    assert sorted(users) == [
        "envelope/cobblestone.py",
        "tests/envelope/test_salts.py",
        "tests/envelope/test_vectors.py",
        "tests/vectors/make.py",
    ]


def test_derived_keys() -> None:
    derived, path = OWN["derived"], OWN["derived"]["path"]
    assert derived["object_key"] == derive.object_key(MATERIAL, OWNER, KEY_ID).hex()
    assert derived["anonymous_object_key"] == derive.object_key(MATERIAL, OWNER, ANONYMOUS).hex()
    for name, label, size in (
        ("object_key", "sealgate/v1 object cobblestone-256", 32),
        ("field_key", "sealgate/v1 field cobblestone-256", 32),
        ("deterministic_key", "sealgate/v1 field-det aes-256-siv", 64),
        ("key_check_value", "sealgate/v1 kcv", 16),
    ):
        key = reference.derived(MATERIAL, label, REFERENCE_OWNER, KEY_ID.raw, size)
        assert derived[name] == key.hex()
    for name, label in (("index_key", "sealgate/v1 index hmac-sha256"), ("fpe_key", "sealgate/v1 fpe ff1")):
        info = b"".join(map(reference.lp, (label.encode(), b"tenant-a", b"drive", KEY_ID.raw, path.encode())))
        assert derived[name] == reference.hkdf(MATERIAL, info, 32).hex()
    strings = (b"sealgate/v1 ekm", b"tenant-a", b"drive", KEY_ID.raw, b"kek-1", b"env-1")
    assert derived["ekm_binding"] == b"".join(map(reference.lp, strings)).hex()


def test_lengths() -> None:
    for vector in OWN["lengths"]:
        assert objects.sealed_length(vector["plain"]) == vector["sealed"]
        assert objects.plain_length(vector["sealed"]) == vector["plain"]
    for impossible in OWN["impossible_lengths"]:
        with pytest.raises(FormatError):
            objects.plain_length(impossible)


@pytest.mark.parametrize("vector", _titled(OWN["objects"]))
def test_object(vector: Vector) -> None:
    plain, name, bind = _plain(vector), bytes.fromhex(vector["name"]), Bind(vector["bind"])
    key_id = KeyId.parse(vector["key_id"])
    key = derive.object_key(MATERIAL, OWNER, key_id)
    with make.fixed_salts(bytes.fromhex(vector["salt"])):
        sealer = Sealer(key, OWNER, key_id, bind=bind, name=name)
    sealed = run(sealer, cut(plain, 1000))
    assert (len(sealed), hashlib.sha256(sealed).hexdigest()) == (
        vector["sealed_bytes"],
        vector["sealed_sha256"],
    )
    assert vector.get("sealed", sealed.hex()) == sealed.hex()
    assert run(Opener(OWNER, lambda _: key, bind=bind, name=name), cut(sealed, 999)) == plain
    assert reference.open_object(MATERIAL, REFERENCE_OWNER, sealed, bind=bind, name=name) == plain


@pytest.mark.parametrize("vector", _titled(OWN["fields"]))
def test_field(vector: Vector) -> None:
    token, path, plain = vector["token"], vector["path"], bytes.fromhex(vector["plain"])

    def find(header: fields.FieldHeader) -> bytes:
        if header.kind is fields.FieldKind.RANDOM:
            return derive.field_key(MATERIAL, OWNER, header.key_id)
        return derive.deterministic_key(MATERIAL, OWNER, header.key_id)

    assert fields.open_field(token, OWNER, find, path=path) == plain
    assert reference.open_field(MATERIAL, REFERENCE_OWNER, path, token) == plain
    assert fields.sealed_field_length(len(plain), fields.FieldHeader.parse(token).kind) == len(token)


@pytest.mark.parametrize("vector", _titled(OWN["composites"]))
def test_composite(vector: Vector) -> None:
    stored, name = bytes.fromhex(vector["stored"]), bytes.fromhex(vector["name"])
    plain = b"".join(bytes.fromhex(part["plain"]) for part in vector["parts"])
    key = derive.object_key(MATERIAL, OWNER, KEY_ID)
    begin, _ = multipart.ending_range(stored[-16:], stored_bytes=len(stored))
    ending = multipart.open_ending(OWNER, lambda _: key, stored[begin:], stored_bytes=len(stored), name=name)
    assert ending.manifest.encode().hex() == vector["manifest"]
    assert run(multipart.CompositeOpener(OWNER, lambda _: key, ending), [stored]) == plain
    assert reference.open_composite(MATERIAL, REFERENCE_OWNER, stored, name=name) == plain


@pytest.mark.parametrize("vector", _titled(OWN["refused"]))
def test_refused(vector: Vector) -> None:
    stored = bytes.fromhex(vector["stored"])
    opener = Opener(OWNER, lambda header: derive.object_key(MATERIAL, OWNER, header.key_id))
    with pytest.raises(SealgateError) as refusal:
        run(opener, [stored])
    assert isinstance(refusal.value, FormatError | IntegrityError)
    with pytest.raises(ValueError, match=r"^(header|commitment|chunk|too short)$"):
        reference.open_object(MATERIAL, REFERENCE_OWNER, stored)


@pytest.mark.skipif(
    not BESIDE.is_dir(), reason="no reference vectors beside the repository (../shared/vectors)"
)
class TestBeside:
    """The reference vectors, byte for byte."""

    def test_wycheproof_is_the_same_file(self) -> None:
        assert (make.FILE.parent / WYCHEPROOF).read_bytes() == (BESIDE / WYCHEPROOF).read_bytes()

    def test_sgt1(self) -> None:
        document = json.loads((BESIDE / "sgt1.json").read_text(encoding="utf-8"))
        assert document["kcv"] == derive.key_check_value(MATERIAL, OWNER, KEY_ID).hex()
        vectors = {vector["name"]: vector for vector in document["vectors"]}
        assert len(vectors) == 9
        for name, vector in vectors.items():
            material, key_id = bytes.fromhex(vector["km"]), KeyId.parse(vector["kid"])
            owner = NetworkService(vector["tenant"], vector["service"])
            if name.startswith("object"):
                self._object(vector, material, owner, key_id)
            elif name.startswith("field"):
                self._field(vector, material, owner, key_id)
            else:
                self._composite(vector, material, owner, key_id)

    def _object(self, vector: Vector, material: bytes, owner: NetworkService, key_id: KeyId) -> None:
        long = {"object-40000": 40000, "object-16384": 16384}.get(vector["name"])
        plain = bytes.fromhex(vector["plaintext_hex"]) if long is None else make.ruled_plain(long)
        key = derive.object_key(material, owner, key_id)
        assert key.hex() == vector["k_obj"]
        name, bind = bytes.fromhex(vector["name_bound"]), Bind(vector["bind"])
        with make.fixed_salts(bytes.fromhex(vector["salt"])):
            sealer = Sealer(key, owner, key_id, bind=bind, name=name)
        sealed = run(sealer, [plain])
        assert len(sealed) == vector["length"]
        assert hashlib.sha256(sealed).hexdigest() == vector["sha256"]
        assert vector.get("object_hex", sealed.hex()) == sealed.hex()
        assert run(Opener(owner, lambda _: key, bind=bind, name=name), [sealed]) == plain

    def _field(self, vector: Vector, material: bytes, owner: NetworkService, key_id: KeyId) -> None:
        path, value = bytes.fromhex(vector["name_bound"]).decode(), bytes.fromhex(vector["plaintext_hex"])
        if vector["salt"] is None:
            key = derive.deterministic_key(material, owner, key_id)
            token = fields.seal_deterministic(key, owner, key_id, path=path, value=value)
        else:
            key = derive.field_key(material, owner, key_id)
            with make.fixed_salts(bytes.fromhex(vector["salt"])):
                token = fields.seal_field(key, owner, key_id, path=path, value=value)
        assert key.hex() == vector["k_obj"]
        assert token == vector["token"]
        assert fields.open_field(token, owner, lambda _: key, path=path) == value

    def _composite(self, vector: Vector, material: bytes, owner: NetworkService, key_id: KeyId) -> None:
        stored, key = bytes.fromhex(vector["object_hex"]), derive.object_key(material, owner, key_id)
        begin, _ = multipart.ending_range(stored[-16:], stored_bytes=len(stored))
        ending = multipart.open_ending(owner, lambda _: key, stored[begin:], stored_bytes=len(stored))
        assert ending.manifest.encode().hex() == vector["manifest_hex"]
        plain = run(multipart.CompositeOpener(owner, lambda _: key, ending), [stored])
        assert plain == bytes.fromhex(vector["plaintext_hex"])
        upload = bytes.fromhex(vector["upload_ref"])
        again, listed = b"", []
        with make.fixed_salts(*map(bytes.fromhex, vector["salt"])):
            for number, words in zip(vector["part_numbers"], (plain[:7], plain[7:]), strict=True):
                sealer = multipart.part_sealer(key, owner, key_id, upload=upload, number=number)
                message = run(sealer, [words])
                listed.append(multipart.Part(number, len(message), sealer.commitment))
                again += message
            manifest = multipart.Manifest(upload, tuple(listed))
            again += multipart.seal_ending(key, owner, key_id, manifest)
        assert again == stored


def _wycheproof() -> list[Any]:
    document = json.loads((make.FILE.parent / WYCHEPROOF).read_text(encoding="utf-8"))
    (group,) = document["testGroups"]
    assert document["numberOfTests"] == len(group["tests"]) == 35
    return [pytest.param(case, id=f"{case['tcId']}-{case['comment']}") for case in group["tests"]]


@pytest.mark.parametrize("step", [1, 16400, 1_000_003])
@pytest.mark.parametrize("case", _wycheproof())
def test_wycheproof(case: Vector, step: int) -> None:
    message = zlib.decompress(bytes.fromhex(case["ct"]))
    if step == 1 and len(message) > 50_000:
        step = 16384
    key, context = bytes.fromhex(case["key"]), bytes.fromhex(case["ctx"])
    if "aeadKey" in case:
        keys = derive_message_keys(key, message[:24], context)
        assert keys.base_nonce == int.from_bytes(bytes.fromhex(case["baseNonce"]))
    opener = MessageOpener((key,), context)
    if case["result"] == "valid":
        out = run(opener, cut(message, step))
        assert (len(out), hashlib.sha512(out).hexdigest()) == (case["msgLength"], case["msgSha512"])
        return
    expected = MisuseError if "InvalidKeySize" in case["flags"] else IntegrityError
    out = refused(opener, cut(message, step), expected)
    # Only whole authenticated chunks came out, and at most those Wycheproof calls the valid prefix.
    assert len(out) % 16384 == 0
    assert len(out) <= case.get("msgLength", 0)
    if step == 16400 and "PartialPlaintext" in case["flags"]:
        assert hashlib.sha512(out).hexdigest() == case["msgSha512"]
    if "HeaderFailure" in case["flags"]:
        assert not out
