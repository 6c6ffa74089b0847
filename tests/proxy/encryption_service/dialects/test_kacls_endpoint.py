"""What an admin may set up, and what is refused before the first call."""

from typing import Any

import pytest

from proxy.encryption_service.dialects.kacls_endpoint import (
    GOOGLE_ISSUERS,
    Kacls,
    Privileged,
    check_endpoint,
)
from proxy.encryption_service.model import DialectEntry, DialectName, KaclsSettings, TokenIssuer
from tests.proxy.encryption_service.dialects.kacls_rig import (
    ADMIN,
    GUEST_IDP,
    IDP,
    OTHER_KACLS,
    URL,
    endpoint,
    issuer_of,
)

IDP_SETTING = issuer_of(IDP)


def idp(*, issuer: str = "x", jwks_url: str = "https://x/y", audience: str = "a") -> TokenIssuer:
    return TokenIssuer(issuer=issuer, jwks_url=jwks_url, audience=audience)


def compiled(**changes: Any) -> Kacls:
    place = endpoint(**changes)
    settings = KaclsSettings(endpoints=(place,))
    return Kacls.of(DialectEntry(tenant="acme", dialect=DialectName.KACLS, settings=settings), place)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"authorization_issuers": ()},
        {"url": URL + "/"},
        {"guest_issuers": (issuer_of(GUEST_IDP),)},
        {"signing_key": None, "trusted_kacls": ()},
        {"perimeters": {"": {"hd": ("acme.example",)}}},
        {"allowed_origins": ("https://test.example:8443",)},
        {
            "authentication_issuers": (
                IDP_SETTING,
                TokenIssuer(issuer=IDP.issuer, jwks_url=IDP_SETTING.jwks_url, audience="mobile"),
            )
        },
    ],
)
def test_what_can_be_set_up(changes: dict[str, Any]) -> None:
    check_endpoint(endpoint(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"url": "http://kacls.example.com/kacls/acme"}, "https"),
        ({"url": "https://kacls.example.com"}, "path of its own"),
        ({"url": "https://kacls.example.com/a%2fb"}, "path of its own"),
        ({"url": "https://kacls.example.com/a//b"}, "path of its own"),
        ({"url": "https://kacls.example.com/kacls/acme?x=1"}, "path of its own"),
        ({"url": "https://kacls.example.com/v1/transit"}, "another dialect's"),
        ({"url": "https://kacls.example.com/sealgate/v1"}, "another dialect's"),
        ({"url": "https://kacls.example.com/x/kms/xks/v1"}, "another dialect's"),
        ({"authentication_issuers": ()}, "no identity provider"),
        ({"authorization_issuers": (IDP_SETTING,)}, "one party has one part"),
        ({"guest_issuers": (IDP_SETTING,)}, "one party has one part"),
        (
            {"authentication_issuers": (idp(issuer=URL),)},
            "one party has one part",
        ),
        (
            {
                "authentication_issuers": (
                    idp(issuer=next(iter(GOOGLE_ISSUERS))),
                ),
                "authorization_issuers": (),
            },
            "one party has one part",
        ),
        ({"trusted_kacls": (URL,)}, "one party has one part"),
        ({"trusted_kacls": ("http://169.254.169.254/latest",)}, "trusted_kacls"),
        ({"trusted_kacls": (OTHER_KACLS,), "signing_key": None}, "signing_key"),
        (
            {"authentication_issuers": (idp(jwks_url="file:///etc/passwd"),)},
            "jwks_url",
        ),
        ({"authentication_issuers": (idp(audience=""),)}, "audience"),
        ({"authentication_issuers": (idp(issuer=""),)}, "a name"),
        (
            {
                "authentication_issuers": (
                    IDP_SETTING,
                    idp(issuer=IDP.issuer),
                )
            },
            "two jwks_url",
        ),
        ({"admins": {"not an address": ("privilegedwrap",)}}, "e-mail"),
        ({"admins": {ADMIN: ("wrap",)}}, "which calls"),
        ({"admins": {ADMIN: ()}}, "which calls"),
        ({"admins": {ADMIN: ("privilegedwrap",), ADMIN.upper(): ("privilegedwrap",)}}, "twice"),
        ({"perimeters": {"p" * 129: {}}}, "128 bytes"),
        ({"perimeters": {"p": {"department": ()}}}, "admits nobody"),
        ({"perimeters": {"p": {"": ("x",)}}}, "admits nobody"),
        ({"allowed_origins": ("*",)}, "origin"),
        ({"allowed_origins": ("https://a.example/",)}, "origin"),
        ({"allowed_origins": ("http://a.example",)}, "origin"),
        ({"allowed_origins": ("null",)}, "origin"),
    ],
)  # fmt: skip
def test_what_cannot_be_set_up(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        check_endpoint(endpoint(**changes))


def test_google_is_believed_unless_others_are_named() -> None:
    google = compiled(authorization_issuers=()).authorization
    assert len(google) == 5
    drive = google["gsuitecse-tokenissuer-drive@system.gserviceaccount.com"]
    assert drive.audiences == {"cse-authorization"}
    assert drive.jwks_url == (
        "https://www.googleapis.com/service_accounts/v1/jwk/"
        "gsuitecse-tokenissuer-drive@system.gserviceaccount.com"
    )
    assert set(compiled().authorization).isdisjoint({"apps-security-cse-kaclscommunication"})


def test_names_have_one_form() -> None:
    kacls = compiled(url=URL + "/", trusted_kacls=(OTHER_KACLS + "/",))
    assert kacls.url == URL
    assert set(kacls.sources) == {OTHER_KACLS}
    assert kacls.sources[OTHER_KACLS].jwks_url == OTHER_KACLS + "/certs"
    assert kacls.may(ADMIN.upper(), Privileged.WRAP)
    assert not kacls.may("admin@acme.example.evil.example", Privileged.WRAP)
    assert kacls.conditions("") == {}
    assert kacls.conditions("unknown") is None
    both = TokenIssuer(issuer=IDP.issuer, jwks_url=IDP_SETTING.jwks_url, audience="mobile")
    users = compiled(authentication_issuers=(IDP_SETTING, both)).users
    assert users[IDP.issuer].audiences == {IDP.audience, "mobile"}
    assert set(users) == {IDP.issuer, URL}
    assert set(compiled(signing_key=None, trusted_kacls=()).users) == {IDP.issuer}


@pytest.mark.parametrize(
    ("admin", "other"),
    [
        ("security@acme.example", "\u017fecurity@acme.example"),  # long s
        ("kim@acme.example", "\u212aim@acme.example"),  # Kelvin sign
        ("boss@acme.example", "bo\u00df@acme.example"),  # sharp s
        ("fiona@acme.example", "\ufb01ona@acme.example"),  # ligature fi
    ],
)
def test_a_name_that_unicode_folds_to_the_admins_is_not_the_admins(admin: str, other: str) -> None:
    """An identity provider may well let somebody register it."""
    place = compiled(admins={admin: (Privileged.UNWRAP,)})
    assert place.may(admin.upper(), Privileged.UNWRAP)
    assert not place.may(other, Privileged.UNWRAP)
