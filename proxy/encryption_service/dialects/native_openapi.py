"""The native API's OpenAPI 3.1 document, made of the very types that its bodies are read with."""

import json
from typing import Any, Final, NamedTuple

import msgspec

from proxy.encryption_service.dialects import native_bodies as bodies

PREFIX: Final = "/sealgate/v1"
WELL_KNOWN_KEYS: Final = "/.well-known/jwks.json"
VERSION: Final = "1.1"

_TEMPLATE: Final = "#/components/schemas/{name}"


class JsonCall(NamedTuple):
    """One operation on a key: what it reads and answers, one by one and in a batch."""

    summary: str
    request: Any
    answer: Any
    batch: Any = None
    batch_answer: Any = None


JSON_CALLS: Final = {
    "encrypt": JsonCall(
        "Encrypt.",
        bodies.EncryptRequest,
        bodies.Encrypted,
        bodies.Batch[bodies.EncryptItem],
        bodies.BatchAnswer[bodies.Encrypted],
    ),
    "decrypt": JsonCall(
        "Decrypt.",
        bodies.DecryptRequest,
        bodies.Decrypted,
        bodies.Batch[bodies.DecryptItem],
        bodies.BatchAnswer[bodies.Decrypted],
    ),
    "reencrypt": JsonCall(
        "Decrypt and encrypt again under the active version; the plaintext stays inside.",
        bodies.ReencryptRequest,
        bodies.Encrypted,
        bodies.Batch[bodies.ReencryptItem],
        bodies.BatchAnswer[bodies.Encrypted],
    ),
    "generate-data-key": JsonCall(
        "Random bytes, and the same encrypted.", bodies.GenerateDataKeyRequest, bodies.DataKey
    ),
    "sign": JsonCall(
        "Sign a message or its digest.",
        bodies.SignRequest,
        bodies.Signed,
        bodies.Batch[bodies.SignItem],
        bodies.BatchAnswer[bodies.Signed],
    ),
    "verify": JsonCall(
        "Verify a signature.",
        bodies.VerifyRequest,
        bodies.Verified,
        bodies.Batch[bodies.VerifyItem],
        bodies.BatchAnswer[bodies.Verified],
    ),
}
TENANT_CALLS: Final = {
    "encrypt": JsonCall(
        "Encrypt to a ciphertext that names its key, or none: it opens in every environment.",
        bodies.TenantEncryptRequest,
        bodies.TenantEncrypted,
    ),
    "decrypt": JsonCall(
        "Decrypt by the key that the ciphertext or the caller names, or by trying all keys.",
        bodies.TenantDecryptRequest,
        bodies.TenantDecrypted,
    ),
    "token": JsonCall("Issue a session token.", bodies.TokenRequest, bodies.Token),
    "token/verify": JsonCall(
        "Verify a session token of any environment.", bodies.TokenVerifyRequest, bodies.TokenVerified
    ),
}
_REFUSALS: Final = {
    "400": "malformed, input-refused",
    "401": "not-authenticated",
    "403": "access-denied; revoked: the enterprise has withdrawn its keys",
    "404": "key-not-found; key-version-unknown: no key of this id",
    "409": "key-not-active, key-deactivated: not now, or not any more; usage-refused",
    "410": "key-version-gone, key-destroyed",
    "413": "too-large",
    "415": "unsupported-media-type",
    "422": "does-not-verify; too-many-keys; token-refused",
    "423": "key-suspended, key-compromised, key-blocked: somebody has forbidden it",
    "429": "quota; Retry-After says when",
    "500": "not-recorded: what cannot be recorded is not answered",
    "503": "stale: the enterprise's key agent is late; env-healing: another environment serves; Retry-After",
}


def make_document() -> dict[str, Any]:
    """The whole document."""
    kinds: list[Any] = [bodies.Problem, bodies.KeyList, bodies.KeyDescription, bodies.Status]
    for call in (*JSON_CALLS.values(), *TENANT_CALLS.values()):
        kinds += [kind for kind in call[1:] if kind is not None and kind not in kinds]
    references, components = msgspec.json.schema_components(kinds, ref_template=_TEMPLATE)
    schema = dict(zip(kinds, references, strict=True))

    paths: dict[str, Any] = {}
    for name, call in JSON_CALLS.items():
        path = f"{PREFIX}/keys/{{key}}/{name}"
        paths[path] = _post(name, call.summary, schema[call.request], schema[call.answer])
        if call.batch is not None:
            paths[f"{path}/batch"] = _post(
                f"{name}-batch",
                f"{call.summary} Up to {bodies.MAX_ITEMS} items; each has a result or an error of its own.",
                schema[call.batch],
                schema[call.batch_answer],
            )
    for name, call in TENANT_CALLS.items():
        operation = _post(
            f"tenant-{name.replace('/', '-')}", call.summary, schema[call.request], schema[call.answer]
        )
        paths[f"{PREFIX}/{name}"] = {"post": operation["post"]}
    paths[WELL_KNOWN_KEYS] = _key_set("key-set", "The public keys of the tenant's signing keys.")
    paths[f"{PREFIX}/jwks/{{tenant}}"] = _key_set(
        "published-key-set", "Those that the tenant lets anybody fetch.", parameters=[_TENANT], security=[]
    )
    paths[f"{PREFIX}/keys/{{key}}/seal"] = _stream("seal", "Seal a body of any length as an SGT-1 object.")
    paths[f"{PREFIX}/keys/{{key}}/open"] = _stream("open", "Open an SGT-1 object of any length.")
    paths[f"{PREFIX}/keys/{{key}}"] = _get(
        "describe-key", "One key.", schema[bodies.KeyDescription], parameters=[_KEY]
    )
    paths[f"{PREFIX}/keys"] = _get("list-keys", "The keys this caller may use.", schema[bodies.KeyList])
    paths[f"{PREFIX}/status"] = _get("status", "How the tenant's keys stand.", schema[bodies.Status])
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sealgate encryption service, native API",
            "version": VERSION,
            "description": "Encrypt, decrypt, sign and verify under keys that the enterprise's HSM controls. "
            "Errors are application/problem+json with a stable `code`. Binary values are base64.",
        },
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def document_bytes() -> bytes:
    return json.dumps(make_document(), ensure_ascii=False, sort_keys=True).encode() + b"\n"


_KEY: Final = {
    "name": "key",
    "in": "path",
    "required": True,
    "description": "name of the key",
    "schema": {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,62}$"},
}
_TENANT: Final = {
    "name": "tenant",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "pattern": "^[a-z0-9][a-z0-9-]{0,62}$"},
}
_KEY_SET: Final = {
    "type": "object",
    "required": ["keys"],
    "properties": {
        "keys": {
            "type": "array",
            "items": {"type": "object", "required": ["kty", "kid", "alg", "use"]},
        }
    },
}
_NAME: Final = {
    "name": "Sealgate-Name",
    "in": "header",
    "required": False,
    "description": "Binds the object to a name, 1 to 512 printable ASCII characters: opening needs the same.",
    "schema": {"type": "string", "pattern": "^[!-~]([ -~]{0,510}[!-~])?$"},
}


def _refusals() -> dict[str, Any]:
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": text, "content": problem} for status, text in _REFUSALS.items()}


def _post(name: str, summary: str, request: Any, answer: Any) -> dict[str, Any]:
    return {
        "parameters": [_KEY],
        "post": {
            "operationId": name,
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
            "responses": {
                "200": {"description": "done", "content": {"application/json": {"schema": answer}}},
                **_refusals(),
            },
        },
    }


def _stream(name: str, summary: str) -> dict[str, Any]:
    media = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {
        "parameters": [_KEY, _NAME],
        "post": {
            "operationId": name,
            "summary": summary,
            "description": "Read the answer while you send; an answer cut before its end is no answer.",
            "requestBody": {"required": True, "content": media},
            "responses": {"200": {"description": "the body's other form", "content": media}, **_refusals()},
        },
    }


def _get(
    name: str, summary: str, answer: Any, *, parameters: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "get": {
            "operationId": name,
            "summary": summary,
            "responses": {
                "200": {"description": "as asked", "content": {"application/json": {"schema": answer}}},
                **_refusals(),
            },
        }
    }
    if parameters:
        operation["parameters"] = parameters
    return operation


def _key_set(
    name: str,
    summary: str,
    *,
    parameters: list[dict[str, Any]] | None = None,
    security: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    operation = _get(name, summary, _KEY_SET, parameters=parameters)
    content = operation["get"]["responses"]["200"]["content"]
    content["application/jwk-set+json"] = content.pop("application/json")
    if security is not None:
        operation["get"]["security"] = security
    return operation
