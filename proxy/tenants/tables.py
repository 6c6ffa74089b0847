"""The directory's tables, as the newest migration leaves them.

1. Nothing here is secret in the clear: private keys are files below the state directory, named relative to
   it; of a bearer token there is a digest, a SigV4 secret (a caller's, or one that this proxy signs with
   upstream) is sealed by a file key of the state directory.
2. Times are milliseconds since the Unix epoch. Ids are text and immutable.
3. Every change is one transaction that raises `directory.revision` by one and leaves one row of `history`.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from runtime.database import new_metadata

metadata = new_metadata()

directory = Table(
    "directory",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("revision", BigInteger, nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

tenant = Table(
    "tenant",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("root_der", LargeBinary, nullable=False),
    Column("forward_listen", String(64), unique=True),  # empty since version 0003
    Column("forward_address", String(64)),  # tenants may share one
    Column("access", Text),  # JSON, proxy/tenants/user_rows.py; null: nothing is asked for
    Column("ca_certificate_file", String(255), nullable=False),
    Column("ca_key_file", String(255), nullable=False),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)

proxy_user = Table(
    "proxy_user",
    metadata,
    Column("tenant_id", ForeignKey("tenant.id"), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("verifier", LargeBinary, nullable=False),
    Column("not_after_ms", BigInteger),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)

tunnel_host = Table(
    "tunnel_host",
    metadata,
    Column("tenant_id", ForeignKey("tenant.id", ondelete="CASCADE"), primary_key=True),
    Column("pattern", String(255), primary_key=True),
)

signer = Table(
    "signer",
    metadata,
    Column("tenant_id", ForeignKey("tenant.id", ondelete="CASCADE"), primary_key=True),
    Column("fingerprint", String(64), primary_key=True),
    Column("certificate_der", LargeBinary, nullable=False),
)

network_service = Table(
    "network_service",
    metadata,
    Column("tenant_id", ForeignKey("tenant.id"), primary_key=True),
    Column("name", String(63), primary_key=True),
    # These five are null for a named key of the encryption service, which has no upstream.
    Column("upstream_scheme", String(5)),
    Column("upstream_host", String(253)),
    Column("upstream_port", Integer),
    Column("profile", String(63)),
    Column("legacy", String(16)),
    Column("reverse_listen", String(64), unique=True),
    Column("reverse_names", Text),  # host names in reverse mode, a space between; null: its own
    Column("profile_options", Text),  # JSON object, in the profile's own words
    Column("certificate_der", LargeBinary),
    # The key of that certificate; while there is none, the key of the first CSR.
    Column("key_file", String(255), nullable=False),
    # The key of a CSR whose certificate has not come yet, during a renewal.
    Column("pending_key_file", String(255)),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    UniqueConstraint("tenant_id", "upstream_host", "upstream_port", name="uq_network_service_upstream"),
)

upstream_credential = Table(
    "upstream_credential",
    metadata,
    Column("tenant_id", String(63), primary_key=True),
    Column("service", String(63), primary_key=True),
    Column("access_key", String(128), primary_key=True),
    Column("upstream_access_key", String(128), nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("not_after_ms", BigInteger),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
    ForeignKeyConstraint(
        ["tenant_id", "service"],
        ["network_service.tenant_id", "network_service.name"],
        ondelete="CASCADE",
    ),
)

named_key = Table(
    "named_key",
    metadata,
    Column("tenant_id", String(63), primary_key=True),
    Column("name", String(63), primary_key=True),
    Column("key_use", String(8), nullable=False),
    Column("algorithm", String(16)),
    Column("blocked", Boolean, nullable=False),
    Column("operations", Text, nullable=False),  # words, sorted, a space between
    ForeignKeyConstraint(["tenant_id", "name"], ["network_service.tenant_id", "network_service.name"]),
)

service_dialect = Table(
    "service_dialect",
    metadata,
    Column("tenant_id", ForeignKey("tenant.id"), primary_key=True),
    Column("dialect", String(16), primary_key=True),
    Column("enabled", Boolean, nullable=False),
    Column("settings", Text, nullable=False),  # JSON, a Struct of proxy/encryption_service/model.py
    Column("updated_at_ms", BigInteger, nullable=False),
)

service_credential = Table(
    "service_credential",
    metadata,
    Column("id", String(30), primary_key=True),
    Column("tenant_id", ForeignKey("tenant.id"), nullable=False),
    Column("dialect", String(16), nullable=False),
    Column("kind", String(8), nullable=False),
    Column("label", String(255), nullable=False),
    Column("keys", Text),  # names, sorted, a space between; null: all of the tenant's
    Column("operations", Text, nullable=False),
    Column("endpoint", String(255)),
    Column("networks", Text, nullable=False),
    Column("not_after_ms", BigInteger),
    Column("verifier", LargeBinary, nullable=False),
    Column("requests_per_s", Float),
    Column("replaces", String(30)),
    Column("created_at_ms", BigInteger, nullable=False),
    Column("updated_at_ms", BigInteger, nullable=False),
)

# Uploads that take several requests (proxy/uploads.py). Written by the data path, outside of `revision` and
# history; no foreign keys: what is left of a service that was removed is swept away.
upload_part = Table(
    "upload_part",
    metadata,
    Column("tenant_id", String(63), primary_key=True),
    Column("service", String(63), primary_key=True),
    Column("upload_ref", LargeBinary(16), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("tag", String(255), primary_key=True),
    Column("stored_bytes", BigInteger, nullable=False),
    Column("commitment", LargeBinary(32), nullable=False),
    Column("digests", LargeBinary),  # of the plaintext, sealed
    Column("at_ms", BigInteger, nullable=False),
)

upload_held = Table(
    "upload_held",
    metadata,
    Column("tenant_id", String(63), primary_key=True),
    Column("service", String(63), primary_key=True),
    Column("upload_ref", LargeBinary(16), primary_key=True),
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("tag", String(255), primary_key=True),
    Column("sealed", LargeBinary, nullable=False),  # the part as it lies at the service
    Column("sealed_bytes", BigInteger, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)

upload_completion = Table(
    "upload_completion",
    metadata,
    Column("tenant_id", String(63), primary_key=True),
    Column("service", String(63), primary_key=True),
    Column("upload_ref", LargeBinary(16), primary_key=True),
    Column("asked", LargeBinary(32), nullable=False),  # SHA-256 of what the client asked
    Column("request", LargeBinary, nullable=False),
    Column("final_number", BigInteger, nullable=False),
    Column("is_joined", Boolean, nullable=False),
    Column("is_done", Boolean, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
)

# Uploads by offset: what was sealed of them, and how far (proxy/uploads.py).
upload_session = Table(
    "upload_session",
    metadata,
    Column("tenant_id", String(63), primary_key=True),
    Column("service", String(63), primary_key=True),
    Column("upload_ref", LargeBinary(16), primary_key=True),
    Column("version", BigInteger, nullable=False),  # drawn anew with each change
    Column("state_bytes", BigInteger, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("state", LargeBinary, nullable=False),  # last: SQLite reads through what stands before a column
)

history = Table(
    "history",
    metadata,
    Column("revision", BigInteger, primary_key=True, autoincrement=False),
    Column("at_ms", BigInteger, nullable=False),
    Column("actor", String(255), nullable=False),
    Column("action", String(63), nullable=False),
    Column("tenant_id", String(63), nullable=False),
    Column("service", String(63)),
    Column("detail", Text, nullable=False),  # JSON object, string values
)
