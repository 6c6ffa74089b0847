"""Lists of objects as clients are to see them: plaintext sizes, mapped ETags, no checksums.

1. The list streams; one entry at a time is looked at (xml_rewriting.py). Nothing but sizes, ETags and
   checksums is touched.
2. An object that was put at once has a size by arithmetic. One in parts, told by its ETag `-N`, has it in its
   manifest: it is read with the client's own rights, a few at a time, and remembered by its ETag.
3. On routes whose policy is to migrate a length alone does not tell whose object it is: each is looked at,
   once. What cannot be told, because the client may not read it, say, stays the size that is stored.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote_plus

from envelope.errors import FormatError
from envelope.objects import plain_length
from proxy.plans.answer_plan import BodyMapper
from proxy.plans.conversing import Conversation
from proxy.plans.profile_options import StoredPolicy
from proxy.profiles.entry_mapping import Question
from proxy.profiles.s3 import etags
from proxy.profiles.s3.addressing import Address
from proxy.profiles.s3.routes import Operation
from proxy.profiles.xml_rewriting import Entry, EntryRule, Leaf, Name, XmlMapper

_MAX_SIZE_DIGITS: Final = 16


def _any(name: str) -> Name:
    return (None, name)


_CHECKSUMS: Final = (_any("ChecksumAlgorithm"), _any("ChecksumType"))
_LEAVES: Final = frozenset({(_any(name),) for name in ("Key", "VersionId", "Size", "ETag")}) | {
    (name,) for name in _CHECKSUMS
}
_ATTRIBUTES: Final = frozenset({(_any(name),) for name in ("ETag", "ObjectSize", "Checksum", "ObjectParts")})
RULES: Final = (
    EntryRule(at=(_any("ListBucketResult"), _any("Contents")), leaves=_LEAVES),
    EntryRule(at=(_any("ListVersionsResult"), _any("Version")), leaves=_LEAVES),
    # One document, one entry. Servers do not agree on its name.
    EntryRule(at=(_any("GetObjectAttributesResponse"),), leaves=_ATTRIBUTES),
    EntryRule(at=(_any("GetObjectAttributesOutput"),), leaves=_ATTRIBUTES),
    EntryRule(at=(_any("GetObjectAttributesResult"),), leaves=_ATTRIBUTES),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The memo of a list on its way."""

    operation: Operation
    bucket: Address
    parameters: Mapping[str, str]

    def target_of(self, key: str, version: str | None) -> str:
        """The object's path and query, as the service is asked for it."""
        name = unquote_plus(key) if self.parameters.get("encoding-type") == "url" else key
        path = quote(name, safe="/-_.~", errors="surrogateescape")
        if not self.bucket.virtual_host:
            path = f"{self.bucket.bucket}/{path}"
        # "null" is the version of what was put without versioning.
        return f"/{path}?versionId={quote(version, safe='')}" if version else f"/{path}"


def mapper(listing: Listing, talk: Conversation) -> BodyMapper:
    return XmlMapper(RULES, _Judge(listing, talk))


class _Judge:
    def __init__(self, listing: Listing, talk: Conversation) -> None:
        self._listing = listing
        self._talk = talk

    def __call__(self, entry: Entry) -> Question | None:
        for name in (*_CHECKSUMS, _any("Checksum"), _any("ObjectParts")):
            for leaf in entry.all(name):
                entry.remove(leaf)
        etag = entry.text(_any("ETag")) or ""
        for leaf in entry.all(_any("ETag")):
            entry.replace(leaf, etags.to_client(leaf.text.strip()))
        leaf_of_size = entry.first(_any("Size")) or entry.first(_any("ObjectSize"))
        return None if leaf_of_size is None else self._size(entry, leaf_of_size, etag)

    def _size(self, entry: Entry, leaf: Leaf, etag: str) -> Question | None:
        text = leaf.text.strip()
        if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_SIZE_DIGITS):
            return None
        stored = int(text)
        target = self._target(entry)
        policy = self._policy(target)
        if stored == 0 or policy is StoredPolicy.PASSTHROUGH:
            return None
        try:
            plain = plain_length(stored)
        except FormatError:
            plain = None
        if not etags.is_of_parts(etag):
            if plain is None:
                return None
            if policy is StoredPolicy.STRICT:
                entry.replace(leaf, str(plain))
                return None

        async def ask() -> None:
            tag = etag if etag.startswith('"') else f'"{etag}"'
            size = await self._talk.composite_bytes(target, etag=tag, stored_bytes=stored)
            if size is not None:
                entry.replace(leaf, str(size))

        return ask

    def _target(self, entry: Entry) -> str:
        key = entry.first(_any("Key"))
        if key is None:
            return self._talk.request.head.target.partition("?")[0]
        # Not stripped: a key may begin or end with white space.
        return self._listing.target_of(key.text, entry.text(_any("VersionId")))

    def _policy(self, target: str) -> StoredPolicy:
        request = self._talk.request
        found = request.options.policy_for(target)
        return found or StoredPolicy(request.service.legacy.value)
