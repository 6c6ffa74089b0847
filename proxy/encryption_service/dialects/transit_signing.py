"""Sign and verify of the transit API: its parameters as a `SignatureScheme`.

1. As the original does, what a key's algorithm has no use for is ignored (an RSA padding asked of an ECDSA
   key, `prehashed` of Ed25519), while unknown values are refused whatever the key.
2. SHA-1, SHA-224, SHA-3 and `none` are not served: nobody should begin to sign with them.
3. `jws` writes every signature in base64url; of ECDSA it also means fixed-length r and s.
"""

from collections.abc import Callable
from typing import Any, Final

from envelope.keys import SigningAlgorithm
from proxy.encryption_service.call import Answer
from proxy.encryption_service.dialects.bearer import BearerCalls
from proxy.encryption_service.dialects.transit_bodies import (
    BodyError,
    Reader,
    SignBody,
    SignItem,
    VerifyBody,
    VerifyItem,
    decode_base64,
    format_signature,
    parse_signature,
)
from proxy.encryption_service.dialects.transit_call import TransitRequest, admit, success, wanted_version
from proxy.encryption_service.dialects.transit_errors import ITEM_ERRORS, item_text
from proxy.encryption_service.errors import DoesNotVerify
from proxy.encryption_service.model import NamedKey, Op
from proxy.encryption_service.signatures import (
    ANY_SALT,
    HashName,
    Marshaling,
    RsaPadding,
    SignatureScheme,
)

_RSA: Final = frozenset({SigningAlgorithm.RS256, SigningAlgorithm.PS256})
_MARSHALINGS: Final = frozenset({"asn1", "jws"})


class SigningOperations:
    """What a signing key does."""

    def __init__(self, calls: BearerCalls, *, max_items: int) -> None:
        self._calls = calls
        self._core = calls.core
        self._sign_body = Reader(SignBody, max_items=max_items)
        self._verify_body = Reader(VerifyBody, max_items=max_items)

    def sign(self, request: TransitRequest) -> Answer:
        request.name, slash, hash_name = request.name.partition("/")
        body, ignored = self._sign_body.read(request.call.body)
        if body.batch_input is not None:
            self._calls.admit_batch(request.work, len(body.batch_input))
        ticket = admit(self._calls, request, Op.SIGN)
        scheme = chosen_scheme(ticket.key, body, hash_name if slash else "", verifies=False)
        jws = wants_jws(body)
        version = wanted_version(body.key_version, "signing")

        def signed(text: str) -> tuple[int, str]:
            made = self._core.sign(ticket, input_of(text), scheme, version=version)
            request.work.used(made.version, made.key_id)
            return made.version, format_signature(made.version, made.signature, jws=jws)

        if body.batch_input is None:
            number, signature = signed(body.input)
            self._calls.finish(request.work, ticket)
            return success(request, {"key_version": number, "signature": signature}, ignored)
        results = [self._sign_item(request, item, signed) for item in body.batch_input]
        self._calls.finish(request.work, ticket)
        return success(request, {"batch_results": results}, ignored)

    def _sign_item(
        self, request: TransitRequest, item: SignItem, sign: Callable[[str], tuple[int, str]]
    ) -> dict[str, Any]:
        try:
            if item.input is None:
                raise BodyError("missing input")
            version, signature = sign(item.input)
        except ITEM_ERRORS as error:
            return {"key_version": 0, "error": item_text(error, request.work.op), "reference": item.reference}
        return {"signature": signature, "key_version": version, "reference": item.reference}

    def verify(self, request: TransitRequest) -> Answer:
        request.name, slash, hash_name = request.name.partition("/")
        body, ignored = self._verify_body.read(request.call.body)
        items = body.batch_input
        if items is None and not body.signature and not body.hmac:
            request.work.key = request.name
            raise BodyError("neither a 'signature' nor an 'hmac' were given to verify")
        if items is not None:
            _check_signatures(items)
            self._calls.admit_batch(request.work, len(items))
        elif body.hmac:
            raise BodyError("verifying an HMAC is not supported")
        ticket = admit(self._calls, request, Op.VERIFY)
        scheme = chosen_scheme(ticket.key, body, hash_name if slash else "", verifies=True)
        jws = wants_jws(body)

        def verified(text: str, signature: str) -> bool:
            message = input_of(text)
            version, raw = parse_signature(signature, jws=jws)
            try:
                self._core.verify(ticket, version, raw, message, scheme)
            except DoesNotVerify:
                return False
            finally:
                request.work.used(version)
            return True

        if items is None:
            valid = verified(body.input, body.signature)
            self._calls.finish(request.work, ticket)
            return success(request, {"valid": valid}, ignored)
        results = [self._verify_item(request, item, verified) for item in items]
        self._calls.finish(request.work, ticket)
        return success(request, {"batch_results": results}, ignored)

    def _verify_item(
        self, request: TransitRequest, item: VerifyItem, verify: Callable[[str, str], bool]
    ) -> dict[str, Any]:
        try:
            if item.input is None:
                raise BodyError("missing input")
            valid = verify(item.input, item.signature or "")
        except ITEM_ERRORS as error:
            return {"valid": False, "error": item_text(error, request.work.op), "reference": item.reference}
        return {"valid": valid, "reference": item.reference}


def input_of(text: str) -> bytes:
    try:
        return decode_base64(text)
    except BodyError as error:
        raise BodyError(f"unable to decode input as base64: {error.text}") from None


def _check_signatures(items: list[VerifyItem]) -> None:
    if any(item.hmac is not None for item in items):
        raise BodyError("verifying an HMAC is not supported")
    given = sum(1 for item in items if item.signature is not None)
    if given == 0:
        raise BodyError("no batch_input elements have 'signature' or 'hmac'")
    if given != len(items):
        raise BodyError("some elements of batch_input are missing 'signature'")


def wants_jws(body: SignBody | VerifyBody) -> bool:
    return body.marshaling_algorithm == Marshaling.JWS


def chosen_scheme(
    key: NamedKey, body: SignBody | VerifyBody, hash_in_path: str, *, verifies: bool
) -> SignatureScheme:
    """BodyError for a hash, padding, salt or marshaling that is not served."""
    hash_name = _hash(hash_in_path or body.hash_algorithm or body.algorithm or HashName.SHA256)
    if body.marshaling_algorithm not in _MARSHALINGS:
        raise BodyError(f'invalid marshaling type "{body.marshaling_algorithm}"')
    salt_length = _salt(body.salt_length, verifies=verifies)
    if key.algorithm in _RSA:
        padding = _padding(body.signature_algorithm)
        is_pss = padding is RsaPadding.PSS
        return SignatureScheme(
            hash_name=hash_name,
            prehashed=body.prehashed,
            padding=padding,
            salt_length=salt_length if is_pss else None,
        )
    if key.algorithm is SigningAlgorithm.EDDSA:
        return SignatureScheme()
    return SignatureScheme(
        hash_name=hash_name,
        prehashed=body.prehashed,
        marshaling=Marshaling(body.marshaling_algorithm),
    )


def _hash(name: str) -> HashName:
    if name == "none":
        raise BodyError(
            "hash_algorithm=none requires both prehashed=true and signature_algorithm=pkcs1v15, "
            "and is not supported"
        )
    try:
        return HashName(name)
    except ValueError:
        raise BodyError(f'invalid hash algorithm "{name}"') from None


def _padding(name: str) -> RsaPadding:
    try:
        return RsaPadding(name or RsaPadding.PSS)
    except ValueError:
        raise BodyError(f"1 error occurred:\n\t* unsupported rsa signature algorithm {name}\n\n") from None


def _salt(length: str | int, *, verifies: bool) -> int | None:
    """`auto` verifies any salt, and signs with one of the hash's length; so does 0, as in the original."""
    if length == "hash":
        return None
    if length == "auto":
        return ANY_SALT if verifies else None
    try:
        number = int(length)
    except ValueError:
        raise BodyError(f"salt length neither 'auto', 'hash', nor an int: {length}") from None
    if number < 0:
        raise BodyError(f"salt length is invalid: {number}")
    if number == 0:
        return ANY_SALT if verifies else None
    return number
