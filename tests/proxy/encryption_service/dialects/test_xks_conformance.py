"""What AWS's conformance client for XKS proxies asks, asked by real curl of the real server; what it forgets.

AWS's client is a script round `curl --aws-sigv4`; it looks for a text in the answer and takes the last line
for its JSON. Here status and body are judged whole, over TCP and over mutual TLS, whatever layer answers.
"""

import asyncio
import base64
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from certs.pki import Credential, certify, name
from envelope.certificates import key_usage
from proxy.encryption_service.http_server import ServiceServer
from proxy.encryption_service.metrics import ServiceMetrics
from proxy.encryption_service.model import DialectName
from proxy.encryption_service.settings import EncryptionServiceSettings, ListenSettings
from runtime.clock import SystemClock
from tests.children import output_of
from tests.pki import issue_server, make_server_ca, write_certificate, write_credential
from tests.proxy.encryption_service.aws_signer import Credentials
from tests.proxy.encryption_service.dialects.xks_rig import (
    AAD,
    AAD2,
    HEALTH_METADATA,
    METADATA,
    PREFIX,
    XksRig,
    decrypt_body,
    encrypt_body,
)
from tests.proxy.encryption_service.serving import serving

SUBJECT = "cks.kms.eu-west-1.amazonaws.com"
CDIV = {"ciphertextDataIntegrityValueAlgorithm": "SHA_256"}
INVALID: tuple[dict[str, object], ...] = ({}, {"requestMetadata": {}})
NO_ANSWER: tuple[int, Any] = (0, {})


@dataclass
class Curl:
    """AWS KMS, as far as curl can be it."""

    base_url: str
    credentials: Credentials
    options: Sequence[str] = field(default_factory=tuple)

    async def post(
        self,
        target: str,
        body: object,
        *,
        prefix: str = PREFIX,
        credentials: Credentials | None = None,
        options: Sequence[str] = (),
    ) -> tuple[int, Any]:
        """Status and JSON of the last line, which is all of the body; NO_ANSWER if no HTTP came back."""
        signer = credentials or self.credentials
        running = await asyncio.create_subprocess_exec(
            "curl", "--silent", "--include", "--max-time", "30",
            "--header", "Content-Type:application/json",
            "--aws-sigv4", "aws:amz:us-east-1:kms-xks-proxy",
            "--config", "-",
            "--data-binary", body if isinstance(body, str) else json.dumps(body),
            *self.options, *options,
            f"{self.base_url}/{prefix}/kms/xks/v1/{target}",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        config = f'user = "{signer.access_key_id}:{signer.secret}"\n'  # not in the process list
        output, _errors = await output_of(running, config.encode())
        if not output:
            assert running.returncode
            return NO_ANSWER
        lines = output.decode().split("\r\n")
        head, rest = lines[: lines.index("")], lines[lines.index("") + 1 :]
        if head[0].startswith("HTTP/1.1 100"):
            head, rest = rest[: rest.index("")], rest[rest.index("") + 1 :]
        assert "content-type: application/json" in {line.lower() for line in head}
        (line,) = "\r\n".join(rest).splitlines()
        return int(head[0].split()[1]), json.loads(line)

    async def error(self, target: str, body: object, **others: Any) -> tuple[int, str]:
        status, content = await self.post(target, body, **others)
        assert set(content) == {"errorName", "errorMessage"}, content
        return status, content["errorName"]


@pytest.fixture
def rig(tmp_path: Path) -> XksRig:
    rig = XksRig(tmp_path)
    rig.service.clock.set_wall(time.time())  # curl lives now
    for key in rig.keys.values():
        rig.service.push(key)
    return rig


@pytest.fixture
async def curl(rig: XksRig) -> AsyncIterator[Curl]:
    async with serving([rig.dialect]) as base_url:
        yield Curl(base_url, rig.credentials)
    rig.close()


async def refused_credentials(curl: Curl, target: str, body: object) -> None:
    right = curl.credentials
    for wrong in (
        Credentials(access_key_id="Invalid" + right.access_key_id, secret=right.secret),
        Credentials(access_key_id=right.access_key_id, secret="Invalid" + right.secret),
    ):
        answer = await curl.error(target, body, credentials=wrong)
        assert answer == (401, "AuthenticationFailedException")
    answer = await curl.error(target, body, prefix=PREFIX + "/invalid")
    assert answer == (404, "InvalidUriPathException")


async def test_health(curl: Curl) -> None:
    body = {"requestMetadata": HEALTH_METADATA}
    status, health = await curl.post("health", body)
    assert status == 200
    assert health["xksProxyFleetSize"] > 0
    assert {type(health[name]) for name in ("xksProxyVendor", "xksProxyModel", "ekmVendor")} == {str}
    (manager,) = health["ekmFleetDetails"]
    assert manager["healthStatus"] == "ACTIVE"
    for invalid in INVALID:
        assert await curl.error("health", invalid) == (400, "ValidationException")
    await refused_credentials(curl, "health", body)


async def test_key_metadata(curl: Curl) -> None:
    target = "keys/foo/metadata"
    for operation in ("DescribeKey", "CreateKey"):
        body = {"requestMetadata": METADATA | {"kmsOperation": operation}}
        if operation == "CreateKey":
            del body["requestMetadata"]["kmsKeyArn"]  # there is none yet
        expected = {"keySpec": "AES_256", "keyUsage": ["ENCRYPT", "DECRYPT"], "keyStatus": "ENABLED"}
        assert await curl.post(target, body) == (200, expected)
    for invalid in INVALID:
        assert await curl.error(target, invalid) == (400, "ValidationException")
    body = {"requestMetadata": METADATA}
    assert await curl.error("keys/non_existing_key/metadata", body) == (404, "KeyNotFoundException")
    await refused_credentials(curl, target, body)


async def test_encrypt_refusals(curl: Curl) -> None:
    target = "keys/foo/encrypt"
    assert await curl.error("keys/non_existing_key/encrypt", encrypt_body()) == (404, "KeyNotFoundException")
    assert await curl.error(target, encrypt_body(plaintext=...)) == (400, "ValidationException")
    await refused_credentials(curl, target, encrypt_body())


@pytest.mark.parametrize(
    ("sealed_with", "opened_with", "works"),
    [(..., ..., True), (AAD, AAD, True), (AAD, ..., False), (AAD, AAD2, False)],
    ids=["none", "same", "missing", "different"],
)
async def test_encrypt_then_decrypt(
    curl: Curl, sealed_with: object, opened_with: object, works: bool
) -> None:
    plaintext = base64.b64encode(b"Hello World!").decode()
    field = "additionalAuthenticatedData"
    status, sealed = await curl.post("keys/foo/encrypt", encrypt_body(**{field: sealed_with}))
    assert status == 200
    body = decrypt_body(sealed, **{field: opened_with})
    if works:
        assert await curl.post("keys/foo/decrypt", body) == (200, {"plaintext": plaintext})
    else:
        assert await curl.error("keys/foo/decrypt", body) == (400, "InvalidCiphertextException")


@pytest.mark.parametrize("aad", [AAD, ...], ids=["aad", "none"])
async def test_the_integrity_value(curl: Curl, aad: Any) -> None:
    field = "additionalAuthenticatedData"
    status, sealed = await curl.post("keys/foo/encrypt", encrypt_body(**{field: aad}, **CDIV))
    assert status == 200
    names = ("ciphertextMetadata", "initializationVector", "ciphertext", "authenticationTag")
    hashed = base64.b64decode(AAD) if aad is not ... else b""
    hashed += b"".join(base64.b64decode(sealed[name]) for name in names)
    value = base64.b64decode(sealed["ciphertextDataIntegrityValue"])
    assert value == hashlib.sha256(hashed).digest()
    assert (await curl.post("keys/foo/decrypt", decrypt_body(sealed, **{field: aad})))[0] == 200


async def test_the_largest_plaintext_and_aad(curl: Curl) -> None:
    plaintext = base64.b64encode(os.urandom(4300)).decode()
    aad = base64.b64encode(os.urandom(8192)).decode()
    fields = {"additionalAuthenticatedData": aad}
    status, sealed = await curl.post("keys/foo/encrypt", encrypt_body(plaintext=plaintext, **fields, **CDIV))
    assert status == 200
    answer = await curl.post("keys/foo/decrypt", decrypt_body(sealed, **fields))
    assert answer == (200, {"plaintext": plaintext})


async def test_keys_for_one_operation_or_none(curl: Curl) -> None:
    usage = (400, "InvalidKeyUsageException")
    for aad in ({}, {"additionalAuthenticatedData": AAD}):
        status, sealed = await curl.post("keys/enc-only/encrypt", encrypt_body(**aad))
        assert status == 200
        assert await curl.error("keys/enc-only/decrypt", decrypt_body(sealed, **aad)) == usage
        assert await curl.error("keys/enc-only/encrypt", encrypt_body(**aad, **CDIV)) == usage
        for key in ("dec-only", "impotent"):
            for cdiv in ({}, CDIV):
                assert await curl.error(f"keys/{key}/encrypt", encrypt_body(**aad, **cdiv)) == usage


# What the client forgets.


async def test_credentials_are_rotated_under_a_running_server(rig: XksRig, curl: Curl) -> None:
    body = {"requestMetadata": HEALTH_METADATA}
    new = rig.issue()
    for signer in (rig.credentials, new):
        assert (await curl.post("health", body, credentials=signer))[0] == 200
    rig.service.revoke(rig.credentials.access_key_id)
    assert await curl.error("health", body) == (401, "AuthenticationFailedException")
    assert (await curl.post("health", body, credentials=new))[0] == 200


async def test_a_clock_that_is_off(rig: XksRig, curl: Curl) -> None:
    body = {"requestMetadata": HEALTH_METADATA}
    now_s = time.time()
    rig.service.clock.set_wall(now_s + 400)
    assert await curl.error("health", body) == (401, "AuthenticationFailedException")
    rig.service.clock.set_wall(now_s)
    assert (await curl.post("health", body))[0] == 200


async def test_a_revocation_is_seen_by_the_next_call(rig: XksRig, curl: Curl) -> None:
    body = {"requestMetadata": HEALTH_METADATA}
    assert (await curl.post("health", body))[0] == 200
    for key in rig.keys.values():
        rig.service.withdraw(key)
    for target, content in (("health", body), ("keys/foo/encrypt", encrypt_body())):
        assert await curl.error(target, content) == (400, "InvalidStateException")
    status, metadata = await curl.post("keys/foo/metadata", {"requestMetadata": METADATA})
    assert (status, metadata["keyStatus"]) == (200, "DISABLED")


async def test_other_methods_and_sizes(curl: Curl) -> None:
    for method in ("GET", "PUT", "DELETE"):
        answer = await curl.error("health", {}, options=("--request", method))
        assert answer == (405, "ValidationException")
    assert await curl.error("keys/foo/encrypt", " " * 110_000) == (400, "ValidationException")
    assert (await curl.post("health", {"requestMetadata": HEALTH_METADATA}, options=("--http1.0",)))[0] == 200


_HEALTH = f"/{PREFIX}/kms/xks/v1/health"


@pytest.mark.parametrize(
    ("request_line", "headers", "status", "error"),
    [
        ("GET / HTTP/1.1", "", 404, "InvalidUriPathException"),
        (f"GET {_HEALTH} HTTP/1.1", "", 405, "ValidationException"),
        (f"POST {_HEALTH}?a=b HTTP/1.1", "Content-Length: 0", 404, "InvalidUriPathException"),
        (f"POST {_HEALTH} HTTP/1.1", "Content-Length: 0", 401, "AuthenticationFailedException"),
        (f"POST {_HEALTH} HTTP/1.1", "Content-Length: 131073", 413, "ValidationException"),
        (f"POST /elsewhere{_HEALTH} HTTP/1.1", "Content-Length: 131073", 404, "InvalidUriPathException"),
        (f"POST {_HEALTH} HTTP/1.1", "Content-Length: x", 400, "ValidationException"),
        (
            f"POST {_HEALTH} HTTP/1.1",
            "Content-Length: 1\r\nTransfer-Encoding: chunked",
            400,
            "ValidationException",
        ),
        (f"POST {_HEALTH} HTTP/1.1", "no colon", 400, "ValidationException"),
        (f"POST {_HEALTH} HTTP/1.1", f"X: {'x' * 100_000}", 400, "ValidationException"),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "", 400, "ValidationException"),
    ],
)
async def test_every_layer_answers_one_line_of_json(
    curl: Curl, request_line: str, headers: str, status: int, error: str
) -> None:
    host, port = curl.base_url.removeprefix("http://").split(":")
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection(host, int(port))
        lines = [request_line, "Host: h", *([headers] if headers else []), "", ""]
        writer.write("\r\n".join(lines).encode("latin-1"))
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        (length,) = (int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
        body = await reader.readexactly(length)
        writer.close()
    assert int(lines[0].split()[1]) == status
    assert "content-type: application/json" in lines
    assert b"\n" not in body
    assert json.loads(body)["errorName"] == error


# Mutual TLS.


def issue_client(ca: Credential | None, subject: str, *, valid_from: datetime | None = None) -> Credential:
    """A client's certificate, of one day; without *ca* signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = certify(
        key.public_key(),
        subject=name(subject),
        issuer=ca,
        issuer_key=None if ca else key,
        valid_from=valid_from,
        validity=timedelta(days=1),
        extensions=[
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (key_usage(digital_signature=True), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False),
        ],
    )
    return Credential(key, certificate)


@asynccontextmanager
async def serving_mutual_tls(rig: XksRig, directory: Path, roots: Credential) -> AsyncIterator[Curl]:
    servers = make_server_ca()
    certificate_file, key_file = write_credential(issue_server(servers), directory, "server")
    listen = ListenSettings(
        host="127.0.0.1",
        port=0,
        dialects=(DialectName.XKS,),
        certificate_file=certificate_file,
        key_file=key_file,
        client_roots_file=write_certificate(roots.certificate, directory / "amazon.pem"),
        client_subject=SUBJECT,
    )
    server = ServiceServer(
        EncryptionServiceSettings(listen=(listen,)),
        {rig.dialect.name: rig.dialect},
        metrics=ServiceMetrics(),
        clock=SystemClock(),
    )
    ca_file = write_certificate(servers.certificate, directory / "ca.pem")
    async with server.serving() as (port,):
        yield Curl(f"https://localhost:{port}", rig.credentials, ("--cacert", str(ca_file)))


async def test_only_the_client_certificate_of_aws_kms_comes_in(rig: XksRig, tmp_path: Path) -> None:
    amazon = make_server_ca("Amazon Trust Services")
    body = {"requestMetadata": HEALTH_METADATA}
    right = issue_client(amazon, SUBJECT)
    wrong = {
        "self-signed": issue_client(None, SUBJECT),
        "another CA's": issue_client(make_server_ca("another"), SUBJECT),
        "expired": issue_client(amazon, SUBJECT, valid_from=datetime.now(UTC) - timedelta(days=3)),
        "another region's": issue_client(amazon, "cks.kms.us-east-1.amazonaws.com"),
    }
    rig.set_store(client_subject=SUBJECT)
    async with serving_mutual_tls(rig, tmp_path, amazon) as curl:

        def identity(credential: Credential, stem: str) -> tuple[str, ...]:
            certificate_file, key_file = write_credential(credential, tmp_path, stem)
            return ("--cert", str(certificate_file), "--key", str(key_file))

        assert (await curl.post("health", body, options=identity(right, "right")))[0] == 200
        assert await curl.post("health", body) == NO_ANSWER
        for stem, credential in wrong.items():
            assert await curl.post("health", body, options=identity(credential, stem)) == NO_ANSWER, stem
        for version in ("--tlsv1.3", "--tls-max 1.2"):
            options = (*identity(right, version.strip("-").replace(" ", "")), *version.split())
            assert (await curl.post("health", body, options=options))[0] == 200
    rig.close()
