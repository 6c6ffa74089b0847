"""What may be an upstream credential, and what it never shows."""

import msgspec
import pytest

from envelope.errors import FormatError
from envelope.keys import NetworkService
from proxy.vault.model import (
    Secrets,
    UpstreamCredential,
    VaultError,
    binding,
    check_access_key,
    check_secrets,
)

SECRET = "s3cr3t/+with=signs"


def credential(opened: bytes | None, not_after_s: float | None = None) -> UpstreamCredential:
    return UpstreamCredential(
        access_key="KEY",
        upstream_access_key="KEY",
        not_after_s=not_after_s,
        created_at_s=0,
        sealed=b"sealed bytes",
        opener=lambda _sealed: opened,
    )


def test_secrets_are_in_no_repr() -> None:
    secrets = Secrets(client_secret=SECRET, upstream_secret=SECRET, session_token=SECRET)
    entry = credential(msgspec.json.encode(secrets))
    for text in (repr(secrets), str(secrets), f"{secrets}", repr(entry), repr(entry.open())):
        assert SECRET not in text
        assert "sealed bytes" not in text


def test_the_upstream_secret_signs_where_there_is_one() -> None:
    assert Secrets(client_secret="client-secret").signs_with == b"client-secret"
    assert (
        Secrets(client_secret="client-secret", upstream_secret="the-other-one").signs_with == b"the-other-one"
    )


@pytest.mark.parametrize(
    "opened", [None, b"", b"{}", b'{"client_secret": 3}', b'{"client_secret":"x","y":"z"}']
)
def test_what_does_not_open_is_an_error_without_the_text(opened: bytes | None) -> None:
    with pytest.raises(VaultError) as caught:
        credential(opened).open()
    assert "client_secret" not in str(caught.value)


def test_an_end_is_the_first_moment_after() -> None:
    assert not credential(None).has_ended(1e12)
    assert not credential(None, 10.0).has_ended(9.999)
    assert credential(None, 10.0).has_ended(10.0)


@pytest.mark.parametrize("text", ["AKIA", "test:tester", "a.b@c+d_e-f~"])
def test_access_keys(text: str) -> None:
    assert check_access_key(text) == text


@pytest.mark.parametrize("text", ["", "ab", "a b c", "a/b", "a,b", "a=b", "a" * 129, "k\u00e9y", "key\n"])
def test_no_access_keys(text: str) -> None:
    with pytest.raises(FormatError):
        check_access_key(text)


@pytest.mark.parametrize(
    "secret", ["", "short", "with a blank in it", "line\nend-line-end", "s\u00e9cr\u00e9tsecret"]
)
def test_no_secrets(secret: str) -> None:
    for secrets in (
        Secrets(client_secret=secret),
        Secrets(client_secret=SECRET, upstream_secret=secret),
    ):
        with pytest.raises(FormatError) as caught:
            check_secrets(secrets)
        assert not secret or secret not in str(caught.value)
    with pytest.raises(FormatError):
        check_secrets(Secrets(client_secret=SECRET, session_token="a b"))


def test_bindings_differ_in_every_part() -> None:
    # Lengths stand before the parts: moving a letter from one to the next makes another binding.
    bindings = {
        binding(NetworkService(tenant, service), key)
        for tenant, service, key in [
            ("acme", "s3", "KEY"), ("acme", "s3", "KEY2"), ("acme", "s4", "KEY"), ("bolt", "s3", "KEY"),
            ("acmes", "3", "KEY"),
        ]
    }  # fmt: skip
    assert len(bindings) == 5
