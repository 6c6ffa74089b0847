"""Everything the proxy may answer in place of forwarding: one table, code -> status, cause, next step.

1. A code is stable: it stands in the `Sealgate-Error` header, the JSON body, the audit event and the metric.
2. All authentication failures of an object share one code: nobody outside learns which check failed.
3. Once a body's first byte has left there is no answer any more, only the cut connection; the code then
   stands in audit and metric alone.
"""

import json
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    code: str
    status: int
    cause: str
    next_step: str
    retry_after_s: int | None = None

    def body(self) -> bytes:
        """The answer's body: JSON with code, cause and next step, newline at the end."""
        fields = {"code": self.code, "status": self.status, "cause": self.cause, "next_step": self.next_step}
        return json.dumps(fields, ensure_ascii=False).encode() + b"\n"

    def headers(self) -> list[tuple[str, str]]:
        """Name and value of each header of the answer, Content-Length included."""
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(self.body()))),
            ("Cache-Control", "no-store"),
            ("Sealgate-Error", self.code),
        ]
        if self.retry_after_s is not None:
            headers.append(("Retry-After", str(self.retry_after_s)))
        return headers


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaped:
    """A refusal in a dialect's own shape. Status and `Sealgate-Error` stay as they are.

    *fields*: what the dialect's clients look for in the head, beside what every refusal has.
    """

    content_type: str
    body: bytes
    fields: tuple[tuple[str, str], ...] = ()


class RefusedError(Exception):
    """Raised where a message must not go on; carries what the client is told."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


def _refusal(
    status: int, code: str, cause: str, next_step: str, *, retry_after_s: int | None = None
) -> Refusal:
    return Refusal(code=code, status=status, cause=cause, next_step=next_step, retry_after_s=retry_after_s)


_ADMIN = "Ask the administrator of this proxy"

# What the client may mend.
BAD_LENGTH: Final = _refusal(
    400,
    "bad-length",
    "The body is shorter or longer than its declared length.",
    "Send the body again, whole.",
)
BAD_DIGEST: Final = _refusal(
    400, "bad-digest", "The body does not match the digest in the request.", "Send the body again."
)
BAD_MESSAGE: Final = _refusal(
    400, "bad-message", "The request is malformed or ambiguous.", "Mend the client; retrying will not help."
)
HOST_MISMATCH: Final = _refusal(
    421,
    "host-mismatch",
    "CONNECT host, TLS server name and Host header name different hosts.",
    "Use one host name for the whole connection.",
)
UNKNOWN_HOST: Final = _refusal(
    421,
    "unknown-host",
    "The request names a host by which this service is not known here: a bucket in it could not be told.",
    _ADMIN + " to add the name: `sealgate service update --reverse-name`, or the option `hosts`.",
)
TLS_REQUIRED: Final = _refusal(
    403, "tls-required", "The request came in the clear, and not from this machine.", "Use https."
)
TOO_LARGE: Final = _refusal(
    413,
    "too-large",
    "This body has to be read before it can go on, and it is longer than may be.",
    "Send less at once.",
)
LENGTH_REQUIRED: Final = _refusal(
    411,
    "length-required",
    "The service needs to know the length of this body before it comes.",
    "Send a Content-Length.",
)
PARTIAL_WRITE: Final = _refusal(
    501, "partial-write", "Writing a part of an object in place cannot be sealed.", "Upload the whole object."
)
UNKNOWN_ROUTE: Final = _refusal(
    501,
    "unknown-route",
    "The service profile has no rule for this method or body, so nothing was sent.",
    _ADMIN + " for a profile that knows this operation.",
)
UPGRADE: Final = _refusal(
    501,
    "upgrade-refused",
    "Protocol upgrades could carry plaintext and are refused on managed hosts.",
    _ADMIN + " whether the application works without WebSockets.",
)
TRAILERS: Final = _refusal(
    501,
    "trailers-refused",
    "Trailers would travel in the clear beside a sealed body.",
    "Send them as headers.",
)
RANGE_NOT_SATISFIABLE: Final = _refusal(
    416, "range-not-satisfiable", "The requested range lies outside the object.", "Ask for a range inside it."
)

# Who uses the forward proxy.
PROXY_AUTHENTICATION: Final = _refusal(
    407,
    "proxy-authentication-required",
    "This proxy serves users it knows, and the request names none.",
    "Give the name and password that the administrator of this proxy has issued.",
)
PROXY_CREDENTIALS: Final = _refusal(
    407,
    "proxy-credentials-refused",
    "The proxy credentials are wrong, have ended, or belong to a tenant that is not served here.",
    "Correct name (tenant/user where tenants share a proxy) and password, or ask for new ones.",
)
USER_CERTIFICATE: Final = _refusal(
    403,
    "client-certificate-refused",
    "This tenant's users show a client certificate to the proxy, and none that it trusts was shown.",
    "Install the client certificate, and reach the proxy by TLS (HTTPS in the PAC file).",
)
USER_NETWORK: Final = _refusal(
    403,
    "network-refused",
    "This tenant's users come from other networks than this one.",
    _ADMIN + " to add the network.",
)
USER_MISMATCH: Final = _refusal(
    403,
    "user-mismatch",
    "Client certificate and proxy credentials, or two requests of one connection, are of different tenants.",
    "Use those of one tenant, and a connection of its own for each tenant.",
)

TOO_MANY: Final = _refusal(
    429,
    "too-many-requests",
    "Too many requests of this connection are in progress, even if cancelled.",
    "Wait for answers before asking more.",
    retry_after_s=1,
)

# Signatures of requests (AWS Signature Version 4, proxy/profiles/s3).
SIGNATURE_MISMATCH: Final = _refusal(
    403,
    "signature-mismatch",
    "The signature of the request, or of a chunk of its body, is not what this access key's secret makes.",
    "Check the secret access key and what changes the request between client and proxy.",
)
ACCESS_KEY_UNKNOWN: Final = _refusal(
    403,
    "access-key-unknown",
    "The access key is not in the vault of this service, or has ended.",
    _ADMIN + " to add it by `sealgate s3-credential add` or `azure-credential add`.",
)
REQUEST_SKEWED: Final = _refusal(
    403,
    "request-time-skewed",
    "The request is dated too long before or after now.",
    "Set the client's clock.",
)
SIGNATURE_EXPIRED: Final = _refusal(
    403, "signature-expired", "The presigned URL has expired, or is not good yet.", "Make a new one."
)
AUTHORIZATION_MALFORMED: Final = _refusal(
    400,
    "authorization-malformed",
    "The signature's parameters are missing, malformed, or contradict each other.",
    "Mend the client; retrying will not help.",
)
HEADERS_NOT_SIGNED: Final = _refusal(
    403,
    "headers-not-signed",
    "Host and every x-amz-* header of the request must be signed.",
    "Mend the client; retrying will not help.",
)
SIGNATURE_VERSION: Final = _refusal(
    400,
    "signature-version",
    "Only AWS4-HMAC-SHA256 can be verified and made anew; this is SigV2, SigV4A or something else.",
    "Use Signature Version 4 (boto3: Config(signature_version='s3v4')).",
)
SESSION_TOKEN: Final = _refusal(
    400,
    "session-token",
    "Temporary credentials of clients cannot be verified here.",
    "Use a key of this proxy (`sealgate s3-credential add --generate`).",
)
ANONYMOUS: Final = _refusal(
    403, "request-not-signed", "Requests to this service have to be signed.", "Give the client an access key."
)
CANNOT_SIGN: Final = _refusal(
    403,
    "cannot-sign-anew",
    "This request has to be changed, and its access key is not in the vault to sign it anew.",
    _ADMIN + " to add it by `sealgate s3-credential add` or `azure-credential add`.",
)
PAYLOAD_MISMATCH: Final = _refusal(
    400,
    "payload-mismatch",
    "The body is not the one whose SHA-256 the request has signed.",
    "Send the body again.",
)
INVALID_DIGEST: Final = _refusal(
    400,
    "invalid-digest",
    "A digest or checksum in the request is no value of its kind, or is missing where it was announced.",
    "Mend the client; retrying will not help.",
)

SHARED_KEY_LITE: Final = _refusal(
    400,
    "shared-key-lite",
    "SharedKeyLite is not verified here.",
    "Use SharedKey, a shared access signature or a bearer token.",
)
BAD_CHECKSUM: Final = _refusal(
    400, "bad-checksum", "The body does not match the CRC-64 in the request.", "Send the body again."
)

# Uploads of several requests.
BLOCK_ID: Final = _refusal(
    400,
    "block-id",
    "The id of this block is missing, or no base64 of 1 to 64 bytes.",
    "Mend the client; retrying will not help.",
)
BLOCK_UNKNOWN: Final = _refusal(
    400,
    "block-unknown",
    "A listed block is not known here: it was sent another way, or its state was lost.",
    "Upload the block again.",
)
BLOCKS_OF_A_COPY: Final = _refusal(
    400,
    "blocks-of-a-copy",
    "Blocks of a blob that was copied to here cannot be joined with new ones.",
    "Upload all of its blocks again.",
)
MALFORMED_DOCUMENT: Final = _refusal(
    400,
    "malformed-document",
    "The document in the request is not what this operation is asked with.",
    "Mend the client; retrying will not help.",
)
PART_UNKNOWN: Final = _refusal(
    400,
    "part-unknown",
    "A listed part is not known here: it was sent another way, or again since, or its state was lost.",
    "Upload the part again, or start the upload over.",
)
PART_NOT_THERE: Final = _refusal(
    416, "part-not-there", "The object has fewer parts than this one's number.", "Ask for a part it has."
)
PART_ORDER: Final = _refusal(
    400, "part-order", "The listed parts are not in rising order.", "List them by rising number."
)
PART_TOO_SMALL: Final = _refusal(
    400,
    "part-too-small",
    "A part that is not the last one is smaller than the service takes.",
    "Upload larger parts.",
)
PART_NUMBER: Final = _refusal(
    400,
    "part-number",
    "This part number is not usable: the highest one is needed for what ends a sealed object in parts.",
    "Use larger and fewer parts.",
)
UPLOAD_SIZE: Final = _refusal(
    400,
    "upload-size",
    "The parts together do not have the size that the request declares.",
    "Check which parts were listed.",
)
CHECKSUM_OF_PARTS: Final = _refusal(
    501,
    "checksum-of-parts",
    "A checksum of the whole object cannot be compared: not every part came with one of this algorithm.",
    "Send every part with such a checksum, or leave the whole's out: parts are compared with their own.",
)
FOREIGN_DESTINATION: Final = _refusal(
    502,  # RFC 4918 9.8.5, 9.9.4
    "foreign-destination",
    "The destination is not at this service.",
    "Download the object and upload it there.",
)
BAD_DESTINATION: Final = _refusal(
    400,
    "bad-destination",
    "The Destination field came more than once, or is no URL.",
    "Mend the client; retrying will not help.",
)
UNSUPPORTED_BODY: Final = _refusal(
    415,  # RFC 4918 9.3
    "unsupported-body",
    "This method takes no such body.",
    "Mend the client; retrying will not help.",
)
CHUNK_NAME: Final = _refusal(
    400,
    "chunk-name",
    "The name of this chunk does not say where it belongs, or its upload has names of another kind.",
    "Name chunks by numbers of one width, or without leading zeros.",
)
CHUNKS_UNKNOWN: Final = _refusal(
    404,  # clients begin a new upload then
    "chunks-unknown",
    "Nothing is known of the chunks of this upload.",
    "Upload the file again.",
)
TOO_MANY_CHUNKS: Final = _refusal(
    400,
    "too-many-chunks",
    "Behind the last chunk of this upload there is no place for what ends the sealed file.",
    "Upload it in fewer, larger chunks: 9,999 at most.",
)
UPLOADS_FULL: Final = _refusal(
    503,
    "uploads-full",
    "No more can be remembered of uploads in parts that are under way: too many parts of one, or 256 MiB"
    " of small last parts of one service.",
    "Try again later; end or abort uploads that lie about.",
    retry_after_s=60,
)
UPLOADS_UNAVAILABLE: Final = _refusal(
    503,
    "uploads-unavailable",
    "The database that remembers uploads in parts cannot be used, so nothing was acknowledged.",
    _ADMIN + ": see the log.",
    retry_after_s=10,
)
UPLOAD_LOST: Final = _refusal(
    410,  # clients begin a new upload then
    "upload-lost",
    "Nothing is known of this upload, or it cannot be gone on with: its state is lost, or other"
    " content came for a place of which the service may have a piece.",
    "Start the upload over.",
)
UPLOAD_BUSY: Final = _refusal(
    503,
    "upload-busy",
    "Another request of this upload is being served.",
    "Ask where the upload is, and go on there.",
    retry_after_s=1,
)
CONTENT_CODING: Final = _refusal(
    501,
    "content-coding",
    "The service undoes this coding when it serves the object, and what it stores is not coded but sealed.",
    "Upload without a Content-Encoding, or name the coding in the object's name.",
)
CONTENT_TOO_LARGE: Final = _refusal(
    400,
    "content-too-large",
    "The file is larger than the form's policy allows.",
    "Send a smaller file, or ask for another form.",
)
CONTENT_TOO_SMALL: Final = _refusal(
    400,
    "content-too-small",
    "The file is smaller than the form's policy allows.",
    "Send a larger file, or ask for another form.",
)
PRECONDITION: Final = _refusal(
    412,
    "precondition-failed",
    "A condition that the request names does not hold.",
    "Look at the object again before deciding what to ask.",
)
COPY_SOURCE: Final = _refusal(
    400,
    "copy-source",
    "The source of the copy cannot be read as an object of this service.",
    "Name an object of this service as the source.",
)

# What the administrator of the proxy may mend.
UNMANAGED_HOST: Final = _refusal(
    403,
    "unmanaged-host",
    "This host is not a managed service of this tenant and is not tunnelled.",
    _ADMIN + " to add the service, or the host to the tunnelled ones.",
)
NO_PERMIT: Final = _refusal(
    502, "no-permit", "Nothing permitted this message, so it was not forwarded.", _ADMIN + ": see the log."
)
INTERNAL: Final = _refusal(
    502,
    "internal",
    "The proxy failed while handling this message; nothing more was forwarded.",
    _ADMIN + ": see the log.",
)
UPSTREAM: Final = _refusal(
    502,
    "upstream-failed",
    "The service could not be reached or its certificate did not verify.",
    "Try again later; if it persists ask the administrator of this proxy.",
    retry_after_s=5,
)
IDLE: Final = _refusal(
    504,
    "idle",
    "Neither the client nor the service has sent anything for too long.",
    "Try again.",
    retry_after_s=1,
)
UPSTREAM_CHANGED: Final = _refusal(
    502,
    "upstream-changed",
    "The object changed while it was being read, or the service answered another range.",
    "Try again.",
    retry_after_s=1,
)
ANSWER_REFUSED: Final = _refusal(
    502,
    "answer-refused",
    "The service acknowledged an upload before its end, or sends a client on to where nothing is sealed or"
    " opened.",
    _ADMIN + " whether another host of the service must be managed.",
)
SERVICE_ANSWER: Final = _refusal(
    502,
    "service-answer",
    "The service's answer is not what this operation is answered with, or too long to be read.",
    _ADMIN + ": see the log.",
)
SPOOL_FULL: Final = _refusal(
    503,
    "spool-full",
    "There is no room to hold this upload until it can be sent.",
    "Try again later, or send a Content-Length.",
    retry_after_s=10,
)
SPOOL_SHARE: Final = _refusal(
    503,
    "spool-share",
    "This tenant's uploads fill its part of the room for uploads that have to be held.",
    "Try again later, or send a Content-Length.",
    retry_after_s=10,
)
MEMORY_FULL: Final = _refusal(
    503,
    "memory-full",
    "There is no room to read this body: too many bodies that have to be read first are on their way.",
    "Try again.",
    retry_after_s=2,
)
MEMORY_SHARE: Final = _refusal(
    503,
    "memory-share",
    "This tenant's bodies that have to be read first fill its part of the room for them.",
    "Try again.",
    retry_after_s=2,
)
AUDIT_UNAVAILABLE: Final = _refusal(
    503,
    "audit-unavailable",
    "The audit log cannot be written, so the operation was refused.",
    _ADMIN + ": free the disk that holds the audit log.",
    retry_after_s=30,
)

ENV_HEALING: Final = _refusal(
    503,
    "env-healing",
    "This environment is withdrawn, or has not been told yet that it may serve; nothing was forwarded.",
    "Try again: a load balancer sends the next request to another environment.",
    retry_after_s=2,
)

# What the enterprise's key administrator may mend.
KEY_UNKNOWN: Final = _refusal(
    503,
    "key-unknown",
    "The key of this object is not known here.",
    "Try again in a minute; then ask the enterprise's key administrator.",
    retry_after_s=60,
)
KEY_EXPIRED: Final = _refusal(
    503,
    "key-expired",
    "The key's validity has ended and the key agent has not renewed it.",
    "Try again in a minute; then ask the enterprise's key administrator about the key agent.",
    retry_after_s=60,
)
KEY_WITHDRAWN: Final = _refusal(
    503,
    "key-withdrawn",
    "The enterprise has withdrawn this key.",
    "Ask the enterprise's key administrator.",
    retry_after_s=300,
)
NO_ACTIVE_KEY: Final = _refusal(
    503,
    "no-active-key",
    "No active key is present to seal this upload; nothing was sent.",
    "Try again in a minute; then ask the enterprise's key administrator.",
    retry_after_s=60,
)
KEY_DESTROYED: Final = _refusal(
    410,
    "key-destroyed",
    "The key of this object was destroyed; the object cannot be read any more.",
    "Restore the content from another source.",
)
KEY_SUSPENDED: Final = _refusal(
    423,
    "key-suspended",
    "The key of this object is suspended or compromised.",
    "Ask the enterprise's key administrator.",
)

# What nobody may mend but by restoring the object.
OBJECT_INVALID: Final = _refusal(
    502,
    "object-invalid",
    "The stored object is damaged, incomplete, or was sealed for someone else.",
    "Restore the object from a good copy.",
)
SEALED_UPLOAD: Final = _refusal(
    409,
    "sealed-upload-invalid",
    "The upload is a sealed object already, and does not open under a key of this service.",
    "Upload the content itself, or the sealed object as it was stored.",
)
NOT_SEALED: Final = _refusal(
    409,
    "not-sealed",
    "The stored object is not sealed and this service accepts sealed objects only.",
    "Upload it again through the proxy, or ask for a migration policy.",
)
