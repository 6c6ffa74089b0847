"""Header fields that a presigner has moved into the query of a URL: `?X-Amz-Acl=private`.

1. The service takes them from there as it takes them from the head, so the rules for fields hold for them,
   too. What is in no table here is refused: it might be a rule of the service's that we do not know.
2. Checksums of plaintext never go up, wherever they stand: those of a body are compared with it and taken
   out of the query, where digests in client metadata are (option `metadata_digests`).
3. What changes what a request is (a copy, a write in place), and what requests of our own would need as
   well (a customer's key), is refused in the query.
4. Names are compared decoded, and in lower case.
"""

from collections.abc import Mapping
from typing import Final

from proxy import refusals
from proxy.messages.message import Fields, digest_fields
from proxy.profiles.s3.routes import Kind, is_authentication
from proxy.refusals import RefusedError

_PREFIX: Final = "x-amz-"
_CHECKSUM: Final = "x-amz-checksum-"
_META: Final = "x-amz-meta-"
_SDK_ALGORITHM: Final = "x-amz-sdk-checksum-algorithm"
_PASSING: Final = frozenset(
    {
        "x-amz-acl",
        "x-amz-bucket-object-lock-enabled",
        "x-amz-bypass-governance-retention",
        "x-amz-expected-bucket-owner",
        "x-amz-max-parts",
        "x-amz-mfa",
        "x-amz-object-attributes",
        "x-amz-object-lock-legal-hold",
        "x-amz-object-lock-mode",
        "x-amz-object-lock-retain-until-date",
        "x-amz-object-ownership",
        "x-amz-optional-object-attributes",
        "x-amz-part-number-marker",
        "x-amz-request-payer",
        "x-amz-server-side-encryption",
        "x-amz-server-side-encryption-aws-kms-key-id",
        "x-amz-server-side-encryption-bucket-key-enabled",
        "x-amz-server-side-encryption-context",
        "x-amz-storage-class",
        "x-amz-tagging",
        "x-amz-user-agent",
        "x-amz-website-redirect-location",
    }
)
_PASSING_PREFIXES: Final = (_META, "x-amz-grant-")
# Where a checksum is of content: in the query of anything else it speaks of a document, or asks for one.
_OF_CONTENT: Final = frozenset({Kind.WRITE, Kind.WRITE_PART, Kind.CREATE_UPLOAD})
_ASKING: Final = frozenset({Kind.READ, Kind.HEAD, Kind.LIST, Kind.FORWARD})


def hoisted(parameters: Mapping[str, str]) -> dict[str, str]:
    """Of a query's *parameters*: those that stand for header fields, by their names in lower case."""
    found = {name.lower(): value for name, value in parameters.items()}
    return {
        name: value
        for name, value in found.items()
        if name.startswith(_PREFIX) and not is_authentication(name)
    }


def is_checksum(name: str) -> bool:
    """Whether the field *name* holds a checksum of a body, or speaks of one."""
    return name.startswith(_CHECKSUM) or name == _SDK_ALGORITHM


def gone_of(fields: Mapping[str, str], kind: Kind, *, keeps_metadata: bool) -> frozenset[str]:
    """Names of those of the hoisted *fields* that do not go up. RefusedError for what may not stand there.

    *keeps_metadata*: client metadata stays, though by its name it is a digest.
    """
    gone: set[str] = set()
    for name in fields:
        if is_checksum(name):
            if kind not in _OF_CONTENT | _ASKING:
                raise RefusedError(refusals.UNKNOWN_ROUTE)
            gone.add(name)
        elif name not in _PASSING and not name.startswith(_PASSING_PREFIXES):
            raise RefusedError(refusals.UNKNOWN_ROUTE)
    if fields and kind in {Kind.COPY, Kind.COPY_PART}:
        raise RefusedError(refusals.UNKNOWN_ROUTE)
    if not keeps_metadata:
        as_fields = Fields((name.encode("utf-8", "surrogateescape"), b"") for name in fields)
        gone.update(name for name in digest_fields(as_fields) if name.startswith(_META))
    return frozenset(gone)
