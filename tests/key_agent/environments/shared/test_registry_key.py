"""The key that signs, and what administrators compare of it."""

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from envelope.errors import FormatError
from key_agent.environments.shared.registry_key import (
    NAME,
    fingerprint_of,
    public_text,
    read_or_make_registry_key,
    same_fingerprint,
)
from runtime.settings import SettingsError
from tests.pki import new_key


def test_it_is_made_once_and_for_the_agent_alone(tmp_path: Path) -> None:
    key = read_or_make_registry_key(tmp_path)
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600
    assert public_text(read_or_make_registry_key(tmp_path)) == public_text(key)


@pytest.mark.parametrize("content", [b"", b"not a key\n", b"ec"])
def test_what_is_no_such_key_is_refused_and_not_replaced(tmp_path: Path, content: bytes) -> None:
    if content == b"ec":
        content = new_key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file = tmp_path / NAME
    file.touch(mode=0o600)
    file.write_bytes(content)
    with pytest.raises(SettingsError):
        read_or_make_registry_key(tmp_path)
    assert file.read_bytes() == content


def test_one_that_others_can_read_is_refused(tmp_path: Path) -> None:
    read_or_make_registry_key(tmp_path)
    (tmp_path / NAME).chmod(0o640)
    with pytest.raises(SettingsError):
        read_or_make_registry_key(tmp_path)


def test_a_dangling_link_makes_no_key(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SettingsError):
        read_or_make_registry_key(tmp_path)


def test_fingerprints_are_compared_whole_and_as_people_write_them(tmp_path: Path) -> None:
    public = public_text(read_or_make_registry_key(tmp_path))
    found = fingerprint_of(public)
    assert len(found) == 64
    spaced = ":".join(found[at : at + 2] for at in range(0, 64, 2)).upper()
    assert same_fingerprint(found, public)
    assert same_fingerprint(f"  {spaced}\n", public)
    for wrong in (found[:-2], found[:-1], "", found[:-1] + "g", "0" * 64):
        assert not same_fingerprint(wrong, public)
    for no_key in ("", "AAAA", "!!"):
        with pytest.raises(FormatError):
            fingerprint_of(no_key)
