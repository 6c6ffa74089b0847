"""Evidence as one file that proves itself by the tenant's root alone: parts, their list, a signature.

1. The file is a ZIP archive that any program opens: `manifest.json`, `signature`, and the parts that the
   manifest lists by name, size and SHA-256. Nothing is compressed, and there is one way to write it: what
   deviates from that by a bit is refused, wherever the bit stands.
2. The manifest holds the signer's certificates and the moment it was made. The signature is ECDSA P-256 with
   SHA-256, r and s in 32 bytes each, over DOMAIN and the manifest's bytes; its certificate speaks for an
   agent's signing key under the tenant's root.
3. Certificates are judged at the moment the manifest names: evidence is read when they have long expired.
4. Everything is bounded before it is read.
"""

import io
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.base64url import b64u_decode, b64u_encode
from envelope.certificates import AnyHolder, CertificateError, Role, verify_certificate
from envelope.errors import FormatError, IntegrityError

FORMAT: Final = "sealgate-evidence-1"
MAX_FILE_BYTES: Final = 1 << 30
MAX_PARTS: Final = 64
DOMAIN: Final = b"sealgate evidence v1\n"
_MANIFEST: Final = "manifest.json"
_SIGNATURE: Final = "signature"
_RAW_SIZE: Final = 32
_MOMENT: Final = (1980, 1, 1, 0, 0, 0)
_MODE: Final = 0o100600 << 16

# What `zipfile` raises of strange bytes; NotImplementedError is a RuntimeError.
_UNREADABLE: Final = (zipfile.BadZipFile, struct.error, OSError, ValueError, RuntimeError, EOFError)


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    bytes: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    tenant: str
    subject: str
    made_at_ms: int
    certificates: tuple[str, ...]
    parts: tuple[_Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a file holds, proven."""

    tenant: str
    subject: str
    made_at_ms: int
    made_by: str
    """The agent whose key signed it."""
    parts: Mapping[str, bytes]


def write_evidence(
    parts: Mapping[str, bytes],
    *,
    tenant: str,
    subject: str,
    made_at_ms: int,
    key: ec.EllipticCurvePrivateKey,
    chain: Sequence[x509.Certificate],
) -> bytes:
    """The file. *chain*: the signing certificate first, then intermediates, without the root."""
    manifest = _canonical(
        {
            "format": FORMAT,
            "tenant": tenant,
            "subject": subject,
            "made_at_ms": made_at_ms,
            "certificates": [b64u_encode(one.public_bytes(Encoding.DER)) for one in chain],
            "parts": [
                {"name": name, "bytes": len(content), "sha256": sha256(content).hexdigest()}
                for name, content in sorted(parts.items())
            ],
        }
    )
    r, s = decode_dss_signature(key.sign(DOMAIN + manifest, ec.ECDSA(hashes.SHA256())))
    signature = r.to_bytes(_RAW_SIZE, "big") + s.to_bytes(_RAW_SIZE, "big")
    return _pack({_MANIFEST: manifest, _SIGNATURE: signature, **dict(sorted(parts.items()))})


def read_evidence(content: bytes, *, root: x509.Certificate, tenant: str | None = None) -> Evidence:
    """What *content* proves under *root*.

    FormatError: no such file. IntegrityError: not as it was written. CertificateError: signed by nobody who
    speaks for an agent of the tenant.
    """
    files = _unpack(content)
    if list(files)[:2] != [_MANIFEST, _SIGNATURE]:
        raise FormatError("not evidence: it does not begin with its manifest and signature")
    manifest_bytes, signature = files.pop(_MANIFEST), files.pop(_SIGNATURE)
    try:
        manifest = msgspec.json.decode(manifest_bytes, type=_Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"not evidence: its manifest cannot be read: {error}") from None
    if manifest.format != FORMAT:
        raise FormatError(f"evidence of another format: {manifest.format!r}")
    made_by = _check_signer(manifest, manifest_bytes, signature, root=root, tenant=tenant)
    if [one.name for one in manifest.parts] != list(files):
        raise IntegrityError("the parts are not those that the manifest lists")
    for one in manifest.parts:
        found = files[one.name]
        if len(found) != one.bytes or sha256(found).hexdigest() != one.sha256:
            raise IntegrityError(f"part {one.name} is not the one that the manifest lists")
    return Evidence(
        tenant=manifest.tenant,
        subject=manifest.subject,
        made_at_ms=manifest.made_at_ms,
        made_by=made_by,
        parts=files,
    )


def _check_signer(
    manifest: _Manifest, signed: bytes, signature: bytes, *, root: x509.Certificate, tenant: str | None
) -> str:
    """The agent that signed the manifest."""
    if tenant is not None and manifest.tenant != tenant:
        raise CertificateError("tenant", f"evidence of tenant {manifest.tenant}, not of {tenant}")
    try:
        leaf, *intermediates = [
            x509.load_der_x509_certificate(b64u_decode(one)) for one in manifest.certificates
        ]
    except (ValueError, x509.InvalidVersion):
        raise FormatError("not evidence: its manifest names no readable certificate") from None
    identity = verify_certificate(
        leaf,
        root=root,
        intermediates=intermediates,
        expected=AnyHolder(manifest.tenant, Role.AGENT_SIGNING),
        now_s=manifest.made_at_ms / 1000,
    )
    public = leaf.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey) or len(signature) != 2 * _RAW_SIZE:
        raise IntegrityError("the manifest's signature does not verify")
    r, s = (int.from_bytes(half, "big") for half in (signature[:_RAW_SIZE], signature[_RAW_SIZE:]))
    try:
        public.verify(encode_dss_signature(r, s), DOMAIN + signed, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise IntegrityError("the manifest's signature does not verify") from None
    return identity.name


def _canonical(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _pack(files: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _MOMENT)
            entry.create_system = 3
            entry.external_attr = _MODE
            archive.writestr(entry, content)
    return stream.getvalue()


def _unpack(content: bytes) -> dict[str, bytes]:
    """The files in order. FormatError, IntegrityError: written otherwise than by `_pack` (rule 1)."""
    if len(content) > MAX_FILE_BYTES:
        raise FormatError(f"more than {MAX_FILE_BYTES} bytes are no evidence")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            if (
                len(entries) > MAX_PARTS
                or sum(one.file_size for one in entries) > len(content)
                or any(one.compress_type != zipfile.ZIP_STORED for one in entries)
            ):
                raise FormatError("not evidence: no archive that was written here")
            files = {one.filename: archive.read(one) for one in entries}
            names = [one.filename for one in entries]
    except _UNREADABLE as error:
        raise FormatError(f"not evidence: {error}") from None
    try:
        again = _pack(files)
    except (zipfile.LargeZipFile, ValueError, UnicodeEncodeError):
        again = b""
    if len(set(names)) != len(names) or again != content:
        raise IntegrityError("the archive is not as it was written")
    return files
