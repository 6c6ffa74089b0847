"""What a path and a query name, and what of them a request of ours keeps."""

import pytest

from envelope.multipart import upload_ref
from proxy import refusals
from proxy.profiles.azure_blob.addressing import Place, read_target
from proxy.refusals import Refusal, RefusedError


def refused(target: str, *, account_in_path: bool = False) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        read_target(target, account_in_path=account_in_path)
    return caught.value.refusal


@pytest.mark.parametrize(
    ("target", "place", "container", "blob"),
    [
        ("/", Place.SERVICE, "", ""),
        ("/?comp=list", Place.SERVICE, "", ""),
        ("/box?restype=container", Place.CONTAINER, "box", ""),
        ("/box/", Place.CONTAINER, "box", ""),
        ("/box/blob", Place.BLOB, "box", "blob"),
        ("/box/a%20b/%C3%A4+", Place.BLOB, "box", "a b/\u00e4+"),
        ("/box//x/", Place.BLOB, "box", "/x/"),
        ("/$root/blob", Place.BLOB, "$root", "blob"),
        ("/%24web/index.html", Place.BLOB, "$web", "index.html"),
    ],
)
def test_places(target: str, place: Place, container: str, blob: str) -> None:
    found = read_target(target, account_in_path=False)
    assert (found.place, found.account, found.container, found.blob) == (place, "", container, blob)
    if target != "/" and not target.startswith("/?"):
        found = read_target(f"/account1{target}", account_in_path=True)
        assert (found.place, found.account, found.container, found.blob) == (
            place,
            "account1",
            container,
            blob,
        )


def test_an_account_alone() -> None:
    for target in ("/account1", "/account1/", "/account1?comp=list"):
        assert read_target(target, account_in_path=True).place is Place.SERVICE
    assert refused("/", account_in_path=True) == refusals.UNKNOWN_ROUTE


@pytest.mark.parametrize("target", ["/b%2Fx/y", "/BOX/blob", "/bo/blob", "/box%2e/blob", "/-ox/blob"])
def test_what_is_no_container(target: str) -> None:
    assert refused(target) == refusals.UNKNOWN_ROUTE


def test_an_account_is_one_segment() -> None:
    assert refused("/account1%2Fbox/x/y", account_in_path=True) == refusals.UNKNOWN_ROUTE


@pytest.mark.parametrize(
    "target",
    ["/box/../b2/c", "/box/a/%2e%2e/c", "/box/./c", "/box/a/..", "/box/..%2fc", "/box/a\\..\\c", "/%2e/c"],
)
@pytest.mark.parametrize("account_in_path", [False, True])
def test_no_path_leads_up(target: str, account_in_path: bool) -> None:
    assert refused(f"/acct{target}" if account_in_path else target, account_in_path=account_in_path) == (
        refusals.BAD_MESSAGE
    )


@pytest.mark.parametrize("target", ["/box/%ff", "/box/b?comp=%ff", "/box/b?comp=a&COMP=b", "/box/b?a&a"])
def test_what_could_be_read_in_two_ways(target: str) -> None:
    assert refused(target) == refusals.BAD_MESSAGE


def test_the_upload_is_the_blobs_whatever_its_spelling() -> None:
    one = read_target("/box/a%20b?comp=block&blockid=QQ", account_in_path=False)
    two = read_target("/box/%61 b".replace(" ", "%20"), account_in_path=False)
    assert one.upload_ref == two.upload_ref == upload_ref("azure-blob//box/a b")
    others = ["/box/a%20c", "/bo2/a%20b", "/box/a%20b/"]
    assert one.upload_ref not in {read_target(other, account_in_path=False).upload_ref for other in others}
    assert read_target("/acc/box/a%20b", account_in_path=True).upload_ref != one.upload_ref


def test_requests_of_ours_keep_the_token_and_the_path() -> None:
    target = read_target(
        "/box/a%2fb?sv=1%202&comp=block&blockid=QUE%3D&sig=a%2Bb%3D&timeout=9", account_in_path=False
    )
    assert target.asking(("comp", "blocklist"), without=("blockid",)) == (
        "/box/a%2fb?sv=1%202&sig=a%2Bb%3D&timeout=9&comp=blocklist"
    )
    assert target.asking(("blockid", "a+/=")) == (
        "/box/a%2fb?sv=1%202&comp=block&sig=a%2Bb%3D&timeout=9&blockid=a%2B%2F%3D"
    )
    assert read_target("/box/x?comp=tags", account_in_path=False).asking(without=("comp",)) == "/box/x"


def test_a_token_is_in_no_repr() -> None:
    assert "c2lnbmVk" not in repr(read_target("/box/b?sig=c2lnbmVk", account_in_path=False))
