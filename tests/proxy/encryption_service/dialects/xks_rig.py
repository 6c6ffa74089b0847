"""A key store of AWS KMS over the rig of the core, and the calls that AWS KMS would make to it."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxy.encryption_service.call import Answer, Call, Peer
from proxy.encryption_service.core import Core
from proxy.encryption_service.dialects.xks import XksDialect
from proxy.encryption_service.limits import Limits
from proxy.encryption_service.model import DialectName, NamedKey, Op, XksRule, XksSettings, XksStore
from proxy.encryption_service.settings import XksFleet
from tests.proxy.encryption_service.aws_signer import Credentials, signed_headers
from tests.proxy.encryption_service.service_rig import TENANT, ServiceRig

METADATA = {
    "awsPrincipalArn": "arn:aws:iam::123456789012:user/Alice",
    "kmsKeyArn": "arn:aws:kms:us-east-2:123456789012:/key/1234abcd-12ab-34cd-56ef-1234567890ab",
    "kmsOperation": "Encrypt",
    "kmsRequestId": "4112f4d6-db54-4af4-ae30-c55a22a8dfae",
    "kmsViaService": "ebs",
}
HEALTH_METADATA = {"kmsOperation": "KmsHealthCheck", "kmsRequestId": "1124f4d6"}
PREFIX = "tenants/9pXqU0w2cVb1"
PLAINTEXT = base64.b64encode(b"Hello World!").decode()
AAD = "cHJvamVjdD1uaWxlLGRlcGFydG1lbnQ9bWFya2V0aW5n"
AAD2 = "cHJvamVjdD1ibHVlLGRlcGFydG1lbnQ9ZmluYW5jZQ=="


class XksRig:
    """One tenant's key store with keys `foo`, `enc-only`, `dec-only`, `impotent`, pushed and active."""

    def __init__(
        self,
        directory: Path,
        *,
        limits: Limits | None = None,
        fleet: XksFleet | None = None,
        core_type: type[Core] = Core,
    ) -> None:
        self.service = ServiceRig(directory, limits=limits)
        rig = self.service
        self.keys: dict[str, NamedKey] = {
            "foo": rig.add_key("orders"),
            "enc-only": rig.add_key("enc", operations=frozenset({Op.ENCRYPT})),
            "dec-only": rig.add_key("dec", operations=frozenset({Op.DECRYPT})),
            "impotent": rig.add_key("nothing", operations=frozenset()),
        }
        for key in self.keys.values():
            rig.push(key)
        self.set_store()
        self.credentials = self.issue()
        self.core = core_type(
            keys=rig.keys,
            access=rig.access,
            directory=lambda: rig.directory,
            audit=rig.audit,
            clock=rig.clock,
            limiter=rig.limiter,
        )
        self.dialect = XksDialect(
            core=self.core,
            access=rig.access,
            limiter=rig.limiter,
            directory=lambda: rig.directory,
            clock=rig.clock,
            fleet=fleet,
        )

    def close(self) -> None:
        self.service.close()

    def set_store(
        self,
        *more: XksStore,
        prefix: str = PREFIX,
        region: str | None = None,
        client_subject: str | None = None,
        rules: tuple[XksRule, ...] = (),
    ) -> None:
        """Replace the tenant's stores."""
        names = {external: key.name for external, key in self.keys.items()}
        store = XksStore(prefix=prefix, keys=names, region=region, client_subject=client_subject, rules=rules)
        self.service.add_dialect(DialectName.XKS, XksSettings(stores=(store, *more)))

    def issue(self, prefix: str = PREFIX, *, tenant: str = TENANT, **limits: Any) -> Credentials:
        access_key_id, secret = self.service.add_access_key(prefix, tenant=tenant, **limits)
        return Credentials(access_key_id=access_key_id, secret=secret)

    def call(
        self,
        target: str,
        body: Mapping[str, object] | bytes,
        *,
        prefix: str = PREFIX,
        credentials: Credentials | None = None,
        skew_s: float = 0,
        region: str = "us-east-1",
        peer: Peer | None = None,
    ) -> Call:
        """A signed POST to `<prefix>/kms/xks/v1/<target>`."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        path = f"/{prefix}/kms/xks/v1/{target}"
        headers = signed_headers(
            credentials or self.credentials,
            path=path,
            body=raw,
            now_s=self.service.clock.wall_s() + skew_s,
            region=region,
        )
        return Call(
            method="POST", path=path, headers=headers, body=raw, peer=peer or Peer(address="127.0.0.1")
        )

    def ask(self, target: str, body: Mapping[str, object] | bytes, **others: Any) -> tuple[int, Any]:
        """Status and JSON of the answer to such a call."""
        return judged(self.dialect.handle(self.call(target, body, **others)))

    def encrypt(self, key: str = "foo", **fields: object) -> tuple[int, Any]:
        return self.ask(f"keys/{key}/encrypt", encrypt_body(**fields))

    def decrypt(self, sealed: Mapping[str, object], key: str = "foo", **fields: object) -> tuple[int, Any]:
        return self.ask(f"keys/{key}/decrypt", decrypt_body(sealed, **fields))

    def health(self) -> tuple[int, Any]:
        return self.ask("health", {"requestMetadata": HEALTH_METADATA})

    def metadata(self, key: str = "foo") -> tuple[int, Any]:
        return self.ask(f"keys/{key}/metadata", {"requestMetadata": METADATA})


def encrypt_body(**fields: object) -> dict[str, object]:
    body = {"requestMetadata": METADATA, "plaintext": PLAINTEXT, "encryptionAlgorithm": "AES_GCM"} | fields
    return {name: value for name, value in body.items() if value is not ...}


def decrypt_body(sealed: Mapping[str, object], **fields: object) -> dict[str, object]:
    """Of what Encrypt returned; a field given as `...` is left out."""
    names = ("ciphertext", "ciphertextMetadata", "initializationVector", "authenticationTag")
    body = {
        "requestMetadata": METADATA | {"kmsOperation": "Decrypt"},
        "encryptionAlgorithm": "AES_GCM",
        **{name: sealed[name] for name in names},
    } | fields
    return {name: value for name, value in body.items() if value is not ...}


def judged(answer: Answer) -> tuple[int, Any]:
    """Status and content, after what holds for every answer: JSON on one line, printable, short."""
    assert answer.content_type == "application/json"
    assert b"\n" not in answer.body
    content = json.loads(answer.body)
    assert isinstance(content, dict)
    if answer.status != 200:
        assert set(content) <= {"errorName", "errorMessage"}
        message = content.get("errorMessage", "")
        assert len(message) < 512
        assert message.isascii()
        assert message.isprintable()
    return answer.status, content
