"""The picture of the encryption service: look-ups yield one tenant's things."""

import msgspec
import pytest

from envelope.keys import KeyUse, NetworkService
from proxy.encryption_service.model import (
    EMPTY,
    OPERATIONS_OF,
    SETTINGS_OF,
    DialectEntry,
    DialectName,
    KaclsEndpoint,
    KaclsSettings,
    NamedKey,
    Op,
    ServiceDirectory,
    TransitSettings,
    XksSettings,
    XksStore,
    url_path,
)


def xks(tenant: str, *prefixes: str, enabled: bool = True) -> DialectEntry:
    stores = tuple(XksStore(prefix=prefix) for prefix in prefixes)
    return DialectEntry(
        tenant=tenant, dialect=DialectName.XKS, enabled=enabled, settings=XksSettings(stores=stores)
    )


def test_what_a_caller_names_yields_the_tenant() -> None:
    endpoint = KaclsEndpoint(url="https://kacls.example.com/kacls/acme/v1/", wrapping_key="dek")
    kacls = DialectEntry(
        tenant="acme", dialect=DialectName.KACLS, settings=KaclsSettings(endpoints=(endpoint,))
    )
    directory = ServiceDirectory.of(dialects=[xks("acme", "a/b", "c"), xks("globex", "d"), kacls])
    found = {prefix: directory.xks_store(prefix) for prefix in ("a/b", "c", "d", "a", "", "A/b")}
    assert {prefix: pair and pair[0].tenant for prefix, pair in found.items()} == {
        "a/b": "acme",
        "c": "acme",
        "d": "globex",
        "a": None,
        "": None,
        "A/b": None,
    }
    assert directory.kacls_endpoint("/kacls/acme/v1") == (kacls, endpoint)
    assert directory.kacls_endpoint("/kacls/acme") is None
    assert list(directory.kacls_paths()) == ["/kacls/acme/v1"]


def test_what_is_switched_off_is_not_there() -> None:
    directory = ServiceDirectory.of(dialects=[xks("acme", "a", enabled=False)])
    assert directory.xks_store("a") is None
    assert directory.dialect("acme", DialectName.XKS) is None
    assert directory.dialects["acme", DialectName.XKS].settings == XksSettings(stores=(XksStore(prefix="a"),))


def test_keys_by_tenant_and_name() -> None:
    keys = [
        NamedKey(owner=NetworkService(*names)) for names in (("acme", "b"), ("acme", "a"), ("globex", "a"))
    ]
    directory = ServiceDirectory.of(keys)
    assert [key.name for key in directory.keys_of("acme")] == ["a", "b"]
    assert directory.keys_of("nobody") == ()
    found = directory.key("globex", "a")
    assert found is keys[2]
    assert directory.key("globex", "b") is None
    assert EMPTY.key("acme", "a") is None


def test_every_operation_belongs_to_one_use() -> None:
    assert OPERATIONS_OF[KeyUse.DATA] | OPERATIONS_OF[KeyUse.SIGN] == set(Op)
    assert not OPERATIONS_OF[KeyUse.DATA] & OPERATIONS_OF[KeyUse.SIGN]


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://a.example/x/y", "/x/y"),
        ("https://a.example/x/", "/x"),
        ("https://a.example:8443/x", "/x"),
        ("https://a.example", "/"),
        ("https://a.example/", "/"),
    ],
)
def test_the_path_of_a_base_url(url: str, path: str) -> None:
    assert url_path(url) == path


@pytest.mark.parametrize("dialect", DialectName)
def test_settings_know_no_unknown_members(dialect: DialectName) -> None:
    kind = SETTINGS_OF[dialect]
    again = msgspec.json.decode(msgspec.json.encode(kind()), type=kind)
    assert again == kind()
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"unknown": 1}', type=kind)


def test_a_mount_is_there_by_default() -> None:
    assert [mount.mount for mount in TransitSettings().mounts] == ["transit"]
