"""The registry's tables, as the newest migration leaves them.

1. Nothing here is secret: data keys stand only wrapped by the KEK.
2. Times are milliseconds since the Unix epoch. Ids are text and immutable.
3. `environment`, `tenant`, `kek`, `key_ring`, `dek` and `dek_wrap` are the ones that later carry several
   environments; `proxy`, `service_proxy` and `push_sequence` are this agent's
   own.
"""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
    text,
)

from runtime.database import new_metadata

metadata = new_metadata()


def _ms(name: str, *, nullable: bool = False) -> Column[int]:
    return Column(name, BigInteger, nullable=nullable)


lease = Table(  # lease.py says what it means
    "lease",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # one row
    Column("term", BigInteger, nullable=False),
    Column("instance", String(32), nullable=False),
    Column("agent_id", String(63), nullable=False),
    Column("machine", String(128), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("started", String(32), nullable=False),
    Column("host", String(64), nullable=False),
    Column("renewals", BigInteger, nullable=False),
    Column("renewed_boot_s", Float, nullable=False),
    _ms("since_ms"),
)

environment = Table(
    "environment",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("kms_type", String(32), nullable=False),
    Column("state", String(16), nullable=False),
    Column("state_reason", Text),
    _ms("state_since_ms"),
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
)

tenant = Table(
    "tenant",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("home_environment_id", ForeignKey("environment.id"), nullable=False),
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
)

kek = Table(
    "kek",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("environment_id", ForeignKey("environment.id"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("label", String(64), nullable=False),
    Column("object_id", LargeBinary, nullable=False),
    Column("method", String(16)),
    Column("token_serial", String(64)),
    Column("canary_ciphertext", LargeBinary),
    Column("canary_sha256", LargeBinary),
    _ms("made_at_ms", nullable=True),
    # Of all that the proof about the KEK rests on: bit rot in it would look like a revocation.
    Column("made_sha256", LargeBinary),
    Column("attributes", Text),  # JSON: what else is known of the key in the HSM
    Column("rotated_to", String(64)),  # the KEK that its keys moved to while it worked
    Column("state", String(16), nullable=False),
    Column("state_reason", Text),
    _ms("state_since_ms"),
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
    Index("one_kek_version", "environment_id", "version", unique=True),
    # At most one KEK serves and at most one is on its way; they change places in one transaction.
    Index(
        "one_current_kek",
        "environment_id",
        unique=True,
        sqlite_where=text("state NOT IN ('pre-active', 'staged', 'deactivated', 'retired')"),
        postgresql_where=text("state NOT IN ('pre-active', 'staged', 'deactivated', 'retired')"),
    ),
    Index(
        "one_unfinished_kek",
        "environment_id",
        unique=True,
        sqlite_where=text("state IN ('pre-active', 'staged')"),
        postgresql_where=text("state IN ('pre-active', 'staged')"),
    ),
)

network_service = Table(
    "network_service",
    metadata,
    Column("id", String(127), primary_key=True),  # tenant/service
    Column("tenant_id", ForeignKey("tenant.id"), nullable=False),
    Column("name", String(63), nullable=False),
    Column("removed", Boolean, nullable=False),
    Column("rotate_after_days", Integer),  # NULL: the agent's setting; 0: never
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
)

key_ring = Table(
    "key_ring",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("tenant_id", ForeignKey("tenant.id"), nullable=False),
    Column("name", String(63), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("network_service_id", ForeignKey("network_service.id"), nullable=False),
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
    Index("one_ring", "network_service_id", "purpose", unique=True),
)

dek = Table(
    "dek",
    metadata,
    Column("id", String(32), primary_key=True),  # the key id in hex
    Column("tenant_id", ForeignKey("tenant.id"), nullable=False),
    Column("ring_id", ForeignKey("key_ring.id"), nullable=False),
    Column("owner_environment_id", ForeignKey("environment.id"), nullable=False),
    Column("generator_environment_id", ForeignKey("environment.id"), nullable=False),
    Column("key_type", String(16), nullable=False),
    Column("alg", String(16)),  # of a signing key
    Column("version", Integer, nullable=False),
    Column("state", String(16), nullable=False),
    Column("state_reason", Text),
    _ms("state_since_ms"),
    _ms("activated_at_ms", nullable=True),
    Column("suspended_from", String(16)),  # where `resume` leads
    # An envelope with a higher sequence carries this key.
    Column("after_sequence", BigInteger, nullable=False, server_default="0"),
    Column("kcv", LargeBinary, nullable=False),
    Column("predecessor_id", ForeignKey("dek.id")),
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
    Index("one_dek_version", "ring_id", "version", unique=True),
    Index(
        "one_active",
        "tenant_id",
        "ring_id",
        "owner_environment_id",
        unique=True,
        sqlite_where=text("state = 'active'"),
        postgresql_where=text("state = 'active'"),
    ),
)

dek_wrap = Table(
    "dek_wrap",
    metadata,
    Column("dek_id", ForeignKey("dek.id"), primary_key=True),
    Column("kek_id", ForeignKey("kek.id"), primary_key=True),
    Column("format", Integer, nullable=False),
    Column("route", String(16), nullable=False),
    Column("wrap_alg", String(16), nullable=False),
    Column("wrapped", LargeBinary, nullable=False),
    Column("wrapped_sha256", LargeBinary, nullable=False),  # finds bit rot without the HSM
    Column("token_serial", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    _ms("made_at_ms"),
    _ms("verified_at_ms"),
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
    Index("dek_wrap_by_kek", "kek_id"),
)

key_rotation = Table(
    "key_rotation",
    metadata,
    Column("id", String(32), primary_key=True),
    Column("ring_id", ForeignKey("key_ring.id"), nullable=False),
    Column("new_dek_id", ForeignKey("dek.id"), nullable=False),
    Column("old_dek_id", ForeignKey("dek.id")),
    Column("phase", String(16), nullable=False),
    Column("cause", String(16), nullable=False),
    # Who acknowledged a higher sequence has what the phase is about.
    Column("after_sequence", BigInteger, nullable=False),
    _ms("phase_since_ms"),
    _ms("phase_until_ms"),
    Column("late_proxies", Text),  # JSON: who had not acknowledged when the phase ended
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
    Index(
        "one_open_rotation",
        "ring_id",
        unique=True,
        sqlite_where=text("phase IN ('distributing', 'activated')"),
        postgresql_where=text("phase IN ('distributing', 'activated')"),
    ),
)

proxy = Table(
    "proxy",
    metadata,
    Column("id", String(63), primary_key=True),
    Column("url", Text, nullable=False),
    Column("ca_pem", Text, nullable=False),
    Column("removed", Boolean, nullable=False),
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
)

service_proxy = Table(
    "service_proxy",
    metadata,
    Column("network_service_id", ForeignKey("network_service.id"), primary_key=True),
    Column("proxy_id", ForeignKey("proxy.id"), primary_key=True),
    Column("certificate_pem", Text, nullable=False),
    # Keys no longer go there; the row stays until nothing can be held there any more.
    Column("withdrawn", Boolean, nullable=False),
    # What may be there: written before an envelope with keys leaves.
    Column("issued_sequence", BigInteger, nullable=False),
    _ms("issued_until_ms"),
    # The last receipt for keys, and the last one for a withdrawal.
    Column("accepted_sequence", BigInteger, nullable=False),
    _ms("accepted_at_ms", nullable=True),
    _ms("valid_until_ms", nullable=True),
    Column("withdrawn_sequence", BigInteger, nullable=False),
    _ms("withdrawn_at_ms", nullable=True),
    Column("error", Text),
    _ms("error_at_ms", nullable=True),
    _ms("created_at_ms"),
    _ms("updated_at_ms"),
)

push_sequence = Table(
    "push_sequence",
    metadata,
    Column("issuer", String(63), primary_key=True),
    Column("network_service_id", ForeignKey("network_service.id"), primary_key=True),
    Column("sequence", BigInteger, nullable=False),
)

shared_row = Table(  # environments/shared.py says what it means
    "shared_row",
    metadata,
    Column("kind", String(16), primary_key=True),
    Column("id", String(127), primary_key=True),
    Column("term", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("signer", String(127), nullable=False),
    Column("body", Text, nullable=False),
    Column("signature", String(128), nullable=False),
    Index("shared_row_by_epoch", "epoch"),
)

shared_seal = Table(
    "shared_seal",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),  # one row
    Column("term", BigInteger, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("signature", String(128), nullable=False),  # this agent's
    Column("head_signature", String(128), nullable=False),  # of who holds the term
)

env_ack = Table(  # this agent's own: who is known to have what
    "env_ack",
    metadata,
    Column("party", String(127), primary_key=True),
    Column("kind", String(16), primary_key=True),
    Column("epoch", BigInteger, nullable=False),
    _ms("acked_at_ms"),
    _ms("until_ms", nullable=True),
    Column("detail", Text),
)
