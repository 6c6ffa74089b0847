"""What credentials are made of, and how the secrets that must be readable are kept."""

import re
from hashlib import sha256
from pathlib import Path

import pytest

from envelope.errors import FormatError
from proxy.encryption_service.credentials import (
    FILE_KEY_DIRECTORY,
    SecretSealer,
    check_access_key,
    file_key_of,
    new_access_key,
    new_bearer,
    parse_bearer,
)

SECRET = "s" * 43


def test_a_bearer_token_names_itself_and_carries_256_bits() -> None:
    made = {new_bearer() for _ in range(100)}
    assert len({token.id for token in made}) == len({token.verifier for token in made}) == 100
    for token in made:
        assert re.fullmatch(r"sgt\.[a-z2-7]{24}\.[A-Za-z0-9_-]{43}", token.token)
        assert parse_bearer(token.token) == token.id
        assert token.verifier == sha256(token.token.encode()).digest()


@pytest.mark.parametrize("text", ["", "sgt", "sgt.a", "hvs.a.b", "sgt.a.b.c", "SGT.a.b"])
def test_what_is_no_token_names_nobody(text: str) -> None:
    assert parse_bearer(text) == ""


def test_access_keys_have_the_form_that_aws_asks_for() -> None:
    made = [new_access_key() for _ in range(100)]
    assert len({key.id for key in made}) == len({key.secret for key in made}) == 100
    for key in made:
        assert re.fullmatch(r"[A-Z2-7]{20}", key.id)
        assert re.fullmatch(r"[A-Za-z0-9+/]{43}", key.secret)
        check_access_key(*key)


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("A" * 19, SECRET),
        ("A" * 31, SECRET),
        ("a" * 20, SECRET),
        ("A" * 19 + "1", SECRET),
        ("A" * 20, "s" * 42),
        ("A" * 20, "s" * 65),
        ("A" * 20, "s" * 42 + "-"),
        ("A" * 20 + "\n", SECRET),
        ("A" * 20, SECRET + "\n"),
    ],
)
def test_malformed_access_keys_are_refused_without_a_quote(name: str, secret: str) -> None:
    with pytest.raises(FormatError) as caught:
        check_access_key(name, secret)
    assert secret not in str(caught.value)


def test_limits_of_the_form_are_inside() -> None:
    for size in (43, 64):
        check_access_key("A" * 20, "s" * size)
    check_access_key("A" * 30, "=" * 43)


def test_a_stored_secret_opens_for_its_credential_alone(tmp_path: Path) -> None:
    sealer = SecretSealer(tmp_path)
    sealed = sealer.seal(SECRET, "id", "acme")
    assert sealer.open(sealed, "id", "acme") == SECRET.encode()
    assert SECRET.encode() not in sealed
    assert sealer.seal(SECRET, "id", "acme") != sealed
    assert sealer.open(sealed, "id2", "acme") is None
    assert sealer.open(sealed, "id", "globex") is None
    assert sealer.open(sealed, "i", "dacme") is None
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        assert sealer.open(bytes(changed), "id", "acme") is None
    for end in range(len(sealed)):
        assert sealer.open(sealed[:end], "id", "acme") is None


def test_a_file_key_is_ours_alone(tmp_path: Path) -> None:
    sealer = SecretSealer(tmp_path)
    sealed = sealer.seal(SECRET, "id", "acme")
    directory = tmp_path / FILE_KEY_DIRECTORY
    (file,) = directory.iterdir()
    assert file.name == f"{file_key_of(sealed).hex()}.key"
    assert (directory.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    assert SecretSealer(tmp_path).open(sealed, "id", "acme") == SECRET.encode()
    file.chmod(0o640)
    assert SecretSealer(tmp_path).open(sealed, "id", "acme") is None, "others may have read it"
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-1])
    assert SecretSealer(tmp_path).open(sealed, "id", "acme") is None
    file.unlink()
    assert SecretSealer(tmp_path).open(sealed, "id", "acme") is None


def test_a_running_process_heeds_a_new_file_key_and_keeps_the_old(tmp_path: Path) -> None:
    """Another process rotates: rows sealed by either open, until the rows of the old one are gone."""
    SecretSealer(tmp_path).new_key()
    running, other = SecretSealer(tmp_path), SecretSealer(tmp_path)
    before = other.seal(SECRET, "id", "acme")
    old = other.names()
    new = other.new_key()
    assert other.newest() == new
    after = other.seal(SECRET, "id", "acme")
    other.remove(old)
    assert file_key_of(after) == new != file_key_of(before)
    assert running.open(after, "id", "acme") == running.open(before, "id", "acme") == SECRET.encode()
    assert SecretSealer(tmp_path).open(before, "id", "acme") is None
    assert other.names() == [new]
    (tmp_path / FILE_KEY_DIRECTORY / "README.key").write_bytes(b"")
    assert other.names() == [new]
