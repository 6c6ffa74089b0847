"""The same requests to us and to a real OpenBao: status, shape and text are the same, or it is declared.

What each side makes at random (request ids, ciphertexts, signatures, data keys, times) is compared by shape.
"""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from envelope.keys import KeyState, SigningAlgorithm
from proxy.encryption_service.call import Answer, Call
from proxy.encryption_service.dialects.transit import TransitDialect
from proxy.encryption_service.model import DialectName
from tests.proxy.encryption_service import bao
from tests.proxy.encryption_service.service_rig import PEER, ServiceRig

HELLO = base64.b64encode(b"hello").decode()
DIGEST = base64.b64encode(bytes(range(32))).decode()
FAULT_OF_CLIENT = "the client's mistake: 5xx would be retried"
STRICT = "a string is not made of another type, `null` is absent"


@dataclass(frozen=True)
class Case:
    method: str
    path: str
    body: str | None = None
    status: int | None = None
    """Ours, where it differs from the original's; None: the same."""
    text: str | None = None
    """Ours: a part of the body, where it differs; None: the same body."""
    why: str = ""
    token: str | None = "good"
    headers: tuple[tuple[str, str], ...] = ()


def differs(case: Case, why: str, status: int | None = None, text: str | None = None) -> Case:
    return Case(case.method, case.path, case.body, status, text, why, case.token, case.headers)


def post(path: str, body: str | None = None, **more: Any) -> Case:
    return Case("POST", f"/v1/transit/{path}", body, **more)


def encrypt(body: str | None, **more: Any) -> Case:
    return post("encrypt/orders", body, **more)


def decrypt(body: str, **more: Any) -> Case:
    return post("decrypt/orders", body, **more)


# `CT` is replaced by a ciphertext of "hello", `EC`, `RSA`, `ED` by a signature of it: each side's own.
CASES = [
    # Encrypt: single.
    encrypt(f'{{"plaintext":"{HELLO}"}}'),
    Case("PUT", "/v1/transit/encrypt/orders", f'{{"plaintext":"{HELLO}"}}'),
    encrypt('{"plaintext":""}'),
    encrypt(None),
    encrypt("{}"),
    encrypt("null"),
    encrypt('{"PLAINTEXT":"aGk="}'),
    encrypt('{"plaintext":"!!"}'),
    encrypt('{"plaintext":"aGk"}'),
    encrypt('{"plaintext":"aGl-"}'),
    encrypt('{"plaintext":"aG\\nk="}'),
    encrypt('{"plaintext":"aGk=\\r\\n"}'),
    encrypt('{"plaintext":"aGk=="}'),
    encrypt('{"plaintext":"a=GkA"}'),
    encrypt('{"plaintext":"aGVsbG8"}'),
    encrypt('{"plaintext":"aGVsb"}'),
    encrypt('{"plaintext":"aGVsbG8=aGVs"}'),
    encrypt('{"plaintext":"aGl="}'),
    encrypt('{"plaintext":"é"}'),
    encrypt('{"plaintext":["a"]}'),
    encrypt('{"plaintext":{"a":1}}'),
    encrypt('{"plaintext":"aGk=","key_version":1}'),
    encrypt('{"plaintext":"aGk=","key_version":"1"}'),
    encrypt('{"plaintext":"aGk=","key_version":null}'),
    encrypt('{"plaintext":"aGk=","key_version":""}'),
    encrypt('{"plaintext":"aGk=","key_version":2}'),
    encrypt('{"plaintext":"aGk=","key_version":-1}'),
    encrypt('{"plaintext":"aGk=","key_version":"x"}'),
    encrypt('{"plaintext":"aGk=","key_version":1.5}'),
    encrypt('{"plaintext":"aGk=","context":"aGk="}'),
    encrypt('{"plaintext":"aGk=","context":"!"}'),
    encrypt('{"plaintext":"aGk=","associated_data":"aGk="}'),
    encrypt('{"plaintext":"aGk=","nonce":"aGk=","b":2,"a":null}'),
    encrypt('{"plaintext":"aGk=","type":"aes256-gcm96","convergent_encryption":"false"}'),
    encrypt('{"plaintext":"aGk=","plaintext":"aGx="}'),
    encrypt('{"plaintext":"aGk="} '),
    encrypt('{"plaintext":"aGk="}', headers=(("Content-Type", "text/plain"),)),
    encrypt('{"plaintext":"aGk="}', token=None, headers=(("Authorization", "Bearer good"),)),
    encrypt('{"plaintext":"aGk="}', token=None, headers=(("Authorization", "Basic good"),)),
    encrypt('{"plaintext":"aGk="}', token=None),
    encrypt('{"plaintext":"aGk="}', token="wrong"),
    encrypt('{"plaintext":"aGk="}', headers=(("X-Vault-Namespace", "nowhere"),)),
    encrypt('{"plaintext":"aGk="}', headers=(("X-Vault-Request", "true"),)),
    encrypt("{"),
    encrypt("[]"),
    encrypt('"x"'),
    encrypt('{"plaintext":NaN}'),
    encrypt('{"plaintext":"aGk="}x'),
    differs(encrypt('{"plaintext":"\\ud800"}'), "a lone surrogate is no text", 400, "failed to decode JSON"),
    differs(encrypt('{"plaintext":null}'), STRICT, 400, "missing plaintext to encrypt"),
    differs(encrypt('{"plaintext":1234}'), STRICT, 400, "unconvertible type 'json.Number'"),
    differs(encrypt('{"plaintext":true}'), STRICT, 400, "unconvertible type 'bool'"),
    differs(encrypt('{"plaintext":"aGk=","key_version":true}'), STRICT, 400, "unconvertible type 'bool'"),
    differs(
        encrypt('{"plaintext":"aGk=","key_version":99999999999999999999}'),
        "no version is so high",
        400,
        "higher than the latest key version",
    ),
    differs(
        encrypt('{"plaintext":"aGk=","associated_data":"!"}'),
        FAULT_OF_CLIENT,
        400,
        "unable to get associated_data/additional_data from factory[0]: illegal base64 data at input byte 0",
    ),
    differs(
        encrypt('{"plaintext":"aGk="}', headers=(("X-Vault-Wrap-TTL", "60"),)),
        "no wrapped answers",
        400,
        "response wrapping is not supported",
    ),
    # Encrypt: batch.
    encrypt('{"batch_input":[{"plaintext":"aGk="}]}'),
    encrypt('{"plaintext":"aGk=","batch_input":[{"plaintext":"aGk=","reference":"r"}]}'),
    encrypt('{"batch_input":[]}'),
    encrypt('{"batch_input":null}'),
    encrypt('{"batch_input":[{"plaintext":"aGk="},{"plaintext":"!"}]}'),
    encrypt('{"batch_input":[{"plaintext":"aGk="},{"plaintext":"!","reference":"<é\\u2028>"}]}'),
    encrypt('{"batch_input":[{"plaintext":"aGk="},{"plaintext":"!"}],"partial_failure_response_code":207}'),
    encrypt('{"batch_input":[{"plaintext":"aGk="},{"plaintext":"!"}],"partial_failure_response_code":"200"}'),
    encrypt('{"batch_input":[{"plaintext":"aGk="},{"plaintext":"!"}],"partial_failure_response_code":1000}'),
    encrypt('{"batch_input":[{"plaintext":"aGk="},{"plaintext":"!"}],"partial_failure_response_code":-200}'),
    encrypt('{"batch_input":[{"plaintext":"aGk="}],"partial_failure_response_code":"x"}'),
    encrypt('{"batch_input":[{"plaintext":"!"}],"partial_failure_response_code":207}'),
    encrypt('{"batch_input":[{"plaintext":"aGk=","unknown":1}]}'),
    encrypt('{"batch_input":[{"plaintext":"aGk=","key_version":7},{"plaintext":"aGk=","key_version":-1}]}'),
    encrypt('{"batch_input":[{"plaintext":"aGk=","context":"aGk="},{"plaintext":"aGk="}]}'),
    encrypt('{"batch_input":[{"plaintext":"aGk=","context":"aGk="},{"plaintext":"aGk=","context":"!"}]}'),
    *[
        differs(encrypt(f'{{"batch_input":{items}}}'), FAULT_OF_CLIENT, 400)
        for items in (
            "5",
            '"x"',
            "[1]",
            "[null]",
            "[{}]",
            '{"plaintext":"aGk="}',
            '[{"plaintext":null}]',
            '[{"plaintext":"aGk="},{"plaintext":5}]',
            '[{"plaintext":"aGk=","reference":5}]',
            '[{"plaintext":"aGk=","key_version":"1"}]',
            '[{"plaintext":"aGk=","associated_data":5}]',
            '[{"plaintext":"aGk=","associated_data":"!"}]',
        )
    ],
    differs(
        encrypt(
            '{"batch_input":[{"plaintext":"aGk="},{"plaintext":"!"}],"partial_failure_response_code":204}'
        ),
        "a status without a body would lose the results",
        400,
        "invalid HTTP response code override",
    ),
    # Decrypt.
    decrypt('{"ciphertext":"CT"}'),
    decrypt('{"ciphertext":"CT","key_version":5}'),
    decrypt('{"ciphertext":"CT","associated_data":"aGk="}'),
    decrypt("{}"),
    decrypt('{"ciphertext":""}'),
    decrypt('{"ciphertext":null}'),
    decrypt('{"ciphertext":"x"}'),
    decrypt('{"ciphertext":"vault:v1"}'),
    decrypt('{"ciphertext":"vault:v1:"}'),
    decrypt('{"ciphertext":"vault:vx:aaaa"}'),
    decrypt('{"ciphertext":"vault:v2:AQ' + "A" * 78 + '"}'),
    decrypt(
        '{"ciphertext":"vault:v-1:aaaa"}', text="version number could not be decoded", why="one spelling"
    ),
    decrypt(
        '{"ciphertext":"vault:v0:aaaa"}', text="disallowed by policy (too old)", why="v0 is no alias of v1"
    ),
    decrypt(
        '{"ciphertext":"vault:v01:aaaa"}', text="version number could not be decoded", why="one spelling"
    ),
    decrypt(
        '{"ciphertext":"vault:v+1:aaaa"}', text="version number could not be decoded", why="one spelling"
    ),
    decrypt('{"ciphertext":"vault:v99999999999999999999:aaaa"}'),
    decrypt('{"ciphertext":"vault:v1:!"}'),
    decrypt('{"ciphertext":"vault:v1:a:b"}'),
    decrypt('{"ciphertext":"vault:v1:aaaa"}'),
    decrypt('{"ciphertext":"vault:1:aaaa"}'),
    decrypt('{"ciphertext":"vault:v1:' + "A" * 80 + '"}'),
    decrypt('{"batch_input":[]}'),
    decrypt('{"batch_input":[{"ciphertext":"CT","reference":"a"},{"ciphertext":"x"},{"ciphertext":""}]}'),
    decrypt('{"batch_input":[{"ciphertext":"CT"},{"ciphertext":"x"}],"partial_failure_response_code":202}'),
    decrypt('{"batch_input":[{"ciphertext":"x"}]}'),
    decrypt(
        '{"batch_input":[{}]}',
        status=400,
        text="missing ciphertext to decrypt",
        why=f"{FAULT_OF_CLIENT}; the item's own error, as in rewrap",
    ),
    differs(decrypt('{"ciphertext":5}'), STRICT, 400, "unconvertible type 'json.Number'"),
    post("decrypt/unknown", '{"ciphertext":"CT"}'),
    post("decrypt/unknown", '{"batch_input":[{"ciphertext":"CT"}]}'),
    post("decrypt/ec", '{"ciphertext":"CT"}'),
    post("encrypt/ec", '{"plaintext":"aGk="}'),
    # Rewrap.
    post("rewrap/orders", '{"ciphertext":"CT"}'),
    post("rewrap/orders", '{"ciphertext":"CT","key_version":1}'),
    post("rewrap/orders", '{"ciphertext":"CT","key_version":9}'),
    post("rewrap/orders", "{}"),
    post("rewrap/orders", '{"ciphertext":"x"}'),
    post("rewrap/orders", '{"batch_input":[{"ciphertext":"CT","reference":"q"},{"ciphertext":"x"},{}]}'),
    post("rewrap/orders", '{"batch_input":[{"ciphertext":"CT","context":"aGk="},{"ciphertext":"CT"}]}'),
    post("rewrap/orders", '{"batch_input":[]}'),
    post("rewrap/unknown", '{"ciphertext":"CT"}'),
    post("rewrap/ec", '{"ciphertext":"CT"}'),
    # Data keys.
    post("datakey/plaintext/orders", "{}"),
    post("datakey/plaintext/orders"),
    post("datakey/wrapped/orders", '{"bits":128}'),
    post("datakey/plaintext/orders", '{"bits":512,"context":"aGk=","associated_data":"aGk="}'),
    post("datakey/plaintext/orders", '{"bits":1}'),
    post("datakey/plaintext/orders", '{"bits":0}'),
    post("datakey/plaintext/orders", '{"bits":"256"}'),
    post("datakey/plaintext/orders", '{"key_version":7}'),
    post("datakey/plaintext/orders", '{"context":"!"}'),
    post("datakey/other/orders", "{}"),
    post("datakey/plaintext/ec", "{}"),
    post("datakey/wrapped", "{}"),
    differs(post("datakey/wrapped/orders", '{"bits":null}'), STRICT, 200, '"ciphertext"'),
    differs(
        post("datakey/wrapped/orders", '{"bits":"x"}'), "one text for all fields", 400, "cannot parse value"
    ),
    # Signatures.
    *[post(f"sign/{key}", f'{{"input":"{HELLO}"}}') for key in ("ec", "rsa", "ed", "orders", "unknown")],
    post("sign/ec", "{}"),
    post("sign/ec", '{"input":"!"}'),
    post("sign/ec", f'{{"input":"{DIGEST}","prehashed":"true"}}'),
    post("sign/ec/sha2-384", f'{{"input":"{HELLO}"}}'),
    post("sign/ec", f'{{"input":"{HELLO}","hash_algorithm":"sha2-512","marshaling_algorithm":"jws"}}'),
    post("sign/ec", '{"input":"aGk=","hash_algorithm":"md4"}'),
    post("sign/ec/md4", '{"input":"aGk="}'),
    post("sign/ec", '{"input":"aGk=","marshaling_algorithm":"der"}'),
    post("sign/ec", '{"input":"aGk=","signature_algorithm":"pkcs1v15","salt_length":"7"}'),
    post("sign/ed", f'{{"input":"{HELLO}","prehashed":true}}'),
    post("sign/ed", f'{{"input":"{HELLO}","marshaling_algorithm":"jws"}}'),
    *[
        post("sign/rsa", f'{{"input":"{HELLO}",{how}}}')
        for how in (
            '"signature_algorithm":"pkcs1v15"',
            '"signature_algorithm":"pss","salt_length":"hash"',
            '"salt_length":"auto"',
            '"salt_length":20',
            '"salt_length":"20"',
            '"salt_length":"foo"',
            '"salt_length":"-5"',
            '"marshaling_algorithm":"jws"',
        )
    ],
    post("sign/ec", '{"batch_input":[{"input":"aGk=","reference":"x"},{"input":"!"},{}]}'),
    post("sign/ec", '{"batch_input":[{"input":"aGk="}],"key_version":9}'),
    post("sign/ec", '{"batch_input":[]}'),
    post("sign/orders", '{"batch_input":[{"input":"aGk="}]}'),
    differs(post("sign/ec", '{"input":5}'), STRICT, 400, "unconvertible type 'json.Number'"),
    differs(
        post("sign/ec", '{"input":"aGk=","prehashed":true}'), "a digest of another length", 400, "digest"
    ),
    differs(post("sign/ec/sha1", '{"input":"aGk="}'), "not any more", 400, "invalid hash algorithm"),
    differs(
        post("sign/ec/none", '{"input":"aGk="}'), "not supported", 400, "hash_algorithm=none requires both"
    ),
    differs(
        post("sign/ec", '{"input":"aGk=","key_version":4}'),
        FAULT_OF_CLIENT,
        400,
        "requested version for signing is higher than the latest key version",
    ),
    differs(
        post("sign/ec", '{"input":"aGk=","key_version":-1}'),
        FAULT_OF_CLIENT,
        400,
        "requested version for signing is negative",
    ),
    differs(post("sign/rsa", '{"input":"aGk=","salt_length":500}'), FAULT_OF_CLIENT, 400, "salt"),
    differs(
        post("sign/rsa", '{"input":"aGk=","signature_algorithm":"foo"}'),
        FAULT_OF_CLIENT,
        400,
        "unsupported rsa signature algorithm foo",
    ),
    differs(post("sign/rsa", '{"input":"aGk=","prehashed":true}'), FAULT_OF_CLIENT, 400, "digest"),
    *[
        case
        for key, made in (("ec", "EC"), ("rsa", "RSA"), ("ed", "ED"))
        for case in (
            post(f"verify/{key}", f'{{"input":"{HELLO}","signature":"{made}"}}'),
            post(f"verify/{key}", f'{{"input":"aGk=","signature":"{made}"}}'),
            post(f"verify/{key}", f'{{"signature":"{made}"}}'),
            post(f"verify/{key}", f'{{"input":"{HELLO}"}}'),
            post(f"verify/{key}", f'{{"input":"!","signature":"{made}"}}'),
            post(f"verify/{key}", f'{{"input":"{HELLO}","signature":"x"}}'),
            post(f"verify/{key}", f'{{"input":"{HELLO}","signature":"vault:v1"}}'),
            post(f"verify/{key}", f'{{"input":"{HELLO}","signature":"vault:v1:!"}}'),
            post(f"verify/{key}", f'{{"input":"{HELLO}","signature":"vault:vx:aaaa"}}'),
            post(f"verify/{key}", f'{{"input":"{HELLO}","signature":"vault:v0:aaaa"}}'),
            post(f"verify/{key}", f'{{"input":"{HELLO}","signature":"vault:v9:aaaa"}}'),
            post(f"verify/{key}", f'{{"input":"{HELLO}","signature":"{made}","hash_algorithm":"sha2-512"}}'),
            post(
                f"verify/{key}",
                f'{{"batch_input":[{{"input":"{HELLO}","signature":"{made}","reference":"r"}},'
                f'{{"input":"aGk=","signature":"{made}"}},{{"input":"aGk=","signature":"x"}},'
                f'{{"input":"!","signature":"{made}"}}]}}',
            ),
            post(
                f"verify/{key}",
                f'{{"batch_input":[{{"input":"aGk=","signature":"{made}"}},{{"input":"aGk="}}]}}',
            ),
            post(f"verify/{key}", '{"batch_input":[{"input":"aGk="}]}'),
        )
    ],
    post("verify/rsa", f'{{"input":"{HELLO}","signature":"vault:v1:aaaa"}}'),
    post("verify/orders", '{"input":"aGk=","signature":"vault:v1:aaaa"}'),
    post("verify/unknown", '{"input":"aGk=","signature":"vault:v1:aaaa"}'),
    post("verify/ec/md4", '{"input":"aGk=","signature":"vault:v1:aaaa"}'),
    post("verify/ec", '{"input":"aGk=","signature":"vault:v1:aaaa","marshaling_algorithm":"x"}'),
    differs(
        post("verify/ec", '{"input":"aGk=","signature":"vault:v1:aaaa"}'),
        "no DER: just not the signature",
        200,
        '"valid":false',
    ),
    differs(
        post("verify/ec", f'{{"input":"{HELLO}","signature":"EC","prehashed":true}}'),
        "a digest of another length",
        400,
        "digest",
    ),
    differs(
        post("verify/ec", '{"input":"aGk=","hmac":"vault:v1:aaaa"}'), "no HMACs", 400, "HMAC is not supported"
    ),
    # Keys.
    Case("LIST", "/v1/transit/keys"),
    Case("LIST", "/v1/transit/keys/"),
    Case("GET", "/v1/transit/keys?list=true"),
    Case("GET", "/v1/transit/keys?list=1"),
    Case("GET", "/v1/transit/keys/?list=true"),
    Case("GET", "/v1/transit/keys?list=yes"),
    Case("LIST", "/v1/transit/keys?after=ec&limit=1"),
    Case("GET", "/v1/transit/keys"),
    Case("GET", "/v1/transit/keys/orders"),
    Case("GET", "/v1/transit/keys/ec"),
    differs(Case("GET", "/v1/transit/keys/rsa"), "RSA signs only", 200, '"supports_encryption":false'),
    differs(
        Case("GET", "/v1/transit/keys/ed"), "signing keys derive nothing", 200, '"supports_derivation":false'
    ),
    Case("GET", "/v1/transit/keys/unknown"),
    Case("LIST", "/v1/transit/keys/orders"),
    Case("GET", "/v1/transit/keys/orders?list=true"),
    Case("GET", "/v1/transit/keys/orders/"),
    # Paths and methods.
    Case("GET", "/v1/transit/encrypt/orders"),
    Case("DELETE", "/v1/transit/encrypt/orders"),
    post("encrypt/orders/more", '{"plaintext":"aGk="}'),
    post("encrypt/", '{"plaintext":"aGk="}'),
    post("encrypt", '{"plaintext":"aGk="}'),
    post("nosuch/orders", "{}"),
    post("encrypt/%6frders", '{"plaintext":"aGk="}'),
    post("encrypt/a%2Fb", '{"plaintext":"aGk="}'),
    post("encrypt/x%20y", '{"plaintext":"aGk="}'),
    post("encrypt/-x", '{"plaintext":"aGk="}'),
    Case("POST", "/v1/nomount/encrypt/orders", '{"plaintext":"aGk="}'),
    Case("FOO", "/v1/transit/keys/orders"),
    differs(
        Case("PATCH", "/v1/transit/encrypt/orders", "{}"), "no PATCH at all", 405, "unsupported operation"
    ),
    # Health and token.
    *[
        Case("GET", f"/v1/sys/health{query}", token=None)
        for query in (
            "",
            "?standbyok=true",
            "?activecode=299",
            "?sealedcode=299&standbycode=299",
            "?activecode=x",
        )
    ],
    Case("POST", "/v1/sys/health", "{}", token=None),
    Case("GET", "/v1/auth/token/lookup-self"),
    Case("POST", "/v1/auth/token/lookup-self", "{}"),
    Case("GET", "/v1/auth/token/lookup-self", token="wrong"),
    Case("GET", "/v1/auth/token/lookup-self", token=None),
    Case("POST", "/v1/auth/token/renew-self", "{}"),
    Case("PUT", "/v1/auth/token/renew-self", '{"increment":0}'),
    Case("POST", "/v1/auth/token/renew-self", "{}", token="wrong"),
    # What changes the original's keys comes last.
    differs(
        post("encrypt/made-there", '{"plaintext":"aGk="}'),
        "encrypting makes no key",
        400,
        "encryption key not found",
    ),
    post("datakey/wrapped/unknown", "{}"),
    *[
        differs(case, "the enterprise's key agent alone", 403, "key agent alone")
        for case in (
            post("keys/orders/rotate", "{}"),
            post("keys/another", "{}"),
            post("keys/orders/config", "{}"),
            Case("DELETE", "/v1/transit/keys/another"),
        )
    ],
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with bao.dev_server(tmp_path_factory.mktemp("bao")) as base_url:
        for name, kind in (
            ("orders", "aes256-gcm96"),
            ("ec", "ecdsa-p256"),
            ("rsa", "rsa-2048"),
            ("ed", "ed25519"),
        ):
            body = json.dumps({"type": kind}).encode()
            made = bao.ask(base_url, "POST", f"/v1/transit/keys/{name}", body, token=bao.DEV_TOKEN)
            assert made.status == 200
        yield base_url


@pytest.fixture
def ours(tmp_path: Path) -> Iterator[tuple[TransitDialect, str]]:
    rig = ServiceRig(tmp_path)
    rig.add_dialect(DialectName.TRANSIT)
    for name, algorithm in (
        ("orders", None),
        ("ec", SigningAlgorithm.ES256),
        ("rsa", SigningAlgorithm.PS256),
        ("ed", SigningAlgorithm.EDDSA),
    ):
        rig.push(rig.add_key(name, algorithm=algorithm), KeyState.ACTIVE)
    dialect = TransitDialect(
        core=rig.core,
        access=rig.access,
        limiter=rig.limiter,
        directory=lambda: rig.directory,
        clock=rig.clock,
    )
    yield dialect, rig.add_bearer(DialectName.TRANSIT)
    rig.close()


def _call(dialect: TransitDialect, token: str, case: Case, body: str | None) -> bao.Reply:
    path, _, query = case.path.partition("?")
    headers = [("host", "service"), ("content-type", "application/json")]
    if case.token is not None:
        headers.append(("x-vault-token", token if case.token == "good" else case.token))
    headers += [(name.lower(), value.replace("good", token)) for name, value in case.headers]
    answer = dialect.handle(
        Call(
            method=case.method,
            path=path,
            query=query,
            headers=tuple(headers),
            body=(body or "").encode("utf-8", "surrogatepass"),
            peer=PEER,
        )
    )
    assert isinstance(answer, Answer)
    return bao.Reply(answer.status, answer.body)


def _ask(base_url: str, case: Case, body: str | None) -> bao.Reply:
    return bao.ask(
        base_url,
        case.method,
        case.path,
        body.encode() if body is not None else None,
        token=bao.DEV_TOKEN if case.token == "good" else case.token,
        headers={name: value.replace("good", bao.DEV_TOKEN) for name, value in case.headers},
    )


_RANDOM = {
    "request_id": r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "plaintext": r"[A-Za-z0-9+/]+={0,2}|",
    "creation_time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z",
    "public_key": r"-----BEGIN PUBLIC KEY-----\n(.+\n)+-----END PUBLIC KEY-----\n|[A-Za-z0-9+/]{43}=",
}
_SEALED = re.compile(r"vault:v(\d+):([A-Za-z0-9+/]{24,}={0,2}|[A-Za-z0-9_-]{24,})")
_WORDS_OF_PARSERS = "failed to decode JSON input: "
_OWN_WORDS = {"version", "server_time_utc", "cluster_name", "cluster_id", "performance_standby"}
_OF_THE_TOKEN = {"display_name", "id", "accessor", "meta", "policies", "creation_time", "issue_time"}


def normal(value: Any, name: str = "") -> Any:
    """*value* with what is random or each side's own replaced by what shape it has."""
    match value:
        case dict() if "accessor" in value:
            return {key: normal(item, key) for key, item in value.items() if key not in _OF_THE_TOKEN}
        case dict():
            kept = {key: normal(item, key) for key, item in value.items() if key not in _OWN_WORDS}
            if name == "keys":
                return {key: "time" if isinstance(item, int) else item for key, item in kept.items()}
            # 0 means "the newest" to the original, and ours says which that is.
            return {key: item for key, item in kept.items() if key != "min_encryption_version"}
        case list():
            return [normal(item) for item in value]
        case str() if name in _RANDOM and re.fullmatch(_RANDOM[name], value):
            return f"<{name}>"
        case str() if name in {"ciphertext", "signature"} and (found := _SEALED.fullmatch(value)):
            return f"<v{found[1]} {'url' if '-' in found[2] or '_' in found[2] else ''}>".replace(" url", " ")
        case str() if value.startswith(_WORDS_OF_PARSERS):
            return _WORDS_OF_PARSERS
    return value


def filled(body: str | None, made: dict[str, str]) -> str | None:
    for name, text in made.items():
        body = body.replace(f'"{name}"', f'"{text}"') if body is not None else None
    return body


def test_each_request_is_answered_as_by_the_original(original: str, ours: tuple[TransitDialect, str]) -> None:
    dialect, token = ours

    def made_by(send: Any) -> dict[str, str]:
        made = {"CT": send(encrypt(f'{{"plaintext":"{HELLO}"}}'), "ciphertext")}
        for name, key in (("EC", "ec"), ("RSA", "rsa"), ("ED", "ed")):
            made[name] = send(post(f"sign/{key}", f'{{"input":"{HELLO}"}}'), "signature")
        return made

    theirs_made = made_by(lambda case, what: _ask(original, case, case.body).json["data"][what])
    ours_made = made_by(lambda case, what: _call(dialect, token, case, case.body).json["data"][what])

    wrong: list[str] = []
    for case in CASES:
        theirs = _ask(original, case, filled(case.body, theirs_made))
        mine = _call(dialect, token, case, filled(case.body, ours_made))
        what = f"{case.method} {case.path} {case.body}"
        is_same = theirs.status == mine.status and normal(theirs.json) == normal(mine.json)
        if not case.why:
            if not is_same:
                wrong.append(f"{what}\n  {theirs.status} {theirs.body!r}\n  {mine.status} {mine.body!r}")
            continue
        expected_status = case.status if case.status is not None else theirs.status
        if is_same:
            wrong.append(f"{what}: declared a difference, and there is none")
        if mine.status != expected_status or (case.text or "") not in mine.body.decode():
            wrong.append(f"{what}: declared {case.status} {case.text!r}, is {mine.status} {mine.body!r}")
        if case.text is None and normal(theirs.json) != normal(mine.json):
            wrong.append(f"{what}: only the status may differ\n  {theirs.body!r}\n  {mine.body!r}")
    assert not wrong, "\n".join(wrong)


def test_base64_is_read_as_by_the_original(original: str, ours: tuple[TransitDialect, str]) -> None:
    """Four hundred strings that are nearly base64, in one batch to each: more it does not take."""
    dialect, token = ours
    random = Random(20)
    alphabet = "AQgwz019+/==\r\n -_"
    texts = ["".join(random.choices(alphabet, k=random.randrange(14))) for _ in range(250)]
    texts += [base64.b64encode(random.randbytes(random.randrange(9))).decode() for _ in range(150)]
    case = encrypt(json.dumps({"batch_input": [{"plaintext": text} for text in texts]}))
    theirs, mine = _ask(original, case, case.body), _call(dialect, token, case, case.body)
    assert (theirs.status, mine.status) == (400, 400), (theirs.body[:500], mine.body[:500])
    sealed: dict[str, list[dict[str, str]]] = {"theirs": [], "ours": []}
    for text, their, our in zip(
        texts, theirs.json["data"]["batch_results"], mine.json["data"]["batch_results"], strict=True
    ):
        assert their.get("error") == our.get("error"), repr(text)
        if "error" not in their:
            sealed["theirs"].append({"ciphertext": their["ciphertext"]})
            sealed["ours"].append({"ciphertext": our["ciphertext"]})
    opening = {name: decrypt(json.dumps({"batch_input": items})) for name, items in sealed.items()}
    their_reply = _ask(original, opening["theirs"], opening["theirs"].body)
    our_reply = _call(dialect, token, opening["ours"], opening["ours"].body)
    assert our_reply.json["data"] == their_reply.json["data"]
    assert 150 < len(our_reply.json["data"]["batch_results"]) < 400
