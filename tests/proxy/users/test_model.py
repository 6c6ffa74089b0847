"""The words of users and networks, and what is no word of them."""

import ipaddress

import pytest

from envelope.errors import FormatError
from proxy.users.model import (
    Password,
    check_user_name,
    parse_networks,
    parse_proxy_address,
    parse_user,
    prefix_length,
    verifier_of,
)


def test_users() -> None:
    assert parse_user("acme/alice@example.com") == ("acme", "alice@example.com")
    for wrong in (
        "acme",
        "acme/",
        "/alice",
        "Acme/alice",
        "acme/al:ice",
        "acme/a b",
        "acme/" + "a" * 64,
        "acme/a/b",
    ):
        with pytest.raises(FormatError):
            parse_user(wrong)
    with pytest.raises(FormatError):
        check_user_name("alice\n")


def test_passwords_are_drawn_and_bound() -> None:
    one, two = Password.draw("acme", "alice"), Password.draw("acme", "alice")
    assert one.text != two.text
    assert len(one.text) == 32
    assert one.verifier == verifier_of("acme", "alice", one.text.encode())
    assert one.verifier != verifier_of("acme", "alic", ("e" + one.text).encode())
    assert one.verifier != verifier_of("globex", "alice", one.text.encode())


def test_networks() -> None:
    found = parse_networks(["10.0.0.0/8", "2001:db8::/32", "10.0.0.0/8"])
    assert [str(network) for network in found] == ["10.0.0.0/8", "2001:db8::/32"]
    for wrong in ("10.0.0.1/8", "ten", "10.0.0.0/33", ""):
        with pytest.raises(FormatError):
            parse_networks([wrong])
    assert prefix_length(found, ipaddress.ip_address("10.2.3.4")) == 8
    assert prefix_length(found, ipaddress.ip_address("11.2.3.4")) is None


@pytest.mark.parametrize("text", ["proxy.example:3128", "10.0.0.1:1", "[2001:db8::1]:3128"])
def test_proxy_addresses(text: str) -> None:
    assert parse_proxy_address(text) == text


@pytest.mark.parametrize(
    "text", ["proxy", "proxy:", "proxy:0", "proxy:65536", 'a";alert(1)//:80', "a b:80", ":80"]
)
def test_what_is_no_proxy_address(text: str) -> None:
    with pytest.raises(FormatError):
        parse_proxy_address(text)
