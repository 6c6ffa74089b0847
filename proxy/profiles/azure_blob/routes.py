"""Azure Blob's operations: a table from method, place, `restype` and `comp` to what a request means.

1. Source: "Blob service REST API" (Azure Storage REST reference). What is not in the table is refused; so
   is a request with a parameter or a field that would make another operation of it.
2. Whether a body is content (sealed), a document of the protocol (read, bounded, passed on) or nothing is
   the table's word. A document has the root element that stands there.
3. Pages, appends, queries, batches, bodies by URL and structured bodies are refused: content would be
   written in place, read at the service, or come in a shape that is not understood here.
"""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from proxy.profiles.azure_blob.addressing import Place, Target


class Kind(Enum):
    """What becomes of a request, and of its answer."""

    FORWARD = "forward"  # no body goes up; what comes down speaks of no content
    DOCUMENT = "document"  # the body is a document of the protocol, read and passed on
    LIST = "list"  # the answer is a list of blobs, with sizes and digests
    READ = "read"
    HEAD = "head"
    WRITE = "write"  # the body is a blob's content
    BLOCK = "block"  # the body is a block's
    COMMIT = "commit"  # the body lists the blocks of a blob
    BLOCK_LIST = "block-list"  # the answer lists blocks
    COPY = "copy"  # the service copies from another blob
    PROPERTIES = "properties"  # a blob's properties are set, of which its MD5 is one


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    name: str
    kind: Kind
    parameters: frozenset[str] = frozenset()
    """Those it may have, beyond those of any request."""
    root: str = ""
    """Of a document: its element."""


def _operation(name: str, kind: Kind = Kind.FORWARD, *parameters: str, root: str = "") -> Operation:
    return Operation(name=name, kind=kind, parameters=frozenset(parameters), root=root)


_SERVICE, _CONTAINER, _BLOB = Place.SERVICE, Place.CONTAINER, Place.BLOB
_LISTING: Final = ("prefix", "marker", "maxresults", "include")
_VERSION: Final = ("snapshot", "versionid")

ROUTES: Final[Mapping[tuple[str, Place, str, str], Operation]] = {
    # The account.
    ("GET", _SERVICE, "", "list"): _operation("List Containers", Kind.FORWARD, *_LISTING),
    ("GET", _SERVICE, "", "blobs"): _operation(
        "Find Blobs by Tags", Kind.FORWARD, "where", "marker", "maxresults", "include"
    ),
    ("GET", _SERVICE, "service", "properties"): _operation("Get Blob Service Properties"),
    ("PUT", _SERVICE, "service", "properties"): _operation(
        "Set Blob Service Properties", Kind.DOCUMENT, root="StorageServiceProperties"
    ),
    ("GET", _SERVICE, "service", "stats"): _operation("Get Blob Service Stats"),
    ("POST", _SERVICE, "service", "userdelegationkey"): _operation(
        "Get User Delegation Key", Kind.DOCUMENT, root="KeyInfo"
    ),
    **{
        (method, place, "account", "properties"): _operation("Get Account Information")
        for method in ("GET", "HEAD")
        for place in Place
    },
    # Containers.
    ("PUT", _CONTAINER, "container", ""): _operation("Create Container"),
    ("DELETE", _CONTAINER, "container", ""): _operation("Delete Container"),
    **{
        (method, _CONTAINER, "container", comp): _operation(name)
        for method in ("GET", "HEAD")
        for comp, name in (
            ("", "Get Container Properties"),
            ("metadata", "Get Container Metadata"),
            ("acl", "Get Container ACL"),
        )
    },
    ("PUT", _CONTAINER, "container", "metadata"): _operation("Set Container Metadata"),
    ("PUT", _CONTAINER, "container", "acl"): _operation(
        "Set Container ACL", Kind.DOCUMENT, root="SignedIdentifiers"
    ),
    ("PUT", _CONTAINER, "container", "lease"): _operation("Lease Container"),
    ("PUT", _CONTAINER, "container", "undelete"): _operation("Restore Container"),
    ("GET", _CONTAINER, "container", "list"): _operation(
        "List Blobs", Kind.LIST, *_LISTING, "delimiter", "showonly", "startfrom"
    ),
    ("GET", _CONTAINER, "container", "blobs"): _operation(
        "Find Blobs by Tags in Container", Kind.FORWARD, "where", "marker", "maxresults", "include"
    ),
    # Blobs.
    ("PUT", _BLOB, "", ""): _operation("Put Blob", Kind.WRITE),
    ("GET", _BLOB, "", ""): _operation("Get Blob", Kind.READ, *_VERSION),
    ("HEAD", _BLOB, "", ""): _operation("Get Blob Properties", Kind.HEAD, *_VERSION),
    ("DELETE", _BLOB, "", ""): _operation("Delete Blob", Kind.FORWARD, *_VERSION, "deletetype"),
    ("PUT", _BLOB, "", "block"): _operation("Put Block", Kind.BLOCK, "blockid"),
    ("PUT", _BLOB, "", "blocklist"): _operation("Put Block List", Kind.COMMIT),
    ("GET", _BLOB, "", "blocklist"): _operation(
        "Get Block List", Kind.BLOCK_LIST, *_VERSION, "blocklisttype"
    ),
    ("PUT", _BLOB, "", "properties"): _operation("Set Blob Properties", Kind.PROPERTIES),
    ("GET", _BLOB, "", "metadata"): _operation("Get Blob Metadata", Kind.FORWARD, *_VERSION),
    ("HEAD", _BLOB, "", "metadata"): _operation("Get Blob Metadata", Kind.FORWARD, *_VERSION),
    ("PUT", _BLOB, "", "metadata"): _operation("Set Blob Metadata"),
    ("GET", _BLOB, "", "tags"): _operation("Get Blob Tags", Kind.FORWARD, *_VERSION),
    ("PUT", _BLOB, "", "tags"): _operation("Set Blob Tags", Kind.DOCUMENT, "versionid", root="Tags"),
    ("PUT", _BLOB, "", "lease"): _operation("Lease Blob"),
    ("PUT", _BLOB, "", "snapshot"): _operation("Snapshot Blob"),
    ("PUT", _BLOB, "", "tier"): _operation("Set Blob Tier", Kind.FORWARD, *_VERSION),
    ("PUT", _BLOB, "", "undelete"): _operation("Undelete Blob"),
    ("PUT", _BLOB, "", "copy"): _operation("Abort Copy Blob", Kind.FORWARD, "copyid"),
    ("PUT", _BLOB, "", "expiry"): _operation("Set Blob Expiry"),
    ("PUT", _BLOB, "", "legalhold"): _operation("Set Blob Legal Hold", Kind.FORWARD, *_VERSION),
    ("PUT", _BLOB, "", "immutabilitypolicies"): _operation(
        "Set Blob Immutability Policy", Kind.FORWARD, *_VERSION
    ),
    ("DELETE", _BLOB, "", "immutabilitypolicies"): _operation(
        "Delete Blob Immutability Policy", Kind.FORWARD, *_VERSION
    ),
}
"""(method, place, restype, comp) -> operation; both parameters in lower case."""

COPY: Final = _operation("Copy Blob", Kind.COPY)

# Of shared access signatures: what a token is made of, and the fields of the answer it sets.
_TOKEN: Final = frozenset(
    {
        "rscc", "rscd", "rsce", "rscl", "rsct", "saoid", "scid", "sdd", "sduoid", "se", "ses", "si", "sig",
        "sip", "skdutid", "ske", "skoid", "sks", "skt", "sktid", "skv", "sp", "spr", "sr", "srt", "ss", "st",
        "suoid", "sv",
    }
)  # fmt: skip
_ANY: Final = _TOKEN | {"comp", "restype", "timeout"}
# With these a request writes in place, or takes its body from elsewhere, or has one in a frame of its own.
_REFUSED_FIELDS: Final = frozenset(
    {
        "x-ms-blob-content-length",
        "x-ms-blob-sequence-number",
        "x-ms-copy-source-authorization",
        "x-ms-incremental-copy",
        "x-ms-page-write",
        "x-ms-sequence-number-action",
        "x-ms-source-content-crc64",
        "x-ms-source-content-md5",
        "x-ms-source-range",
        "x-ms-structured-body",
        "x-ms-structured-content-length",
    }
)
_BLOCK_BLOB: Final = "blockblob"


def is_of_token(parameter: str) -> bool:
    """Whether *parameter* (lower case) belongs to a shared access signature."""
    return parameter in _TOKEN


def find_operation(
    method: str, target: Target, fields: Mapping[str, str] | Container[str]
) -> Operation | None:
    """The operation of a request; None for what is refused. *fields*: names in lower case."""
    if any(name in fields for name in _REFUSED_FIELDS):
        return None
    given = target.parameters
    key = (method, target.place, given.get("restype", "").lower(), given.get("comp", "").lower())
    operation = ROUTES.get(key)
    if operation is None:
        return None
    if "x-ms-copy-source" in fields:
        if operation.kind is not Kind.WRITE or "x-ms-blob-type" in fields:
            return None  # from a URL: the body would be fetched by the service
        operation = COPY
    if not _ANY.union(operation.parameters).issuperset(given):
        return None
    return operation


def is_block_blob(blob_type: str | None) -> bool:
    """Of `x-ms-blob-type`."""
    return blob_type is not None and blob_type.lower() == _BLOCK_BLOB
