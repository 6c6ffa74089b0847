"""What a service's JSON says of objects, as its clients are to see it.

1. `size` is the plaintext's: by arithmetic; where our mark says so (told.py), as it says, or by a look at the
   object; on routes that migrate by a look at every object. What cannot be told stays as it is.
2. `md5Hash` and `crc32c` are of ciphertext: they are taken out, but for those of an upload that we have seen
   whole, in the answer to it.
3. In reverse mode the service's address in `selfLink` and `mediaLink` becomes ours.
4. The mark itself is shown to nobody.
"""

import contextlib
import re
from dataclasses import replace
from typing import Final
from urllib.parse import urlsplit

from envelope.errors import FormatError, IntegrityError, KeyUnavailableError
from envelope.objects import plain_length
from proxy import refusals
from proxy.messages.message import Fields, digest_fields
from proxy.plans.conversing import Conversation, Reply
from proxy.plans.profile_options import StoredPolicy
from proxy.plans.request import Mode, Request
from proxy.profiles.entry_mapping import Question
from proxy.profiles.gcs.digests import OF_RESOURCES, Uploaded
from proxy.profiles.gcs.routes import content_target, operation_of
from proxy.profiles.gcs.selections import Selection
from proxy.profiles.gcs.told import MARK, marked_size
from proxy.profiles.json_rewriting import JsonError, JsonObject
from proxy.refusals import RefusedError

HELD_LIMIT_BYTES: Final = 1024 * 1024 * 1024
"""Of one request whose content waits here, sealed, until it is whole."""
METADATA_LIMIT_BYTES: Final = 256 * 1024
_DIGITS: Final = re.compile(r"[0-9]{1,19}")
_LINKS: Final = ("selfLink", "mediaLink")
_PORTS: Final = {"http": 80, "https": 443}


class Resources:
    """Edits what a service's answers say of objects. *known*: the one that was just uploaded."""

    def __init__(self, talk: Conversation, *, known: Uploaded | None = None) -> None:
        self._talk = talk
        self._known = {} if known is None else known.digests.in_resource()
        self._plain_bytes = None if known is None else known.plain_bytes
        head = talk.request.head
        self._selection = Selection.of(head, operation_of(head.method, head.target, head.fields))

    def __call__(self, resource: JsonObject) -> Question | None:
        """A `json_rewriting.Judge`."""
        for name in OF_RESOURCES:
            if name in resource and name in self._known:
                resource.replace(name, self._known[name])
            else:
                resource.remove(name)
        for name in _LINKS:
            link = resource.text(name)
            if link is not None and (ours := our_url(link, self._talk.request)) is not None:
                resource.replace(name, ours)
        return self._size(resource)

    def _size(self, resource: JsonObject) -> Question | None:
        stored = _number(resource.value("size"))
        bucket, name = resource.text("bucket") or self._selection.bucket, resource.text("name")
        mark = _without_mark(resource)
        may_be_marked = mark is not None or (self._selection.is_partial and "metadata" not in resource)
        if self._selection.adds_metadata:
            resource.remove("metadata")
        policy = self._policy(bucket, name)
        if self._plain_bytes is not None:
            _put_size(resource, "size", self._plain_bytes)
            return None
        if stored is None or policy is StoredPolicy.PASSTHROUGH:
            return None
        if (marked := marked_size(mark)) is not None and marked < stored:
            _put_size(resource, "size", marked)
            return None
        if policy is StoredPolicy.STRICT and not may_be_marked:
            _put_size(resource, "size", plain_or_none(stored))
            return None
        if not bucket or name is None:  # a list of chosen members (`fields`) that does not say whose
            resource.remove("size")
            return None
        target = content_target(bucket, name, resource.text("generation"))

        async def ask() -> None:
            size = plain_or_none(stored) if policy is StoredPolicy.STRICT else None
            with contextlib.suppress(RefusedError, KeyUnavailableError, FormatError, IntegrityError):
                found = await self._talk.inspect(target)
                if found is not None and found.stored_bytes == stored:
                    size = found.plain_bytes
            _put_size(resource, "size", size)

        return ask

    def _policy(self, bucket: str, name: str | None) -> StoredPolicy:
        request = self._talk.request
        target = request.head.target if not bucket or name is None else content_target(bucket, name, None)
        return request.options.policy_for(target.partition("?")[0]) or StoredPolicy(
            request.service.legacy.value
        )


async def edited(document: bytes, talk: Conversation, *, known: Uploaded | None = None) -> bytes:
    """An answer that is one object's metadata. RefusedError(SERVICE_ANSWER)."""
    resource = _answered(document)
    question = Resources(talk, known=known)(resource)
    if question is not None:
        await question()
    return resource.render()


async def edited_rewrite(document: bytes, talk: Conversation) -> bytes:
    """The answer to a rewrite: its resource, and counts of bytes. RefusedError(SERVICE_ANSWER)."""
    answer = _answered(document)
    resource, plain = answer.inner("resource"), None
    if resource is not None:
        question = Resources(talk)(resource)
        if question is not None:
            await question()
        plain = _number(resource.edited("size"))
    stored, done = _number(answer.value("objectSize")), _number(answer.value("totalBytesRewritten"))
    if plain is None and stored is not None:
        plain = plain_or_none(stored)
    _put_size(answer, "objectSize", plain)
    if done is not None and plain is not None:
        # Of what is not whole yet only that it is not more than all.
        _put_size(answer, "totalBytesRewritten", plain if done == stored else min(done, plain))
    return answer.render()


async def object_reply(talk: Conversation, reply: Reply, known: Uploaded | None) -> Reply:
    """The service's answer to an upload: its object, with what is *known* of the content."""
    body = await edited(reply.body, talk, known=known) if reply.body.strip() else reply.body
    pairs = [(name.encode(), value.encode("utf-8", "surrogateescape")) for name, value in reply.fields]
    gone = digest_fields(Fields(pairs))
    return replace(
        reply,
        fields=tuple((name, value) for name, value in reply.fields if name.lower() not in gone),
        body=body,
    )


def _without_mark(resource: JsonObject) -> str | None:
    """Our mark, which is taken out."""
    metadata = resource.inner("metadata")
    if metadata is None or MARK not in metadata:
        return None
    mark = metadata.text(MARK) or ""
    metadata.remove(MARK)
    if not any(True for _ in metadata.names()):
        resource.remove("metadata")
    return mark


def stored_size_in(document: bytes) -> int | None:
    """What the service's answer to an upload says of the stored size; None: nothing."""
    return _number(_answered(document).value("size")) if document.strip() else None


def _answered(document: bytes) -> JsonObject:
    try:
        return JsonObject(document)
    except JsonError as error:
        raise RefusedError(refusals.SERVICE_ANSWER) from error


def _number(value: object) -> int | None:
    """Sizes are strings in this API, and numbers at some who speak it."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    return int(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else None


def _put_size(resource: JsonObject, name: str, size: int | None) -> None:
    if size is not None and name in resource:
        resource.replace(name, str(size) if isinstance(resource.value(name), str) else size)


def plain_or_none(stored_bytes: int) -> int | None:
    try:
        return plain_length(stored_bytes)
    except FormatError:
        return None


# Addresses.


def our_url(reference: str, request: Request) -> str | None:
    """*reference* as the client may use it, in reverse mode; None: it stays, it does not name the service.

    Absolute: clients use these as they are. Whoever ends TLS before us has the same name.
    """
    if request.route.mode is not Mode.REVERSE or not request.head.host:
        return None
    path = path_at_service(reference, request, any_scheme=True)
    return None if path is None else f"https://{request.head.host}{path}"


def path_at_service(reference: str, request: Request, *, any_scheme: bool = False) -> str | None:
    """Path and query of an absolute URL, or of a path, that names this request's service. None: another's."""
    upstream = request.service.upstream
    try:
        url = urlsplit(reference)
        host, port = url.hostname, url.port
    except ValueError:
        return None
    if url.scheme == "" and host is None and reference.startswith("/") and "\\" not in reference:
        return reference
    if "\\" in reference or "@" in url.netloc or host is None or url.scheme not in _PORTS:
        return None
    if host.lower() != upstream.host or (port or _PORTS[url.scheme]) != upstream.port:
        return None
    if not any_scheme and url.scheme != upstream.scheme:
        return None
    path = url.path if url.path.startswith("/") else f"/{url.path}"
    return path + (f"?{url.query}" if url.query else "")
