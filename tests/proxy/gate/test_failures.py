"""What a log may say of a request that is refused."""

import pytest
from mitmproxy.http import Request

from proxy.gate.failures import described


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("a.example:8443", "PUT a.example:8443"),
        ("\udcff\u00e9", r"PUT \udcff\xe9"),
        ("a" * 250_000, "PUT " + "a" * 100),
        ("\u00ff" * 250_000, "PUT " + r"\xff" * 100),
    ],
    ids=["usual", "not ASCII", "long", "long and not ASCII"],
)
def test_a_request_is_named_by_method_and_host(host: str, told: str) -> None:
    request = Request.make("PUT", "https://b.example/secret?key=secret")
    request.headers["Host"] = host
    assert described(request) == told


def test_without_a_host_field_it_is_where_it_goes() -> None:
    request = Request.make("M" * 30, "https://b.example/secret")
    assert described(request) == "M" * 20 + " b.example"
