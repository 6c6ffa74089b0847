"""Encrypt, decrypt, rewrap, data keys of the transit API."""

import os
from typing import Any, Final

from proxy.encryption_service.call import Answer
from proxy.encryption_service.core import Purpose, Ticket
from proxy.encryption_service.dialects.bearer import BearerCalls, Work
from proxy.encryption_service.dialects.transit_bodies import (
    BodyError,
    CiphertextItem,
    DataKeyBody,
    DecryptBody,
    EncryptBody,
    EncryptItem,
    Reader,
    RewrapBody,
    decode_base64,
    encode_base64,
    format_ciphertext,
    format_message,
    parse_ciphertext,
)
from proxy.encryption_service.dialects.transit_call import (
    SUCCESS,
    TransitRequest,
    admit,
    answer,
    associated_data_of,
    purpose_of,
    success,
    wanted_version,
)
from proxy.encryption_service.dialects.transit_errors import (
    ITEM_ERRORS,
    UNSUPPORTED_PATH,
    VaultError,
    item_text,
)
from proxy.encryption_service.errors import DoesNotVerify, InputRefused, KeyRefused, TooLarge
from proxy.encryption_service.model import Op

type _Outcome = tuple[int, str] | BodyError | DoesNotVerify | KeyRefused | InputRefused | TooLarge
"""Of one item of a batch: key version and ciphertext, or one of ITEM_ERRORS."""

_DATA_KEY_BITS: Final = frozenset({128, 256, 512})


class DataOperations:
    """What a data key does."""

    def __init__(self, calls: BearerCalls, *, max_items: int) -> None:
        self._calls = calls
        self._core = calls.core
        self._encrypt_body = Reader(EncryptBody, max_items=max_items)
        self._decrypt_body = Reader(DecryptBody, max_items=max_items)
        self._rewrap_body = Reader(RewrapBody, max_items=max_items)
        self._data_key_body = Reader(DataKeyBody, max_items=max_items)

    def encrypt(self, request: TransitRequest) -> Answer:
        body, ignored = self._encrypt_body.read(request.call.body)
        if body.batch_input is not None:
            return self._encrypt_batch(request, body, body.batch_input, ignored)
        if body.plaintext is None:
            request.work.key = request.name
            raise BodyError("missing plaintext to encrypt")
        ticket = admit(self._calls, request, Op.ENCRYPT)
        version, text = self._encrypted(ticket, request.work, body.plaintext, body)
        self._calls.finish(request.work, ticket)
        if ignored:
            return success(request, {"ciphertext": text, "key_version": version}, ignored)
        data = b'{"ciphertext":"%b","key_version":%d}' % (text.encode(), version)
        return answer(200, SUCCESS % (request.work.client_request_id.encode(), data, b"null"))

    def _encrypted(
        self, ticket: Ticket, work: Work, plaintext: str, how: EncryptItem | EncryptBody
    ) -> tuple[int, str]:
        sealed = self._core.encrypt(
            ticket,
            decode_base64(plaintext),
            associated_data_of(how.associated_data),
            purpose=purpose_of(how.context),
            version=wanted_version(how.key_version, "encryption"),
        )
        work.used(sealed.version, sealed.key_id)
        return sealed.version, format_ciphertext(sealed.version, sealed.nonce, sealed.ciphertext, sealed.tag)

    def _encrypt_batch(
        self, request: TransitRequest, body: EncryptBody, items: list[EncryptItem], ignored: list[str]
    ) -> Answer:
        _check_contexts(items)
        self._calls.admit_batch(request.work, len(items))
        ticket = admit(self._calls, request, Op.ENCRYPT)
        results: list[dict[str, Any]] = []
        failures = 0
        made = self._made_at_once if _are_alike(items) else self._made_one_by_one
        for item, outcome in zip(items, made(ticket, request.work, items), strict=True):
            if isinstance(outcome, tuple):
                version, text = outcome
                results.append({"ciphertext": text, "key_version": version, "reference": item.reference})
            else:
                failures += 1
                results.append({"error": item_text(outcome, request.work.op), "reference": item.reference})
        self._calls.finish(request.work, ticket)
        status = batch_status(request, body.partial_failure_response_code, failures, len(items))
        return success(request, {"batch_results": results}, ignored, status=status)

    def _made_one_by_one(self, ticket: Ticket, work: Work, items: list[EncryptItem]) -> list[_Outcome]:
        made: list[_Outcome] = []
        for item in items:
            try:
                made.append(self._encrypted(ticket, work, item.plaintext, item))
            except ITEM_ERRORS as error:
                made.append(error)
        return made

    def _made_at_once(self, ticket: Ticket, work: Work, items: list[EncryptItem]) -> list[_Outcome]:
        """The same for items of one context and version, for a third of the time."""
        made: list[_Outcome | None] = []
        messages = []
        for item in items:
            try:
                messages.append((decode_base64(item.plaintext), associated_data_of(item.associated_data)))
                made.append(None)
            except ITEM_ERRORS as error:
                made.append(error)
        first = items[0]
        try:
            sealed = self._core.encrypt_all(
                ticket,
                messages,
                purpose=purpose_of(first.context),
                version=wanted_version(first.key_version, "encryption"),
            )
        except ITEM_ERRORS as error:  # then it is every item's
            return [outcome or error for outcome in made]
        work.used(sealed.version, sealed.key_id)
        version = sealed.version
        texts = (format_message(version, message) for message in sealed.messages)
        return [(version, next(texts)) if outcome is None else outcome for outcome in made]

    def decrypt(self, request: TransitRequest) -> Answer:
        body, ignored = self._decrypt_body.read(request.call.body)
        if body.batch_input is not None:
            return self._decrypt_batch(request, body, body.batch_input, ignored)
        if not body.ciphertext:
            request.work.key = request.name
            raise BodyError("missing ciphertext to decrypt")
        ticket = admit(self._calls, request, Op.DECRYPT)
        plaintext = self._decrypted(
            ticket, request.work, body.ciphertext, body.associated_data, purpose_of(body.context)
        )
        self._calls.finish(request.work, ticket)
        return success(request, {"plaintext": encode_base64(plaintext)}, ignored)

    def _decrypted(self, ticket: Ticket, work: Work, ciphertext: str, data: str, purpose: Purpose) -> bytes:
        parsed = parse_ciphertext(ciphertext)
        plaintext = self._core.decrypt(
            ticket,
            version=parsed.version,
            nonce=parsed.nonce,
            ciphertext=parsed.ciphertext,
            tag=parsed.tag,
            aad=associated_data_of(data),
            purpose=purpose,
        )
        work.used(parsed.version)
        return plaintext

    def _decrypt_batch(
        self, request: TransitRequest, body: DecryptBody, items: list[CiphertextItem], ignored: list[str]
    ) -> Answer:
        _check_contexts(items)
        self._calls.admit_batch(request.work, len(items))
        ticket = admit(self._calls, request, Op.DECRYPT)
        results: list[dict[str, Any]] = []
        failures = 0
        for item in items:
            try:
                plaintext = self._decrypted(
                    ticket, request.work, item.ciphertext, item.associated_data, purpose_of(item.context)
                )
                results.append({"plaintext": encode_base64(plaintext), "reference": item.reference})
            except ITEM_ERRORS as error:
                failures += 1
                text = item_text(error, request.work.op)
                results.append({"plaintext": "", "error": text, "reference": item.reference})
        self._calls.finish(request.work, ticket)
        status = batch_status(request, body.partial_failure_response_code, failures, len(items))
        return success(request, {"batch_results": results}, ignored, status=status)

    def rewrap(self, request: TransitRequest) -> Answer:
        body, ignored = self._rewrap_body.read(request.call.body)
        items = body.batch_input
        if items is None:
            single = CiphertextItem(
                ciphertext=body.ciphertext,
                context=body.context,
                associated_data=body.associated_data,
                key_version=body.key_version,
            )
            if not single.ciphertext:
                request.work.key = request.name
                raise BodyError("missing ciphertext to decrypt")
            ticket = admit(self._calls, request, Op.REWRAP)
            version, text = self._rewrapped(ticket, request.work, single)
            self._calls.finish(request.work, ticket)
            return success(request, {"ciphertext": text, "key_version": version}, ignored)
        _check_contexts(items)
        self._calls.admit_batch(request.work, len(items))
        ticket = admit(self._calls, request, Op.REWRAP)
        results: list[dict[str, Any]] = []
        for item in items:
            try:
                version, text = self._rewrapped(ticket, request.work, item)
                results.append({"ciphertext": text, "key_version": version, "reference": item.reference})
            except ITEM_ERRORS as error:
                results.append({"error": item_text(error, request.work.op), "reference": item.reference})
        self._calls.finish(request.work, ticket)
        return success(request, {"batch_results": results}, ignored)

    def _rewrapped(self, ticket: Ticket, work: Work, item: CiphertextItem) -> tuple[int, str]:
        purpose = purpose_of(item.context)
        plaintext = self._decrypted(ticket, work, item.ciphertext, item.associated_data, purpose)
        wanted = wanted_version(item.key_version, "encryption")
        aad = associated_data_of(item.associated_data)
        try:
            sealed = self._core.encrypt(ticket, plaintext, aad, purpose=purpose, version=wanted)
        except KeyRefused as error:  # in the words of the half that failed
            raise BodyError(item_text(error, Op.ENCRYPT)) from None
        work.used(sealed.version, sealed.key_id)
        return sealed.version, format_ciphertext(sealed.version, sealed.nonce, sealed.ciphertext, sealed.tag)

    def data_key(self, request: TransitRequest) -> Answer:
        kind, _slash, request.name = request.name.partition("/")
        if not request.name:
            raise VaultError(404, UNSUPPORTED_PATH)
        if kind not in {"plaintext", "wrapped"}:
            raise BodyError("Invalid path, must be 'plaintext' or 'wrapped'")
        body, ignored = self._data_key_body.read(request.call.body)
        purpose = purpose_of(body.context, "failed to base64-decode context")
        aad = associated_data_of(body.associated_data)
        version = wanted_version(body.key_version, "encryption")
        ticket = admit(self._calls, request, Op.GENERATE)
        if body.bits not in _DATA_KEY_BITS:
            raise BodyError("invalid bit length")
        data_key = os.urandom(body.bits // 8)
        sealed = self._core.encrypt(ticket, data_key, aad, purpose=purpose, version=version)
        request.work.used(sealed.version, sealed.key_id)
        self._calls.finish(request.work, ticket)
        text = format_ciphertext(sealed.version, sealed.nonce, sealed.ciphertext, sealed.tag)
        data: dict[str, Any] = {"ciphertext": text, "key_version": sealed.version}
        if kind == "plaintext":
            data["plaintext"] = encode_base64(data_key)
        return success(request, data, ignored)


def _are_alike(items: list[EncryptItem]) -> bool:
    first = items[0]
    return all(item.context == first.context and item.key_version == first.key_version for item in items)


def _check_contexts(items: list[EncryptItem] | list[CiphertextItem]) -> None:
    with_context = sum(1 for item in items if item.context)
    if with_context not in {0, len(items)}:
        raise BodyError("context should be set either in all the request blocks or in none")


def batch_status(request: TransitRequest, asked: int, failures: int, items: int) -> int:
    """Of encrypt and decrypt. A status without a body would hide what did succeed, so it is not taken."""
    if asked and not (200 <= asked <= 599 and asked not in {204, 205, 304}):
        request.warnings.append(
            "invalid HTTP response code override from partial_failure_response_code, reverting to 400"
        )
        asked = 0
    if not failures:
        return 200
    return asked if asked and failures < items else 400
