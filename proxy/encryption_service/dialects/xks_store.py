"""An external key store as AWS KMS is told of it: its path, its credentials, and who may use it.

1. The prefix is judged before anybody is authenticated, so it is made unguessable.
2. What AWS would refuse is refused where a store is set up, not when the first call comes.
3. Secondary authorization is off without rules: the AWS key policy decides. With rules, a call is admitted by
   the first rule all of whose patterns match; a field that a call lacks matches no pattern, `*` neither.
"""

import re
import secrets
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Final

import msgspec

from proxy.encryption_service.credentials import check_access_key
from proxy.encryption_service.dialects.xks_messages import Metadata
from proxy.encryption_service.model import XksRule, XksStore

API_PATH: Final = "/kms/xks/v1"
MAX_URI_PATH_LENGTH: Final = 128
"""Of prefix and API_PATH together: what AWS takes as `XksProxyUriPath`."""
MAX_PREFIX_LENGTH: Final = MAX_URI_PATH_LENGTH - len(API_PATH) - 1
MAX_KEY_ID_LENGTH: Final = 128

_PREFIX: Final = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
_KEY_ID: Final = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_KEY_ID_LENGTH}}}")
_PREFIX_BYTES: Final = 18


def new_prefix(name: str = "") -> str:
    """An unguessable prefix: 144 random bits behind *name*, which may be empty."""
    prefix = "/".join(part for part in (name.strip("/"), secrets.token_urlsafe(_PREFIX_BYTES)) if part)
    check_prefix(prefix)
    return prefix


def check_prefix(prefix: str) -> None:
    """ValueError unless AWS takes `/<prefix>/kms/xks/v1`."""
    if len(prefix) > MAX_PREFIX_LENGTH or not _PREFIX.fullmatch(prefix):
        raise ValueError(
            f"the prefix {prefix!r} must be segments of A-Z a-z 0-9 _ - joined by single slashes, "
            f"at most {MAX_PREFIX_LENGTH} characters"
        )


def check_key_id(key_id: str) -> None:
    """ValueError unless AWS takes *key_id* as `XksKeyId`, and no path swallows it."""
    if not _KEY_ID.fullmatch(key_id) or key_id in (".", ".."):
        raise ValueError(
            f"the external key id {key_id!r} must be 1 to {MAX_KEY_ID_LENGTH} of A-Z a-z 0-9 . _ -, "
            "and neither . nor .."
        )


def check_store(store: XksStore) -> None:
    """ValueError for what AWS would not take, or what would admit nobody."""
    check_prefix(store.prefix)
    for key_id in store.keys:
        check_key_id(key_id)
    if len(set(store.keys.values())) != len(store.keys):
        raise ValueError(f"store {store.prefix}: two external key ids name one key")
    if any(all(pattern is None for pattern in _patterns(rule)) for rule in store.rules):
        raise ValueError(f"store {store.prefix}: a rule without a pattern would admit everybody")


def uri_path(prefix: str) -> str:
    """What AWS calls `XksProxyUriPath`."""
    return f"/{prefix}{API_PATH}"


def console_file(prefix: str, access_key_id: str, secret: str) -> bytes:
    """The file that the AWS KMS console imports (specification, "XKS Proxy Configuration"). Holds the secret.

    ValueError or FormatError if AWS would not take it; neither shows the secret.
    """
    check_prefix(prefix)
    check_access_key(access_key_id, secret)
    content = {
        "XksProxyUriPath": uri_path(prefix),
        "XksProxyAuthenticationCredential": {
            "AccessKeyId": access_key_id,
            "RawSecretAccessKey": secret,
        },
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"


def admitting_rule(rules: Iterable[XksRule], metadata: Metadata) -> XksRule | None:
    """The first of *rules* that admits the call (rule 3); None if none does."""
    return next((rule for rule in rules if _admits(rule, metadata)), None)


def _patterns(rule: XksRule) -> tuple[str | None, ...]:
    return (rule.principal, rule.kms_key, rule.via_service, rule.source_vpc, rule.operation)


def _admits(rule: XksRule, metadata: Metadata) -> bool:
    values = (
        (metadata.aws_principal_arn,),
        (metadata.kms_key_arn,),
        (metadata.kms_via_service,),
        (metadata.aws_source_vpc, metadata.aws_source_vpce),
        (metadata.kms_operation,),
    )
    return all(
        pattern is None or any(value is not None and _matches(value, pattern) for value in candidates)
        for pattern, candidates in zip(_patterns(rule), values, strict=True)
    )


def _matches(value: str, pattern: str) -> bool:
    # Only `*` and `?` are special; fnmatch's translation does not backtrack.
    return fnmatchcase(value, pattern.replace("[", "[[]"))
