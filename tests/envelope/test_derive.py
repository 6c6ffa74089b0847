"""Derived keys: one per scope, no way to mix scopes, none from what was wiped. Values: test_vectors.py."""

import hmac
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envelope import derive
from envelope.errors import MisuseError
from envelope.keys import ANONYMOUS, KeyId, NetworkService
from tests.envelope.samples import (
    KEY_ID,
    MATERIAL,
    OTHER_MATERIAL,
    OTHER_SERVICE,
    OTHER_TENANT,
    OWNER,
    PATH,
)

type Derivation = Callable[[bytes, NetworkService, KeyId], bytes]

DERIVATIONS: dict[str, Derivation] = {
    "object": derive.object_key,
    "field": derive.field_key,
    "deterministic": derive.deterministic_key,
    "check value": derive.key_check_value,
    "index": lambda material, owner, key_id: derive.index_key(material, owner, key_id, PATH),
    "fpe": lambda material, owner, key_id: derive.fpe_key(material, owner, key_id, PATH),
    "xks": lambda material, owner, key_id: derive.service_key(material, owner, key_id, "xks"),
    "transit": lambda material, owner, key_id: derive.service_key(material, owner, key_id, "transit"),
    "context": lambda material, owner, key_id: derive.service_key(material, owner, key_id, "transit", b"c"),
}


def test_every_scope_has_keys_of_its_own() -> None:
    scopes = itertools.product(
        (MATERIAL, OTHER_MATERIAL), (OWNER, OTHER_TENANT, OTHER_SERVICE), (KEY_ID, ANONYMOUS)
    )
    keys = [derivation(*scope)[:16] for scope in scopes for derivation in DERIVATIONS.values()]
    assert len(set(keys)) == len(keys) == 12 * len(DERIVATIONS)


def test_a_boundary_moved_between_tenant_and_service_gives_another_key() -> None:
    one, other = NetworkService("tenant-a", "drive"), NetworkService("tenant", "adrive")
    assert derive.object_key(MATERIAL, one, KEY_ID) != derive.object_key(MATERIAL, other, KEY_ID)


def test_dialects_and_contexts_have_keys_of_their_own() -> None:
    scopes = [(dialect, context) for dialect in ("xks", "xk", "native", "") for context in (b"", b"s", b"\0")]
    keys = {derive.service_key(MATERIAL, OWNER, KEY_ID, *scope) for scope in scopes}
    assert len(keys) == len(scopes)
    with pytest.raises(MisuseError):
        derive.service_key(MATERIAL, OWNER, KEY_ID, "xks", bytes(65_536))


def test_the_vector_of_the_encryption_service() -> None:
    """docs/format.md 6.1; found by HKDF of the standard library's HMAC as well."""
    material, owner, key_id = (
        bytes(range(32)),
        NetworkService("tenant-a", "drive"),
        KeyId(bytes(range(160, 176))),
    )
    for context, expected in (
        (b"", "74542d5d30a7e1531a45811fe8c2d200bf30489c31be204b5725925790c9f946"),
        (b"customer 4711", "ed68f51645760cdf16cb2cfda51d629957bfe5d3e174c96b8a3412527f2a7039"),
    ):
        info = b"".join(
            len(part).to_bytes(2) + part
            for part in (b"sealgate/v1 service xks", b"tenant-a", b"drive", key_id.raw, context)
            if part
        )
        extracted = hmac.digest(b"sealgate/v1", material, "sha512")
        assert hmac.digest(extracted, info + b"\x01", "sha512")[:32].hex() == expected
        assert derive.service_key(material, owner, key_id, "xks", context).hex() == expected


def test_paths_have_keys_of_their_own() -> None:
    for derivation in (derive.index_key, derive.fpe_key):
        assert derivation(MATERIAL, OWNER, KEY_ID, "$.a") != derivation(MATERIAL, OWNER, KEY_ID, "$.b")
        with pytest.raises(MisuseError, match="path"):
            derivation(MATERIAL, OWNER, KEY_ID, "")


@pytest.mark.parametrize("derivation", DERIVATIONS.values(), ids=DERIVATIONS)
def test_wiped_or_wrongly_sized_material_is_refused(derivation: Derivation) -> None:
    with pytest.raises(MisuseError, match="wiped"):
        derivation(bytes(32), OWNER, KEY_ID)
    for size in (0, 16, 31, 33, 64):
        with pytest.raises(MisuseError, match="32 bytes"):
            derivation(b"k" * size, OWNER, KEY_ID)


def test_material_may_be_any_buffer() -> None:
    assert derive.object_key(bytearray(MATERIAL), OWNER, KEY_ID) == derive.object_key(MATERIAL, OWNER, KEY_ID)


@given(st.lists(st.binary(max_size=20), max_size=5), st.lists(st.binary(max_size=20), max_size=5))
def test_lp_is_injective(one: list[bytes], other: list[bytes]) -> None:
    joined = [b"".join(map(derive.lp, strings)) for strings in (one, other)]
    assert (joined[0] == joined[1]) == (one == other)


def test_lp_refuses_what_its_length_cannot_say() -> None:
    assert derive.lp(b"x" * 65535)[:2] == b"\xff\xff"
    with pytest.raises(MisuseError, match="16-bit"):
        derive.lp(b"x" * 65536)


def test_ekm_binding_tells_all_five_names_apart() -> None:
    def binding(
        owner: NetworkService = OWNER, key_id: KeyId = KEY_ID, kek: str = "kek", environment: str = "env"
    ) -> bytes:
        return derive.ekm_binding(owner, key_id, kek_id=kek, environment_id=environment)

    others = [
        binding(OTHER_TENANT),
        binding(OTHER_SERVICE),
        binding(key_id=ANONYMOUS),
        binding(kek="kek2"),
        binding(environment="env2"),
        binding(kek="keke", environment="nv"),
    ]
    assert len({binding(), *others}) == 7


def test_check_value_of_a_signing_key_covers_scope_and_public_key() -> None:
    def value(public: bytes = b"spki", owner: NetworkService = OWNER, key_id: KeyId = KEY_ID) -> bytes:
        return derive.signing_key_check_value(public, owner, key_id)

    assert len(value()) == 16
    assert len({value(), value(b"spkj"), value(owner=OTHER_TENANT), value(key_id=ANONYMOUS)}) == 4
