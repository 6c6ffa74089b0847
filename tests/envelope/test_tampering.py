"""Every change of a stored object is refused: threats 1, 2, 4, 5, 8 and 17 of the threat model."""

import itertools
from typing import Final

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from envelope import derive
from envelope.cobblestone import derive_message_keys
from envelope.errors import FormatError, IntegrityError, SealgateError, TruncatedError
from envelope.keys import ANONYMOUS, KeyId, NetworkService
from envelope.objects import CHUNK_SIZE, PREFIX_SIZE, RECORD_SIZE, Bind, Candidate, Header, Opener
from tests.envelope.forgeries import two_key_record
from tests.envelope.samples import (
    KEY_ID,
    MATERIAL,
    OBJECT_KEY,
    OTHER_MATERIAL,
    OTHER_SERVICE,
    OTHER_TENANT,
    OWNER,
    always,
    cut,
    pattern,
    refused,
    run,
    seal,
)
from tests.vectors import reference

NOT_AS_WRITTEN: Final = (FormatError, IntegrityError)


def _by_header(header: Header) -> bytes:
    return derive.object_key(MATERIAL, OWNER, header.key_id)


def _refuse(stored: bytes, *, step: int = 10**6) -> bytes:
    return refused(Opener(OWNER, _by_header), cut(stored, step), NOT_AS_WRITTEN)


@pytest.mark.parametrize("size", [0, 5])
def test_every_single_bit(size: int) -> None:
    sealed = seal(pattern(size))
    for bit in range(8 * len(sealed)):
        damaged = bytearray(sealed)
        damaged[bit // 8] ^= 1 << bit % 8
        assert _refuse(bytes(damaged)) == b""


def test_every_truncation_of_a_three_chunk_object() -> None:
    plain = pattern(2 * CHUNK_SIZE + 100)
    sealed = seal(plain)
    for size in range(len(sealed)):
        out = refused(Opener(OWNER, always()), [sealed[:size]], NOT_AS_WRITTEN)
        assert len(out) <= max(size - PREFIX_SIZE, 0) // RECORD_SIZE * CHUNK_SIZE
        assert plain.startswith(out)


@pytest.mark.parametrize("size", [2 * CHUNK_SIZE, 2 * CHUNK_SIZE + 100])
def test_a_cut_on_a_chunk_boundary(size: int) -> None:
    """Everything up to the cut is authentic: only that the last chunk is missing gives it away."""
    sealed = seal(pattern(size))
    for records, extra in itertools.product(range(3), (0, 1, 15)):
        stored = sealed[: PREFIX_SIZE + records * RECORD_SIZE + extra]
        if len(stored) < len(sealed):
            refused(Opener(OWNER, always()), [stored], TruncatedError)
    for records in range(3):
        stored = sealed[: PREFIX_SIZE + records * RECORD_SIZE + 16]
        if len(stored) < len(sealed):
            refused(Opener(OWNER, always()), [stored], IntegrityError)


def test_an_empty_stored_body() -> None:
    refused(Opener(OWNER, always()), [], FormatError)


def test_records_in_any_other_order() -> None:
    sealed = seal(pattern(3 * CHUNK_SIZE + 100))
    records = list(cut(sealed[PREFIX_SIZE:], RECORD_SIZE))
    assert len(records) == 4
    arrangements = [
        list(arrangement)
        for length in range(6)
        for arrangement in itertools.product(range(4), repeat=length)
        if length < 5 or arrangement[:4] == (0, 1, 2, 3)
    ]
    for arrangement in arrangements:
        if arrangement != [0, 1, 2, 3]:
            _refuse(sealed[:PREFIX_SIZE] + b"".join(records[index] for index in arrangement))


def test_pieces_of_two_objects_under_one_key() -> None:
    one, other = seal(pattern(2 * CHUNK_SIZE + 5)), seal(pattern(2 * CHUNK_SIZE + 5)[::-1])
    named = seal(pattern(2 * CHUNK_SIZE + 5), key_id=KeyId.random(), key=OBJECT_KEY)
    edges = [0, 32, 56, 88, 88 + RECORD_SIZE, 88 + 2 * RECORD_SIZE, len(one)]
    for begin, end in itertools.pairwise(edges):
        for source in (other, named):
            if source[begin:end] != one[begin:end]:
                spliced = one[:begin] + source[begin:end] + one[end:]
                refused(Opener(OWNER, always()), [spliced], NOT_AS_WRITTEN)


def test_appended_data() -> None:
    small, full = seal(pattern(100)), seal(pattern(CHUNK_SIZE))
    for sealed in (small, full):
        for tail in (b"\0", bytes(16), bytes(RECORD_SIZE), sealed[PREFIX_SIZE:], sealed, seal(b"")):
            _refuse(sealed + tail)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_edit(data: st.DataObject) -> None:
    sealed = seal(pattern(data.draw(st.sampled_from([0, 50, CHUNK_SIZE, CHUNK_SIZE + 50]))))
    begin = data.draw(st.integers(0, len(sealed)))
    end = data.draw(st.integers(begin, min(begin + 40, len(sealed))))
    edited = sealed[:begin] + data.draw(st.binary(max_size=40)) + sealed[end:]
    if edited != sealed:
        _refuse(edited, step=data.draw(st.sampled_from([100, 10**6])))


def test_the_same_material_under_another_owner() -> None:
    for owner in (OTHER_TENANT, OTHER_SERVICE, NetworkService("tenant", "adrive")):
        sealed = seal(b"hello", owner=owner, key=derive.object_key(MATERIAL, owner, KEY_ID))
        assert _refuse(sealed) == b""


def test_the_owner_stands_in_the_context_too() -> None:
    """Even a derived key that reached another network service opens nothing there."""
    for owner in (OTHER_TENANT, OTHER_SERVICE, NetworkService("tenant", "adrive")):
        refused(Opener(owner, always()), [seal(b"hello")], IntegrityError)


def test_other_keys_and_key_ids() -> None:
    sealed = seal(b"hello")
    for material, key_id in ((OTHER_MATERIAL, KEY_ID), (MATERIAL, KeyId.random()), (MATERIAL, ANONYMOUS)):
        key = derive.object_key(material, OWNER, key_id)
        assert refused(Opener(OWNER, always(key)), [sealed], IntegrityError) == b""
    relabelled = Header(KeyId.random()).encode() + sealed[32:]
    refused(Opener(OWNER, always()), [relabelled], IntegrityError)


def test_all_failures_of_authentication_look_alike() -> None:
    sealed, records = seal(pattern(40000)), 3
    failures: list[SealgateError] = []
    for at in (13, 28, 40, 60, 90, 90 + RECORD_SIZE, 90 + (records - 1) * RECORD_SIZE, len(sealed) - 1):
        damaged = bytearray(sealed)
        damaged[at] ^= 1
        with pytest.raises(IntegrityError) as refusal:
            run(Opener(OWNER, _by_header), [bytes(damaged)])
        failures.append(refusal.value)
    with pytest.raises(IntegrityError) as refusal:
        run(Opener(OWNER, always(), bind=Bind.NAME, name=b"/a"), [sealed])
    failures.append(refusal.value)
    assert len({(type(error), str(error), error.args) for error in failures}) == 1
    # Not even a log with tracebacks tells a tag from a commitment by its cause.
    assert all(error.__cause__ is None for error in failures)
    assert all(error.__suppress_context__ or error.__context__ is None for error in failures)


# --- one ciphertext, two keys ---


def test_a_ciphertext_valid_under_two_keys_opens_under_one_only() -> None:
    """GCM does not commit to its key; the format does, so trial decryption cannot be steered (threat 8)."""
    keys = [derive.object_key(material, OWNER, ANONYMOUS) for material in (MATERIAL, OTHER_MATERIAL)]
    header, salt = Header(ANONYMOUS).encode(), bytes(range(24))
    context = derive.lp(b"sealgate/v1 body") + header + derive.scope(OWNER) + derive.lp(b"")
    info = b"c2sp.org/chunked-encryption@v1+AEAD_AES_256_GCM\0" + salt + context
    okms = [reference.expand(key, info, 76) for key in keys]
    pairs = [(okm[:32], okm[32:44]) for okm in okms]
    record, plains = two_key_record(pairs)
    assert plains[0] != plains[1]
    for index, key in enumerate(keys):
        commitment = derive_message_keys(key, salt, context).commitment
        stored = header + salt + commitment + record
        assert run(Opener(OWNER, always(key)), [stored]) == plains[index]
        tried = [Candidate(OWNER, key) for key in keys]
        assert run(Opener(OWNER, always(key), candidates=lambda: tried), [stored]) == plains[index]  # noqa: B023 - run at once
        assert refused(Opener(OWNER, always(keys[1 - index])), [stored], IntegrityError) == b""


def test_that_gcm_alone_refuses_a_wrong_key() -> None:
    """The forgery above is made, not luck."""
    pairs = [(bytes([number]) * 32, bytes(12)) for number in (1, 2)]
    record = bytearray(two_key_record(pairs)[0])
    record[0] ^= 1
    for key, nonce in pairs:
        with pytest.raises(InvalidTag):
            AESGCM(key).decrypt(nonce, bytes(record), None)
