"""Sources of copies: URLs that name the service, or us in reverse mode."""

from dataclasses import replace

import pytest

from proxy import refusals
from proxy.plans.request import Mode, Request
from proxy.profiles.azure_blob.addressing import Target, read_target
from proxy.profiles.azure_blob.copying import source_at_client, source_at_service
from proxy.refusals import RefusedError
from proxy.tenants.model import Upstream
from tests.proxy.profiles.azure_blob.azure_signer import ENTRY, HOST, head, request, route

US = "blobs.corp.example:8443"


def copy(source: str, *, mode: Mode = Mode.FORWARD) -> tuple[Request, Target]:
    host = US if mode is Mode.REVERSE else HOST
    asked = request(head("PUT", "/box/copy", {"x-ms-copy-source": source}, host=host), route(mode=mode))
    return asked, read_target("/box/copy", account_in_path=False)


def test_the_services_own_address() -> None:
    for source in (f"https://{HOST}/box/a%20b?sv=1&sig=c%2B", f"https://{HOST.upper()}:443/box/a"):
        assert source_at_service(*copy(source)) == source
        assert source_at_service(*copy(source, mode=Mode.REVERSE)) == source


def test_ours_becomes_the_services() -> None:
    made = source_at_service(*copy(f"https://{US}/box/a%20b?snapshot=2026&sig=c%2B", mode=Mode.REVERSE))
    assert made == f"https://{HOST}/box/a%20b?snapshot=2026&sig=c%2B"


def test_the_services_becomes_ours_in_reverse_mode() -> None:
    asked, _target = copy("x", mode=Mode.REVERSE)
    assert source_at_client(asked, f"https://{HOST}/box/a?b=c") == f"https://{US}/box/a?b=c"
    assert source_at_client(asked, "https://other.example/box/a") is None
    assert source_at_client(copy("x")[0], f"https://{HOST}/box/a") is None


@pytest.mark.parametrize(
    "source",
    [
        "",
        "/box/a",
        "https://other.blob.core.windows.net/box/a",
        f"https://{US}/box/a",
        f"http://{HOST}/box/a",
        f"https://user@{HOST}/box/a",
        f"https://{HOST}:444/box/a",
        f"https://{HOST}/box",
        f"https://{HOST}/box?restype=container",
        f"https://{HOST}\\@other.example/box/a",
        f"https://{HOST}/box/a#b",
    ],
)
def test_elsewhere(source: str) -> None:
    with pytest.raises(RefusedError) as caught:
        source_at_service(*copy(source))
    assert caught.value.refusal in (refusals.COPY_SOURCE, refusals.UNKNOWN_ROUTE)


def test_accounts_do_not_mix() -> None:
    entry = replace(ENTRY, upstream=Upstream("https", "localhost", 10000))
    for account, fits in (("one", True), ("two", False)):
        asked = request(
            head("PUT", "/one/box/copy", {"x-ms-copy-source": f"https://localhost:10000/{account}/box/a"}),
            route(entry=entry, account_in_path=True),
        )
        target = read_target("/one/box/copy", account_in_path=True)
        if fits:
            assert source_at_service(asked, target).endswith("/one/box/a")
        else:
            with pytest.raises(RefusedError):
                source_at_service(asked, target)
