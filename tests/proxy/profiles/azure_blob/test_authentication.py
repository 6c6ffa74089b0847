"""Who has signed a request, and what leaves in its place."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from proxy import refusals
from proxy.asking import Outgoing
from proxy.messages.message import Fields, RequestHead
from proxy.profiles.azure_blob.addressing import read_target
from proxy.profiles.azure_blob.authentication import (
    AsItCame,
    Authenticated,
    Resigner,
    Standing,
    Unchanged,
    authenticate,
    drops_what_is_signed,
    signing_headers,
)
from proxy.profiles.azure_signatures import is_signed, parse_key
from proxy.refusals import Refusal, RefusedError
from proxy.vault.model import Secrets, UpstreamCredential, VaultError
from tests.proxy.profiles.azure_blob.azure_signer import (
    ACCOUNT,
    HOST,
    KEY,
    KEY_TEXT,
    NOW_S,
    TOKEN,
    credential,
    head,
    signed,
)

OTHER_TEXT = KEY_TEXT[:-4] + "AA=="
OTHER = parse_key(OTHER_TEXT)
VAULT: Mapping[str, UpstreamCredential] = {ACCOUNT: credential()}


def asked(
    its: RequestHead,
    vault: Mapping[str, UpstreamCredential] = VAULT,
    *,
    now_s: float = NOW_S,
    account_in_path: bool = False,
) -> Authenticated:
    return authenticate(its, read_target(its.target, account_in_path=account_in_path), vault, now_s=now_s)


def refused(its: RequestHead, vault: Mapping[str, UpstreamCredential] = VAULT) -> Refusal:
    with pytest.raises(RefusedError) as caught:
        asked(its, vault)
    return caught.value.refusal


def outgoing(its: RequestHead, **changed: str) -> Outgoing:
    fields = {name: its.fields.all(name)[0] for name in its.fields}
    fields |= {name.replace("_", "-"): value for name, value in changed.items()}
    return Outgoing(
        method=its.method,
        target=its.target,
        fields=tuple((name.encode(), value.encode()) for name, value in fields.items()),
    )


def test_an_account_of_the_vault() -> None:
    found = asked(signed("PUT", "/box/a%20b?comp=block&blockid=QQ%3D%3D", {"content-length": "5"}))
    assert (found.standing, found.account, found.upstream_key) == (Standing.VERIFIED, ACCOUNT, KEY)
    assert "upstream_key" not in repr(found)
    in_path = signed("GET", f"/{ACCOUNT}/box/b")
    assert asked(in_path, account_in_path=True).standing is Standing.VERIFIED


def test_a_gateway_key_is_good_here_alone() -> None:
    vault = {ACCOUNT: credential(Secrets(client_secret=OTHER_TEXT, upstream_secret=KEY_TEXT))}
    assert asked(signed("GET", "/box/b", key=OTHER), vault).upstream_key == KEY
    assert refused(signed("GET", "/box/b"), vault) == refusals.SIGNATURE_MISMATCH


def test_what_is_signed_cannot_be_changed() -> None:
    its = signed("GET", "/box/b", {"content-type": "text/plain"})
    fields = {name: its.fields.all(name)[0] for name in its.fields}
    for more in (
        {"x-ms-meta-a": "1"},
        {"content-length": "6"},
        {"range": "bytes=0-1"},
        {"if-match": "*"},
        {"content-type": "text/html"},
    ):
        raw = [(name.encode(), value.encode()) for name, value in (fields | more).items()]
        assert refused(replace(its, fields=Fields(raw))) == refusals.SIGNATURE_MISMATCH
    for other in (
        replace(its, method="DELETE"),
        replace(its, target="/box/c"),
        replace(its, target="/box/b?comp=tags"),
    ):
        assert refused(other) == refusals.SIGNATURE_MISMATCH


def test_dates() -> None:
    for at_s in (NOW_S - 899, NOW_S + 899):
        assert asked(signed("GET", "/box/b", at_s=at_s)).standing is Standing.VERIFIED
    for at_s in (NOW_S - 902, NOW_S + 902):
        assert refused(signed("GET", "/box/b", at_s=at_s)) == refusals.REQUEST_SKEWED
    assert refused(signed("GET", "/box/b", {"x-ms-date": "yesterday"})) == refusals.AUTHORIZATION_MALFORMED


def test_credentials_that_have_ended_or_do_not_open() -> None:
    ended = {ACCOUNT: credential(not_after_s=NOW_S)}
    assert refused(signed("GET", "/box/b"), ended) == refusals.ACCESS_KEY_UNKNOWN
    for broken in (
        {ACCOUNT: replace(credential(), opener=lambda _sealed: None)},
        {ACCOUNT: credential(Secrets(client_secret="no base64 of an account"))},
    ):
        with pytest.raises(VaultError) as caught:
            asked(signed("GET", "/box/b"), broken)
        assert "no base64" not in str(caught.value)


def test_others() -> None:
    assert asked(signed("GET", "/box/b", account="somebody")).standing is Standing.UNJUDGED
    assert asked(signed("GET", "/box/b"), {}).standing is Standing.UNJUDGED
    assert asked(head("GET", f"/box/b?{TOKEN}")).standing is Standing.TOKEN
    assert asked(head("GET", "/box/b", {"authorization": "Bearer x"})).standing is Standing.TOKEN
    assert asked(head("GET", "/box/b")).standing is Standing.ANONYMOUS
    assert asked(head("GET", "/box/b?sig=x")).standing is Standing.ANONYMOUS, "no token has a signature alone"


@pytest.mark.parametrize(
    ("its", "refusal"),
    [
        (head("GET", "/box/b", {"authorization": "SharedKeyLite a:b"}), refusals.SHARED_KEY_LITE),
        (head("GET", "/box/b", {"authorization": "SharedKey a"}), refusals.AUTHORIZATION_MALFORMED),
        (head("GET", "/box/b", {"authorization": "sharedkey x:y"}), refusals.AUTHORIZATION_MALFORMED),
        (signed("GET", f"/box/b?{TOKEN}"), refusals.AUTHORIZATION_MALFORMED),
        (head("GET", "/box/b", {"authorization": "SharedKey\tacct:x"}), refusals.AUTHORIZATION_MALFORMED),
        (head("GET", "/box/b", {"authorization": "SharedKeyLite\ta:b"}), refusals.AUTHORIZATION_MALFORMED),
        (head("GET", "/box/b", {"authorization": "x"}), refusals.AUTHORIZATION_MALFORMED),
        (
            RequestHead(
                method="GET",
                target="/box/b",
                fields=Fields([(b"Authorization", b"Bearer x"), (b"Authorization", b"Bearer y")]),
            ),
            refusals.AUTHORIZATION_MALFORMED,
        ),
    ],
    ids=["lite", "no signature", "scheme", "two ways", "tab", "lite by tab", "no scheme", "twice"],
)
def test_what_is_malformed(its: RequestHead, refusal: Refusal) -> None:
    assert refused(its) == refusal


def test_the_account_of_the_path_is_the_one_that_signs() -> None:
    its = signed("GET", "/another/box/b")
    with pytest.raises(RefusedError) as caught:
        asked(its, account_in_path=True)
    assert caught.value.refusal == refusals.AUTHORIZATION_MALFORMED


def test_a_signed_field_has_one_value() -> None:
    twice = Fields([(b"x-ms-meta-a", b"1"), (b"X-Ms-Meta-A", b"2")])
    with pytest.raises(RefusedError):
        signing_headers(twice)
    assert signing_headers(Fields([(b"accept", b"1"), (b"accept", b"2")])) == {}


def test_connection_takes_nothing_away_that_is_signed() -> None:
    for name in ("x-ms-lease-id", "if-match", "Range"):
        assert drops_what_is_signed(head("PUT", "/box/b", {"connection": f"close, {name}"}))
    assert not drops_what_is_signed(head("PUT", "/box/b", {"connection": "close, x-other"}))


def test_what_leaves_is_signed_anew() -> None:
    resigner = Resigner(account=ACCOUNT, key=OTHER, host=HOST, wall_s=lambda: NOW_S + 60)
    made = resigner(
        outgoing(signed("PUT", "/box/b?comp=block&blockid=QQ"), content_length="120", host="proxy")
    )
    fields = Fields(made.fields)
    assert is_signed(OTHER, made.method, made.target, signing_headers(fields))
    assert fields.all("host") == [HOST]
    assert len(fields.all("x-ms-date")) == len(fields.all("authorization")) == 1
    assert "date" not in fields
    assert "OTHER" not in repr(resigner)
    assert repr(OTHER) not in repr(resigner)


def test_without_a_key_only_what_is_unchanged_leaves() -> None:
    its = signed("GET", "/box/b", {"range": "bytes=0-5"}, account="somebody")
    unchanged = Unchanged(account="somebody", head=its, host=HOST)
    assert Fields(unchanged(outgoing(its, accept_encoding="identity")).fields).sole("host") == HOST
    for changed in (
        replace(outgoing(its), target="/box/c"),
        replace(outgoing(its), method="HEAD"),
        outgoing(its, range="bytes=0-87"),
        outgoing(its, x_ms_lease_id="1"),
    ):
        with pytest.raises(RefusedError) as caught:
            unchanged(changed)
        assert caught.value.refusal == refusals.CANNOT_SIGN


def test_without_a_key_no_other_body_leaves() -> None:
    """The length is signed, the content is not: a sealed body of the same length must not pass either."""
    its = signed("PUT", "/box/b?comp=tags", {"content-length": "5"}, account="somebody")
    unchanged = Unchanged(account="somebody", head=its, host=HOST)
    with pytest.raises(RefusedError):
        unchanged(outgoing(its))
    assert replace(unchanged, same_body=True)(outgoing(its)).method == "PUT"


def test_tokens_leave_as_they_came() -> None:
    its = head("PUT", f"/box/b?{TOKEN}", {"authorization": "Bearer x", "host": "proxy"})
    made = AsItCame(host=HOST)(outgoing(its))
    assert made.target == its.target
    assert Fields(made.fields).all("authorization") == ["Bearer x"]
    assert Fields(made.fields).all("host") == [HOST]
