"""The blob's bytes, as docs/format.md gives them; a reader of its own, from the document alone."""

import hashlib

import pytest
from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from envelope.errors import FormatError
from envelope.xaes import Xaes256Gcm
from proxy.encryption_service.dialects import kacls_blob
from proxy.encryption_service.dialects.kacls_blob import Content, Kind
from proxy.encryption_service.errors import DoesNotVerify
from proxy.encryption_service.model import DialectName, Op
from tests.proxy.encryption_service.service_rig import ServiceRig


def lp(data: bytes) -> bytes:
    return len(data).to_bytes(2) + data


def test_the_bytes_are_those_of_the_document(rig: ServiceRig) -> None:
    key = rig.add_key()
    rig.push(key)
    ticket = rig.core.admit(rig.caller(DialectName.KACLS), key, Op.ENCRYPT)
    content = Content(binding=kacls_blob.resource_binding("//x/y"), perimeter_id="pé", secret=b"k" * 32)
    blob = kacls_blob.seal(rig.core, ticket, Kind.DATA_KEY, content)
    head, nonce = blob.data[:30], blob.data[6:30]
    assert head[:6] == bytes([1, 1, 0, 0, 0, 1])
    info = b"".join(
        lp(part) for part in (b"sealgate/v1 service kacls", b"acme", b"orders", rig.key_id(key).raw)
    )
    derived = HKDF(SHA512(), 32, b"sealgate/v1", info).derive(rig.secret(key))
    plaintext = Xaes256Gcm(derived).decrypt(nonce, blob.data[30:], head)
    assert plaintext == hashlib.sha256(b"//x/y").digest() + b"\x03" + "pé".encode() + b"k" * 32


def test_kinds_are_not_exchanged(rig: ServiceRig) -> None:
    key = rig.add_key()
    rig.push(key)
    caller = rig.caller(DialectName.KACLS)
    content = Content(binding=bytes(32), perimeter_id="", secret=b"k")
    blob = kacls_blob.seal(rig.core, rig.core.admit(caller, key, Op.ENCRYPT), Kind.PRIVATE_KEY, content)
    ticket = rig.core.admit(caller, key, Op.DECRYPT)
    opened = kacls_blob.unseal(rig.core, ticket, Kind.PRIVATE_KEY, kacls_blob.parse(blob.data))
    assert (opened.binding, opened.perimeter_id, opened.secret) == (bytes(32), "", b"k")
    assert "k" not in repr(opened).replace("secret", "")[-3:]
    with pytest.raises(DoesNotVerify):
        kacls_blob.unseal(rig.core, ticket, Kind.DATA_KEY, kacls_blob.parse(blob.data))
    relabelled = bytes([1, Kind.DATA_KEY]) + blob.data[2:]
    with pytest.raises(DoesNotVerify):
        kacls_blob.unseal(rig.core, ticket, Kind.DATA_KEY, kacls_blob.parse(relabelled))


@given(st.binary(max_size=120))
def test_whatever_comes_is_parsed_or_refused(data: bytes) -> None:
    try:
        parsed = kacls_blob.parse(data)
    except FormatError:
        return
    assert parsed.head + parsed.ciphertext + parsed.tag == data
    assert data[0] == 1
    assert len(data) >= 80


@pytest.mark.parametrize("data", [b"", b"\x01", bytes(100), b"\x02\x01" + bytes(98), b"\x01\x03" + bytes(98)])
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        kacls_blob.parse(data)
