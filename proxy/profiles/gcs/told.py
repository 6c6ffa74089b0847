"""What a client tells the service of an object: its metadata, in JSON, on its way up.

1. It has members that the API knows, or it is refused: anything else might be content. What is of ciphertext
   and not of content (sizes, digests) does not go up.
2. An object that may be a composite bears a *mark*, an entry in its custom metadata: its plaintext's length,
   or that this has to be looked up. So lists need not look at all the others. It is set where a resumable
   upload begins, it stays where clients change metadata, and no client sets it.
3. It says nothing that is believed where content is opened: what an object is, its own first bytes say.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from proxy import refusals
from proxy.profiles.gcs.digests import OF_RESOURCES, Digests
from proxy.profiles.json_rewriting import JsonError, JsonObject
from proxy.refusals import RefusedError

MARK: Final = "sealgate-size"
UNKNOWN_SIZE: Final = "?"
_SIZE: Final = re.compile(r"[0-9]{1,15}")
_NOT_TOLD: Final = ("size", *OF_RESOURCES)
# https://cloud.google.com/storage/docs/json_api/v1/objects, and what destinations of copies may have.
_MEMBERS: Final = frozenset(
    {
        "acl", "bucket", "cacheControl", "componentCount", "contentDisposition", "contentEncoding",
        "contentLanguage", "contentType", "contexts", "crc32c", "customTime", "customerEncryption", "etag",
        "eventBasedHold", "generation", "hardDeleteTime", "id", "kind", "kmsKeyName", "md5Hash", "mediaLink",
        "metadata", "metageneration", "name", "owner", "restoreToken", "retention", "retentionExpirationTime",
        "selfLink", "size", "softDeleteTime", "storageClass", "temporaryHold", "timeCreated", "timeDeleted",
        "timeFinalized", "timeStorageClassUpdated", "updated",
    }
)  # fmt: skip
# A destination that says no more than this takes its source's metadata as it is.
_NAMING: Final = frozenset({"bucket", "id", "kind", "name", "selfLink"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldMetadata:
    """What the service is told of an object, and what the client said of its content."""

    document: bytes
    said: Digests


def told_metadata(document: bytes, *, mark: str | None = None, entries: Iterable[str] = ()) -> ToldMetadata:
    """Of a client's metadata. RefusedError(MALFORMED_DOCUMENT, CONTENT_CODING, INVALID_DIGEST).

    *mark*: what the object is to bear. *entries* of its custom metadata are cleared one by one, where all are
    to be: the mark is none of them.
    """
    if is_nothing(document):
        if mark is None:
            return ToldMetadata(document=document, said=Digests())
        document = b"{}"
    resource = settings_document(document)
    if not _MEMBERS.issuperset(resource.names()):
        raise RefusedError(refusals.MALFORMED_DOCUMENT)
    if is_coded(resource.value("contentEncoding")):
        raise RefusedError(refusals.CONTENT_CODING)
    said = Digests.of_resource(resource)
    resource.remove(*_NOT_TOLD)
    _put_mark(resource, mark, entries)
    return ToldMetadata(document=resource.render(), said=said)


def _put_mark(resource: JsonObject, mark: str | None, entries: Iterable[str]) -> None:
    metadata = resource.inner("metadata")
    if metadata is not None:
        metadata.remove(MARK)
        if mark is not None:
            metadata.put(MARK, mark)
    elif resource.value("metadata") is not None:
        raise RefusedError(refusals.MALFORMED_DOCUMENT)
    elif mark is not None:
        cleared = dict.fromkeys(entries) if "metadata" in resource else {}
        resource.put("metadata", {**cleared, MARK: mark})


def changes_metadata(document: bytes, *, merges: bool) -> bool:
    """Whether the object's custom metadata is changed, so that our mark could be lost. *merges*: what the
    document does not name stays. RefusedError(MALFORMED_DOCUMENT)."""
    resource = settings_document(document)
    return "metadata" in resource if merges else not _NAMING.issuperset(resource.names())


def is_nothing(document: bytes) -> bool:
    """Go's client sends a pointer to nothing."""
    return document.strip() in (b"", b"null")


def settings_document(document: bytes) -> JsonObject:
    """One JSON object, and nothing else. RefusedError(MALFORMED_DOCUMENT)."""
    try:
        return JsonObject(document)
    except JsonError as error:
        raise RefusedError(refusals.MALFORMED_DOCUMENT) from error


def is_coded(coding: object) -> bool:
    """Whether the service might undo this coding as it serves the object: what it stores is not coded."""
    return coding is not None and str(coding).strip().lower() not in ("", "identity")


def marked_size(mark: str | None) -> int | None:
    """The length that *mark* says; None: it says none."""
    return int(mark) if mark is not None and _SIZE.fullmatch(mark) else None
