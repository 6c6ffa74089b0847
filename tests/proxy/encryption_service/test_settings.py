"""What may be said of a listener."""

from pathlib import Path

import msgspec
import pytest

from proxy.encryption_service.settings import EncryptionServiceSettings, HttpLimits, listener_files

TLS = {"certificate_file": Path("c.pem"), "key_file": Path("k.pem"), "dialects": ["xks"]}
PLAIN = {"plain": True, "host": "127.0.0.1", "dialects": ["transit"]}


def read(*listen: dict[str, object], **more: object) -> EncryptionServiceSettings:
    return msgspec.convert({"listen": list(listen), **more}, EncryptionServiceSettings)


def test_what_is_right_is_taken() -> None:
    settings = read(
        TLS | {"client_roots_file": Path("r.pem"), "client_subject": "kms"},
        PLAIN | {"host": "::1", "port": 81},
        PLAIN | {"host": "localhost", "port": 82},
        PLAIN | {"port": 0},
        PLAIN | {"port": 0},
    )
    assert [listen.name for listen in settings.listen[:3]] == ["0.0.0.0:8200", "[::1]:81", "127.0.0.1:82"]
    assert [(name, path.name, secret) for name, path, secret in listener_files(settings)] == [
        ("encryption_service.listen[0].certificate_file", "c.pem", False),
        ("encryption_service.listen[0].key_file", "k.pem", True),
        ("encryption_service.listen[0].client_roots_file", "r.pem", False),
    ]
    assert read().listen == ()


@pytest.mark.parametrize(
    ("listen", "words"),
    [
        (PLAIN | {"host": "0.0.0.0"}, "loopback"),
        (PLAIN | {"certificate_file": Path("c.pem")}, "no certificates"),
        (PLAIN | {"client_subject": "kms"}, "no certificates"),
        (PLAIN | {"host": "kms.example"}, "IP address"),
        (PLAIN | {"port": 65536}, "port"),
        (PLAIN | {"dialects": []}, "dialects"),
        (PLAIN | {"dialects": ["xks", "xks"]}, "dialects"),
        (PLAIN | {"dialects": ["aws"]}, "Invalid enum value"),
        (PLAIN | {"porte": 1}, "unknown field"),
        ({"dialects": ["xks"]}, "certificate_file and key_file are required"),
        (TLS | {"key_file": Path("c.pem")}, "two files"),
        (TLS | {"client_subject": "kms"}, "client_roots_file"),
    ],
)
def test_what_is_wrong_is_refused(listen: dict[str, object], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        read(listen)


def test_addresses_differ_and_limits_are_limits() -> None:
    with pytest.raises(msgspec.ValidationError, match="same address"):
        read(PLAIN, PLAIN | {"host": "localhost"})
    for name, value in [("head_s", 0), ("keep_alive_s", 4000), ("connections", 0)]:
        with pytest.raises(msgspec.ValidationError, match=name):
            read(limits={name: value})
    assert HttpLimits().head_s == 10
