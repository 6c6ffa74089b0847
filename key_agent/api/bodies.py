"""What each operation takes besides what stands in its path.

1. An unknown member is refused, and so is one of the wrong type.
2. Here is the shape alone; what may stand in it is the operation's to judge.
"""

from typing import Any

import msgspec


class Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arguments of an operation that do not stand in the path."""


class Nothing(Body, frozen=True, forbid_unknown_fields=True):
    pass


class NewKek(Body, frozen=True, forbid_unknown_fields=True):
    kek_type: str | None = None
    valid_days: int | None = None
    hsm_label: str | None = None
    hsm_id: str | None = None


class Reinstate(NewKek, frozen=True, forbid_unknown_fields=True):
    restore: bool = False


class ServiceAdd(Body, frozen=True, forbid_unknown_fields=True):
    proxy: str
    certificate_pem: str
    use: str = "data"
    algorithm: str | None = None


class ServiceSet(Body, frozen=True, forbid_unknown_fields=True):
    rotate_after_days: int | None


class EncryptPolicy(Body, frozen=True, forbid_unknown_fields=True):
    policy: str
    key: str | None = None
    home: str | None = None


class Reason(Body, frozen=True, forbid_unknown_fields=True):
    reason: str | None = None


class Destroy(Reason, frozen=True, forbid_unknown_fields=True):
    confirm: str = ""
    """The key id, once more."""


class IncidentOpen(Body, frozen=True, forbid_unknown_fields=True):
    environment: str
    kind: str
    reason: str
    since_ms: int | None = None
    keys: tuple[str, ...] = ()
    service: str | None = None
    keep_keys: bool = False
    idempotency_key: str | None = None
    by: str = ""


class Keys(Body, frozen=True, forbid_unknown_fields=True):
    keys: tuple[str, ...]


class ApprovedKeys(Body, frozen=True, forbid_unknown_fields=True):
    keys: tuple[str, ...]
    approval: str


class Rekey(Body, frozen=True, forbid_unknown_fields=True):
    generator: str | None = None


class Approved(Body, frozen=True, forbid_unknown_fields=True):
    approval: str


class Rescue(ApprovedKeys, frozen=True, forbid_unknown_fields=True, kw_only=True):
    incident: str
    until_ms: int


class Retire(ApprovedKeys, frozen=True, forbid_unknown_fields=True):
    accept_loss: bool = False


class ReencryptionBegin(Body, frozen=True, forbid_unknown_fields=True):
    connector: str
    service: str | None = None


class ReencryptionEnd(Body, frozen=True, forbid_unknown_fields=True):
    state: str
    rewritten: int
    failed: int


class Declare(Body, frozen=True, forbid_unknown_fields=True):
    reason: str


class HealComplete(Body, frozen=True, forbid_unknown_fields=True):
    attestation: str
    new_certificates: bool = False
    kek: str | None = None


class Rejoin(Body, frozen=True, forbid_unknown_fields=True):
    patience_s: float = 30.0


class AdminAdd(Body, frozen=True, forbid_unknown_fields=True):
    public_key_pem: str
    approval: str | None = None
    by: str = ""


class AdminRemove(Body, frozen=True, forbid_unknown_fields=True):
    approval: str | None = None
    by: str = ""


class ApprovalRequest(Body, frozen=True, forbid_unknown_fields=True):
    action: str
    subject: str
    payload: dict[str, Any]
    by: str = ""
    valid_s: int = 3600


class ApprovalSign(Body, frozen=True, forbid_unknown_fields=True):
    admin: str
    signature: str


class BackupImport(Body, frozen=True, forbid_unknown_fields=True):
    content_base64: str
    trial: bool = False


class Rotate(Body, frozen=True, forbid_unknown_fields=True):
    service: str | None = None
    everything: bool = False
    use: str | None = None


class ServiceRemove(Body, frozen=True, forbid_unknown_fields=True):
    proxy: str | None = None


class ProxyAdd(Body, frozen=True, forbid_unknown_fields=True):
    url: str
    ca_pem: str


class EnvInit(Body, frozen=True, forbid_unknown_fields=True):
    url: str
    region: str = ""
    geo: str = ""
    address: str = ""
    load_balancer_name: str = ""
    lease_s: int = 300


class EnvJoin(Body, frozen=True, forbid_unknown_fields=True):
    url: str
    manager_url: str
    manager_agent: str
    fingerprint: str
    region: str = ""
    geo: str = ""
    address: str = ""
    load_balancer_name: str = ""


class Fingerprint(Body, frozen=True, forbid_unknown_fields=True):
    fingerprint: str


class EnvRetire(Reason, frozen=True, forbid_unknown_fields=True):
    approval: str = ""


class Recovery(Body, frozen=True, forbid_unknown_fields=True):
    old_kek: str | None = None
    lost: bool = False


class Promotion(Body, frozen=True, forbid_unknown_fields=True):
    approval: str
    asked: dict[str, Any]
