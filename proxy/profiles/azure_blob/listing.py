"""Lists of blobs as clients are to see them: plaintext sizes, no digests.

1. The list streams; one entry at a time is looked at (xml_rewriting.py). Nothing but sizes, digests and, in
   reverse mode, the addresses of copies is touched.
2. A blob that was put at once has a size by arithmetic: the service keeps an MD5 of it. One in blocks has
   its size in place of the MD5 (block_names.py rule 5). One with neither is looked at, with the client's
   own rights, a few at a time, once per version.
3. On routes whose policy is to migrate a length alone does not tell whose blob it is: each is looked at.
   What cannot be told, because the client may not read it, say, stays the size that is stored; so does that
   of pages and appended blobs, which are never ours.
"""

import contextlib
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

from envelope.errors import FormatError
from envelope.objects import plain_length
from proxy.plans.answer_plan import BodyMapper
from proxy.plans.conversing import Conversation
from proxy.plans.profile_options import StoredPolicy
from proxy.profiles.azure_blob.addressing import Target
from proxy.profiles.azure_blob.block_names import marked_size
from proxy.profiles.azure_blob.copying import source_at_client
from proxy.profiles.azure_blob.routes import is_block_blob, is_of_token
from proxy.profiles.entry_mapping import Question
from proxy.profiles.xml_rewriting import Entry, EntryRule, Leaf, Name, XmlMapper

_MAX_SIZE_DIGITS: Final = 16


def _any(name: str) -> Name:
    return (None, name)


_PROPERTIES: Final = _any("Properties")
_NAME, _SNAPSHOT, _VERSION = (_any("Name"),), (_any("Snapshot"),), (_any("VersionId"),)
_SIZE: Final = (_PROPERTIES, _any("Content-Length"))
_MD5: Final = (_PROPERTIES, _any("Content-MD5"))
_CRC64: Final = (_PROPERTIES, _any("Content-CRC64"))
_ETAG: Final = (_PROPERTIES, _any("Etag"))
_TYPE: Final = (_PROPERTIES, _any("BlobType"))
_SOURCE: Final = (_PROPERTIES, _any("CopySource"))
RULES: Final = (
    EntryRule(
        at=(_any("EnumerationResults"), _any("Blobs"), _any("Blob")),
        leaves=frozenset({_NAME, _SNAPSHOT, _VERSION, _SIZE, _MD5, _CRC64, _ETAG, _TYPE, _SOURCE}),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The memo of a list on its way."""

    target: Target

    def target_of(self, name: str, *, snapshot: str | None, version: str | None) -> str:
        """A listed blob's path and query, as the service is asked for it with the same token."""
        path = f"{self.target.container_path}/{quote(name, safe='/-_.~')}"
        query = [member for member in self.target.members if is_of_token(member.partition("=")[0].lower())]
        for parameter, value in (("snapshot", snapshot), ("versionid", version)):
            if value:
                query.append(f"{parameter}={quote(value, safe='')}")
        return f"{path}?{'&'.join(query)}" if query else path


def mapper(listing: Listing, talk: Conversation) -> BodyMapper:
    return XmlMapper(RULES, _Judge(listing, talk))


class _Judge:
    def __init__(self, listing: Listing, talk: Conversation) -> None:
        self._listing = listing
        self._talk = talk

    def __call__(self, entry: Entry) -> Question | None:
        md5 = entry.text(*_MD5)
        for leaf in (*entry.all(*_MD5), *entry.all(*_CRC64)):
            entry.remove(leaf)
        for leaf in entry.all(*_SOURCE):
            ours = source_at_client(self._talk.request, leaf.text.strip())
            if ours is not None:
                entry.replace(leaf, ours)
        size = entry.first(*_SIZE)
        blob_type = entry.text(*_TYPE)
        if size is None or (blob_type is not None and not is_block_blob(blob_type)):
            return None
        return self._size(entry, size, md5)

    def _size(self, entry: Entry, leaf: Leaf, md5: str | None) -> Question | None:
        text = leaf.text.strip()
        if not (text.isascii() and text.isdecimal() and len(text) <= _MAX_SIZE_DIGITS):
            return None
        stored = int(text)
        target = self._target(entry)
        policy = self._policy(target)
        if stored == 0 or policy is StoredPolicy.PASSTHROUGH:
            return None
        if (marked := marked_size(md5)) is not None and marked < stored:
            entry.replace(leaf, str(marked))
            return None
        if md5 and policy is StoredPolicy.STRICT:
            with contextlib.suppress(FormatError):
                entry.replace(leaf, str(plain_length(stored)))
            return None
        etag = entry.text(*_ETAG) or ""
        tag = etag if etag.startswith('"') else f'"{etag}"'

        async def ask() -> None:
            size = await self._talk.composite_bytes(target, etag=tag, stored_bytes=stored)
            if size is not None:
                entry.replace(leaf, str(size))

        return ask

    def _target(self, entry: Entry) -> str:
        name = entry.first(*_NAME)
        return self._listing.target_of(
            name.text if name is not None else "",  # not stripped: a name may begin or end with white space
            snapshot=entry.text(*_SNAPSHOT),
            version=entry.text(*_VERSION),
        )

    def _policy(self, target: str) -> StoredPolicy:
        request = self._talk.request
        found = request.options.policy_for(target)
        return found or StoredPolicy(request.service.legacy.value)
