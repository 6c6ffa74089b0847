"""S3's operations: a table from method, level and subresource to what a request means.

1. Source: the S3 API reference, "Actions" (2006-03-01). What is not in the table is refused; so is a request
   with a parameter that its operation is not known to have: a service may make another operation of it.
2. A subresource is a parameter that names an operation (`?acl`). One request has at most one of them, but for
   the pairs that belong together.
3. Whether a body is content (sealed), a document of the protocol (read, bounded, passed on) or nothing is the
   table's word; what comes in place of it is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from proxy.profiles.s3.addressing import Level


class Kind(Enum):
    """What becomes of a request, and of its answer."""

    FORWARD = "forward"  # no body goes up; what comes down speaks of no content
    DOCUMENT = "document"  # the body is a document of the protocol, read and passed on
    LIST = "list"  # the answer is a list with sizes and ETags
    READ = "read"  # a read of content
    HEAD = "head"
    WRITE = "write"  # the body is content
    COPY = "copy"  # the service copies from another object
    CREATE_UPLOAD = "create-upload"
    WRITE_PART = "write-part"
    COPY_PART = "copy-part"
    COMPLETE_UPLOAD = "complete-upload"
    ABORT_UPLOAD = "abort-upload"
    LIST_PARTS = "list-parts"
    FORM = "form"  # a form, sent by a browser
    REFUSE = "refuse"  # works on content at the service, or writes a part of it in place


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation. `parameters`: those it may have, beyond the ones that any request may have."""

    name: str
    kind: Kind
    parameters: frozenset[str] = frozenset()


def _operation(name: str, kind: Kind, *parameters: str) -> Operation:
    return Operation(name=name, kind=kind, parameters=frozenset(parameters))


type _Routes = Mapping[tuple[str, Level, str], Operation]

_SERVICE, _BUCKET, _OBJECT = Level.SERVICE, Level.BUCKET, Level.OBJECT
_LISTING: Final = ("prefix", "delimiter", "max-keys", "encoding-type")
_UPLOADS: Final = ("prefix", "delimiter", "max-uploads", "encoding-type", "key-marker", "upload-id-marker")
_RESPONSE: Final = (
    "response-cache-control",
    "response-content-disposition",
    "response-content-encoding",
    "response-content-language",
    "response-content-type",
    "response-expires",
)
_ANY: Final = frozenset({"x-id"})
"""SDKs add the operation's name for logs."""

# Settings of a bucket: documents that are put, got and deleted. `id` names one of several.
_SETTINGS: Final[Mapping[str, tuple[str, bool, tuple[str, ...]]]] = {
    # subresource: (name, can be deleted, parameters)
    "accelerate": ("BucketAccelerateConfiguration", False, ()),
    "acl": ("BucketAcl", False, ()),
    "analytics": ("BucketAnalyticsConfiguration", True, ("id", "continuation-token")),
    "cors": ("BucketCors", True, ()),
    "encryption": ("BucketEncryption", True, ()),
    "intelligent-tiering": ("BucketIntelligentTieringConfiguration", True, ("id", "continuation-token")),
    "inventory": ("BucketInventoryConfiguration", True, ("id", "continuation-token")),
    "lifecycle": ("BucketLifecycleConfiguration", True, ()),
    "logging": ("BucketLogging", False, ()),
    "metrics": ("BucketMetricsConfiguration", True, ("id", "continuation-token")),
    "notification": ("BucketNotificationConfiguration", False, ()),
    "object-lock": ("ObjectLockConfiguration", False, ()),
    "ownershipControls": ("BucketOwnershipControls", True, ()),
    "policy": ("BucketPolicy", True, ()),
    "publicAccessBlock": ("PublicAccessBlock", True, ()),
    "replication": ("BucketReplication", True, ()),
    "requestPayment": ("BucketRequestPayment", False, ()),
    "tagging": ("BucketTagging", True, ()),
    "versioning": ("BucketVersioning", False, ()),
    "website": ("BucketWebsite", True, ()),
}


def _bucket_settings() -> dict[tuple[str, Level, str], Operation]:
    routes: dict[tuple[str, Level, str], Operation] = {}
    for subresource, (name, deletable, parameters) in _SETTINGS.items():
        routes["GET", _BUCKET, subresource] = _operation(f"Get{name}", Kind.FORWARD, *parameters)
        routes["PUT", _BUCKET, subresource] = _operation(f"Put{name}", Kind.DOCUMENT, *parameters)
        if deletable:
            routes["DELETE", _BUCKET, subresource] = _operation(f"Delete{name}", Kind.FORWARD, *parameters)
    return routes


ROUTES: Final[_Routes] = {
    ("GET", _SERVICE, ""): _operation(
        "ListBuckets", Kind.FORWARD, "max-buckets", "continuation-token", "prefix", "bucket-region"
    ),
    ("HEAD", _SERVICE, ""): _operation("HeadService", Kind.FORWARD),
    # Buckets.
    ("PUT", _BUCKET, ""): _operation("CreateBucket", Kind.DOCUMENT),
    ("DELETE", _BUCKET, ""): _operation("DeleteBucket", Kind.FORWARD),
    ("HEAD", _BUCKET, ""): _operation("HeadBucket", Kind.FORWARD),
    ("POST", _BUCKET, ""): _operation("PostObject", Kind.FORM),
    ("GET", _BUCKET, ""): _operation(
        "ListObjects", Kind.LIST, *_LISTING, "marker", "fetch-owner", "continuation-token", "start-after"
    ),
    ("GET", _BUCKET, "list-type"): _operation(
        "ListObjectsV2", Kind.LIST, *_LISTING, "fetch-owner", "continuation-token", "start-after"
    ),
    ("GET", _BUCKET, "versions"): _operation(
        "ListObjectVersions", Kind.LIST, *_LISTING, "key-marker", "version-id-marker"
    ),
    ("GET", _BUCKET, "uploads"): _operation("ListMultipartUploads", Kind.FORWARD, *_UPLOADS),
    ("GET", _BUCKET, "location"): _operation("GetBucketLocation", Kind.FORWARD),
    ("GET", _BUCKET, "policyStatus"): _operation("GetBucketPolicyStatus", Kind.FORWARD),
    ("POST", _BUCKET, "delete"): _operation("DeleteObjects", Kind.DOCUMENT),
    **_bucket_settings(),
    # Objects.
    ("PUT", _OBJECT, ""): _operation("PutObject", Kind.WRITE),
    ("GET", _OBJECT, ""): _operation("GetObject", Kind.READ, "versionId", "partNumber", *_RESPONSE),
    ("HEAD", _OBJECT, ""): _operation("HeadObject", Kind.HEAD, "versionId", "partNumber", *_RESPONSE),
    ("DELETE", _OBJECT, ""): _operation("DeleteObject", Kind.FORWARD, "versionId"),
    ("GET", _OBJECT, "acl"): _operation("GetObjectAcl", Kind.FORWARD, "versionId"),
    ("PUT", _OBJECT, "acl"): _operation("PutObjectAcl", Kind.DOCUMENT, "versionId"),
    ("GET", _OBJECT, "tagging"): _operation("GetObjectTagging", Kind.FORWARD, "versionId"),
    ("PUT", _OBJECT, "tagging"): _operation("PutObjectTagging", Kind.DOCUMENT, "versionId"),
    ("DELETE", _OBJECT, "tagging"): _operation("DeleteObjectTagging", Kind.FORWARD, "versionId"),
    ("GET", _OBJECT, "retention"): _operation("GetObjectRetention", Kind.FORWARD, "versionId"),
    ("PUT", _OBJECT, "retention"): _operation("PutObjectRetention", Kind.DOCUMENT, "versionId"),
    ("GET", _OBJECT, "legal-hold"): _operation("GetObjectLegalHold", Kind.FORWARD, "versionId"),
    ("PUT", _OBJECT, "legal-hold"): _operation("PutObjectLegalHold", Kind.DOCUMENT, "versionId"),
    ("GET", _OBJECT, "attributes"): _operation("GetObjectAttributes", Kind.LIST, "versionId"),
    ("POST", _OBJECT, "restore"): _operation("RestoreObject", Kind.DOCUMENT, "versionId"),
    ("POST", _OBJECT, "select"): _operation("SelectObjectContent", Kind.REFUSE, "select-type"),
    ("GET", _OBJECT, "torrent"): _operation("GetObjectTorrent", Kind.REFUSE),
    # Uploads in parts.
    ("POST", _OBJECT, "uploads"): _operation("CreateMultipartUpload", Kind.CREATE_UPLOAD),
    ("PUT", _OBJECT, "uploadId"): _operation("UploadPart", Kind.WRITE_PART, "partNumber"),
    ("POST", _OBJECT, "uploadId"): _operation("CompleteMultipartUpload", Kind.COMPLETE_UPLOAD),
    ("DELETE", _OBJECT, "uploadId"): _operation("AbortMultipartUpload", Kind.ABORT_UPLOAD),
    ("GET", _OBJECT, "uploadId"): _operation(
        "ListParts", Kind.LIST_PARTS, "max-parts", "part-number-marker", "encoding-type"
    ),
}
"""(method, level, subresource or "") -> operation."""

_COPIES: Final[Mapping[Kind, Operation]] = {
    Kind.WRITE: _operation("CopyObject", Kind.COPY),
    Kind.WRITE_PART: _operation("UploadPartCopy", Kind.COPY_PART, "partNumber"),
}
_SUBRESOURCES: Final = frozenset(subresource for _, _, subresource in ROUTES if subresource)
_AUTHENTICATION: Final = frozenset(
    {
        "x-amz-algorithm",
        "x-amz-credential",
        "x-amz-date",
        "x-amz-expires",
        "x-amz-signature",
        "x-amz-signedheaders",
        "x-amz-security-token",
        "x-amz-content-sha256",
    }
)
# Writes in place, and what S3 Object Lambda answers with.
_REFUSED_FIELDS: Final = frozenset(
    {"x-amz-write-offset-bytes", "x-amz-request-route", "x-amz-request-token", "x-amz-rename-source"}
)


def is_authentication(parameter: str) -> bool:
    """Whether *parameter* is of a presigned URL's signature."""
    return parameter.lower() in _AUTHENTICATION


def find_operation(
    method: str, level: Level, parameters: Mapping[str, str], fields: "Mapping[str, object] | frozenset[str]"
) -> Operation | None:
    """The operation of a request; None for what is not in the table. *fields*: names, lower case."""
    names = {name for name in parameters if not is_authentication(name)} - _ANY
    if not _REFUSED_FIELDS.isdisjoint(fields):
        return None
    named = names & _SUBRESOURCES
    if len(named) > 1:
        return None
    subresource = next(iter(named), "")
    operation = ROUTES.get((method, level, subresource))
    if operation is None:
        return None
    if "x-amz-copy-source" in fields:
        operation = _COPIES.get(operation.kind)
        if operation is None:
            return None
    others = names - {subresource} - operation.parameters
    # Presigners move x-amz-* headers into the query; the service takes them from there.
    others = {name for name in others if not name.lower().startswith("x-amz-")}
    if others or (subresource == "list-type" and parameters["list-type"] != "2"):
        return None
    if operation.kind in {Kind.WRITE_PART, Kind.COPY_PART} and "partNumber" not in names:
        return None
    return operation
