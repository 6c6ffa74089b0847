"""A client's access key and what this proxy signs with upstream in its name.

1. A request that is changed on its way needs a new signature, so the proxy must know a secret that the
   service knows: the client's own, or, for a *gateway key* that is good at this proxy alone, another one.
2. A picture of the directory holds secrets sealed. They are opened where a signature is made or verified, for
   that moment (`UpstreamCredential.open`), and Python forgets them when it likes: see docs/threat-model.md.
3. No secret is in a repr, an error or a comparison.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, override

import msgspec

from envelope.derive import lp
from envelope.errors import FormatError, SealgateError
from envelope.keys import NetworkService

MAX_SECRET_LENGTH: Final = 1024
MAX_TOKEN_LENGTH: Final = 8192
# `AKIA...`, Swift's `account:user`, MinIO's and Ceph's own; a comma, space, `=` or `/` ends it in a header.
_ACCESS_KEY: Final = re.compile(r"[A-Za-z0-9_.:@+~-]{3,128}")
_SECRET: Final = re.compile(rf"[\x21-\x7e]{{8,{MAX_SECRET_LENGTH}}}")
_TOKEN: Final = re.compile(rf"[\x21-\x7e]{{1,{MAX_TOKEN_LENGTH}}}")


class VaultError(SealgateError):
    """A stored secret does not open: its file key is not here, or the row was changed."""


class Secrets(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is sealed in a row. *upstream_secret* None: the client's own secret is good upstream too."""

    client_secret: str
    upstream_secret: str | None = None
    session_token: str | None = None

    @override
    def __repr__(self) -> str:
        return "Secrets(...)"

    @property
    def signs_with(self) -> bytes:
        """The secret upstream signatures are made with."""
        return (self.upstream_secret or self.client_secret).encode()


def check_access_key(text: str) -> str:
    """FormatError unless *text* can be an access key id."""
    if not _ACCESS_KEY.fullmatch(text):
        raise FormatError(f"not an access key id: {text!r} (3 to 128 letters, digits and _ . : @ + ~ - are)")
    return text


def check_secrets(secrets: Secrets) -> Secrets:
    """FormatError, without the text, for what no service gives out."""
    for secret in (secrets.client_secret, secrets.upstream_secret):
        if secret is not None and not _SECRET.fullmatch(secret):
            raise FormatError(
                f"a secret access key has 8 to {MAX_SECRET_LENGTH} printable characters, no blanks"
            )
    if secrets.session_token is not None and not _TOKEN.fullmatch(secrets.session_token):
        raise FormatError(f"a session token has 1 to {MAX_TOKEN_LENGTH} printable characters, no blanks")
    return secrets


def binding(owner: NetworkService, access_key: str) -> bytes:
    """What a sealed secret is bound to: it opens for this tenant, service and access key alone."""
    parts = (b"sealgate/v1 upstream credential", owner.tenant.encode(), owner.service.encode())
    return b"".join(map(lp, (*parts, access_key.encode())))


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamCredential:
    """One entry of a network service's vault."""

    access_key: str
    """The client's access key id."""
    upstream_access_key: str
    """The one that the service knows; often the same."""
    not_after_s: float | None
    created_at_s: float
    sealed: bytes = field(repr=False)
    opener: Callable[[bytes], bytes | None] = field(repr=False, compare=False)
    """Opens what was sealed for this entry; None: it does not open."""

    def open(self) -> Secrets:
        """VaultError if they do not open."""
        opened = self.opener(self.sealed)
        if opened is None:
            raise VaultError("the stored secret of an access key does not open: see `sealgate doctor`")
        try:
            return msgspec.json.decode(opened, type=Secrets)
        except msgspec.MsgspecError:
            raise VaultError("a stored secret is none") from None

    def has_ended(self, now_s: float) -> bool:
        return self.not_after_s is not None and now_s >= self.not_after_s
