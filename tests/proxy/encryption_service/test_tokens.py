"""Tokens that must not be believed, each by the rule it breaks, beside the one that must."""

import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc.jwk import RSAKey

from proxy.encryption_service.jwks import parse_key_set
from proxy.encryption_service.tokens import (
    LEEWAY_S,
    MAX_TOKEN_BYTES,
    Claims,
    Issuer,
    KeysNeededError,
    TokenError,
    TokenFault,
    unverified_issuer,
    verify,
)
from tests.proxy.encryption_service.token_mint import Mint, part

NOW = 1_800_000_000.0
URL = "https://idp.example/keys"
IDP = Mint("https://idp.example", "kacls")
ELSE = Mint("https://else.example", "kacls", number=2)
ISSUERS = {IDP.issuer: Issuer(issuer=IDP.issuer, audiences=frozenset({"kacls", "other"}), jwks_url=URL)}


class Keys:
    """The set of IDP, and what was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self._keys = parse_key_set(IDP.key_set())

    def find(self, url: str, kid: str) -> RSAKey | None:
        self.asked.append((url, kid))
        return self._keys.get(kid) if url == URL else None


def judged(token: str, **options: Any) -> Claims:
    return verify(token, issuers=ISSUERS, keys=Keys(), now_s=options.pop("now_s", NOW), **options)


def fault(token: str, **options: Any) -> TokenFault:
    with pytest.raises(TokenError) as caught:
        judged(token, **options)
    assert (token[-40:] or "never") not in str(caught.value)
    return caught.value.fault


def good(**changes: Any) -> str:
    return IDP.token({"email": "a@example.com", **changes}, now_s=NOW)


def test_a_good_token_is_believed() -> None:
    claims = judged(good(nbf=int(NOW), groups=["x"]))
    assert claims.needed("email") == "a@example.com"
    assert claims.issuer is ISSUERS[IDP.issuer]
    assert (claims.issued_at_s, claims.expires_at_s) == (NOW, NOW + 3600)
    assert claims.text("absent") is None
    assert "a@example.com" not in repr(claims)
    for name in ("groups", "iat"):
        with pytest.raises(TokenError, match="not a string"):
            claims.text(name)


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ["nobody", "kacls"]},
        {"aud": "other"},
        {"exp": NOW + 60.5},
        {"exp": str(int(NOW) + 60), "iat": str(int(NOW))},  # as Google's reference shows them
        {"iat": int(NOW) + LEEWAY_S},  # the issuer's clock is ahead
        {"exp": int(NOW) - LEEWAY_S + 1, "iat": int(NOW) - 3600},  # or behind
        {"nbf": None, "jti": "x", "nonce": {"deep": [1]}},
    ],
)
def test_what_is_right_in_other_ways_is_believed(changes: dict[str, Any]) -> None:
    assert judged(good(**changes)).needed("email")


@pytest.mark.parametrize("kind", ["JWT", "jwt", "application/jwt", None])
def test_types_of_token(kind: str | None) -> None:
    assert judged(IDP.token({}, now_s=NOW, typ=kind)).expires_at_s > NOW


SIGNABLE = {"alg": "RS256", "kid": "key-1"}
TWICE = f'{{"iss":"{IDP.issuer}","iss":"{IDP.issuer}"}}'
TIMES = {"iss": IDP.issuer, "aud": "kacls", "iat": NOW, "exp": NOW + 9}

BAD: dict[str, tuple[Callable[[], str], TokenFault]] = {
    "alg none": (lambda: IDP.unsigned({}, now_s=NOW), TokenFault.ALGORITHM),
    "alg None": (lambda: IDP.token({}, now_s=NOW, alg="nOnE"), TokenFault.ALGORITHM),
    "no alg": (lambda: IDP.token({}, now_s=NOW, alg=None), TokenFault.ALGORITHM),
    "alg list": (lambda: IDP.token({}, now_s=NOW, alg=["RS256"]), TokenFault.ALGORITHM),
    "HS256 with the public key": (lambda: IDP.confused({}, now_s=NOW), TokenFault.ALGORITHM),
    "RS512": (lambda: IDP.token({}, now_s=NOW, alg="RS512"), TokenFault.ALGORITHM),
    "PS256": (lambda: IDP.token({}, now_s=NOW, alg="PS256"), TokenFault.ALGORITHM),
    "ES256": (lambda: IDP.token({}, now_s=NOW, alg="ES256"), TokenFault.ALGORITHM),
    "crit": (lambda: IDP.token({}, now_s=NOW, crit=["exp"]), TokenFault.HEADER),
    "empty crit": (lambda: IDP.token({}, now_s=NOW, crit=[]), TokenFault.HEADER),
    "b64": (lambda: IDP.token({}, now_s=NOW, b64=False), TokenFault.HEADER),
    "zip": (lambda: IDP.token({}, now_s=NOW, zip="DEF"), TokenFault.HEADER),
    "access token": (lambda: IDP.token({}, now_s=NOW, typ="at+jwt"), TokenFault.HEADER),
    "typ number": (lambda: IDP.token({}, now_s=NOW, typ=1), TokenFault.HEADER),
    "no kid": (lambda: IDP.token({}, now_s=NOW, kid=None), TokenFault.HEADER),
    "kid number": (lambda: IDP.token({}, now_s=NOW, kid=1), TokenFault.HEADER),
    "kid path": (lambda: IDP.token({}, now_s=NOW, kid="../../dev/null"), TokenFault.KEY),
    "kid unknown": (lambda: IDP.token({}, now_s=NOW, kid="key-2"), TokenFault.KEY),
    "kid huge": (lambda: IDP.token({}, now_s=NOW, kid="k" * 300), TokenFault.HEADER),
    "foreign issuer": (lambda: ELSE.token({}, now_s=NOW), TokenFault.ISSUER),
    "no issuer": (lambda: good(iss=None), TokenFault.ISSUER),
    "issuer list": (lambda: good(iss=[IDP.issuer]), TokenFault.ISSUER),
    "issuer with slash": (lambda: good(iss=IDP.issuer + "/"), TokenFault.ISSUER),
    "foreign key": (lambda: ELSE.token({"iss": IDP.issuer}, now_s=NOW), TokenFault.SIGNATURE),
    "own key in the header": (
        lambda: ELSE.token({"iss": IDP.issuer}, now_s=NOW, jwk=ELSE.jwk()),
        TokenFault.SIGNATURE,
    ),
    "own key set in the header": (
        lambda: ELSE.token({"iss": IDP.issuer}, now_s=NOW, jku="https://else.example/keys"),
        TokenFault.SIGNATURE,
    ),
    "wrong audience": (lambda: good(aud="somebody"), TokenFault.AUDIENCE),
    "no audience": (lambda: good(aud=None), TokenFault.AUDIENCE),
    "empty audience": (lambda: good(aud=[]), TokenFault.AUDIENCE),
    "audience of numbers": (lambda: good(aud=["kacls", 1]), TokenFault.AUDIENCE),
    "audience object": (lambda: good(aud={"kacls": 1}), TokenFault.AUDIENCE),
    "forty audiences": (lambda: good(aud=["kacls"] * 40), TokenFault.AUDIENCE),
    "expired": (lambda: good(iat=1, exp=int(NOW) - LEEWAY_S), TokenFault.EXPIRED),
    "issued tomorrow": (
        lambda: good(iat=int(NOW) + LEEWAY_S + 1, exp=int(NOW) + 9999),
        TokenFault.NOT_YET,
    ),
    "not before": (lambda: good(nbf=int(NOW) + LEEWAY_S + 1), TokenFault.NOT_YET),
    "expires before it is issued": (lambda: good(exp=int(NOW) - 1), TokenFault.LIFETIME),
    "no exp": (lambda: good(exp=None), TokenFault.CLAIM),
    "no iat": (lambda: good(iat=None), TokenFault.CLAIM),
    "exp true": (lambda: good(exp=True), TokenFault.CLAIM),
    "exp words": (lambda: good(exp="never"), TokenFault.CLAIM),
    "exp huge": (lambda: good(exp=10**18), TokenFault.CLAIM),
    "exp long digits": (lambda: good(exp="9" * 5000), TokenFault.CLAIM),
    "exp negative": (lambda: good(exp=-1), TokenFault.CLAIM),
    "exp infinite": (lambda: IDP.signed(SIGNABLE, '{"exp":Infinity}'), TokenFault.MALFORMED),
    "nbf null": (lambda: IDP.signed(SIGNABLE, {**TIMES, "nbf": None}), TokenFault.CLAIM),
    "a claim twice": (
        lambda: IDP.signed(SIGNABLE, TWICE),
        TokenFault.MALFORMED,
    ),
    "a header twice": (
        lambda: IDP.signed('{"alg":"none","alg":"RS256","kid":"key-1"}', {"iss": IDP.issuer}),
        TokenFault.MALFORMED,
    ),
    "claims are a list": (lambda: IDP.signed(SIGNABLE, [1]), TokenFault.MALFORMED),
    "claims are text": (lambda: IDP.signed(SIGNABLE, '"x"'), TokenFault.MALFORMED),
    "deep": (lambda: IDP.signed(SIGNABLE, "[" * 9000), TokenFault.MALFORMED),
    "huge": (lambda: good(padding="x" * MAX_TOKEN_BYTES), TokenFault.TOO_LARGE),
    "two parts": (lambda: good().rpartition(".")[0], TokenFault.MALFORMED),
    "five parts": (lambda: good() + ".a.b", TokenFault.MALFORMED),
    "empty": (lambda: "", TokenFault.MALFORMED),
    "padded": (lambda: good() + "=", TokenFault.MALFORMED),
    "blank": (lambda: good() + " ", TokenFault.MALFORMED),
    "newline inside": (lambda: good().replace(".", "\n.", 1), TokenFault.MALFORMED),
    "standard alphabet": (lambda: "+" + good(), TokenFault.MALFORMED),
    "not ASCII": (lambda: "é" + good(), TokenFault.MALFORMED),
    "surrogate": (lambda: "\ud800" + good(), TokenFault.MALFORMED),
    "no signature": (lambda: good().rpartition(".")[0] + ".", TokenFault.SIGNATURE),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_token_is_refused_for_what_is_wrong_with_it(name: str) -> None:
    make, expected = BAD[name]
    assert fault(make()) is expected


def test_no_key_is_asked_for_before_the_rest_of_the_header_is_right() -> None:
    keys = Keys()
    for name in ("alg none", "HS256 with the public key", "foreign issuer", "huge", "crit"):
        with pytest.raises(TokenError):
            verify(BAD[name][0](), issuers=ISSUERS, keys=keys, now_s=NOW)
    assert keys.asked == []
    verify(good(), issuers=ISSUERS, keys=keys, now_s=NOW)
    assert keys.asked == [(URL, "key-1")]


def test_every_changed_character_is_noticed() -> None:
    token = good()
    for index, character in enumerate(token):
        if index % 7:  # a third of a second instead of three
            continue
        other = "A" if character != "A" else "B"
        with pytest.raises(TokenError):
            judged(token[:index] + other + token[index + 1 :])


def test_a_signature_of_the_same_text_by_another_hash_is_none() -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import padding

    from envelope.base64url import b64u_encode

    text = good().rpartition(".")[0]
    for signature in (
        IDP.key.sign(text.encode(), padding.PKCS1v15(), hashes.SHA512()),
        IDP.key.sign(text.encode(), padding.PSS(padding.MGF1(hashes.SHA256()), 32), hashes.SHA256()),
    ):
        assert fault(f"{text}.{b64u_encode(signature)}") is TokenFault.SIGNATURE


def test_a_lifetime_can_be_bounded() -> None:
    token = good(exp=int(NOW) + 3600)
    assert judged(token, max_lifetime_s=3600).expires_at_s > NOW
    assert fault(token, max_lifetime_s=3599) is TokenFault.LIFETIME


def test_a_set_that_has_to_be_fetched_is_said_to_the_caller() -> None:
    class Empty:
        def find(self, url: str, kid: str) -> RSAKey | None:
            raise KeysNeededError(url, patient=True)

    with pytest.raises(KeysNeededError) as caught:
        verify(good(), issuers=ISSUERS, keys=Empty(), now_s=NOW)
    assert caught.value.url == URL


def test_the_unverified_issuer_is_read_and_nothing_more() -> None:
    assert unverified_issuer(ELSE.token({}, now_s=NOW)) == ELSE.issuer
    for text in ("", "a.b.c", good(iss=3), good(padding="x" * MAX_TOKEN_BYTES)):
        assert unverified_issuer(text) is None


HEADERS = st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit"]), st.sampled_from(["RS256", 1, None]))
CLAIMS = st.dictionaries(
    st.sampled_from(["iss", "aud", "exp"]), st.recursive(st.none() | st.floats(), st.lists)
)


def unsigned(header: object, claims: object) -> str:
    return f"{part(json.dumps(header))}.{part(json.dumps(claims))}.AAAA"


@given(st.one_of(st.text(max_size=200), st.builds(unsigned, HEADERS, CLAIMS)))
def test_whatever_comes_is_refused_as_a_token(text: str) -> None:
    with pytest.raises(TokenError):
        judged(text)


def test_a_bomb_costs_no_memory() -> None:
    bomb = IDP.signed(SIGNABLE, "[" * 12_000)
    tracemalloc.start()
    try:
        assert fault(bomb) is TokenFault.MALFORMED
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
