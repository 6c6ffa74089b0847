"""One request to Azure Blob, as its plan is made: who asks, what for, and what the service may be sent.

1. Requests of our own go with what the client may and nothing of what it asks: of its `x-ms-*` fields only
   those that say who it is, by which lease, and with which key the service encrypts.
2. Their targets are the client's path and token, byte for byte, with parameters of ours.
"""

from dataclasses import dataclass
from typing import Final

from proxy.asking import Signer
from proxy.messages.message import Fields
from proxy.plans.request import Edits, Request
from proxy.profiles.azure_blob.addressing import Target
from proxy.profiles.azure_blob.routes import Operation

CONDITIONS: Final = ("if-match", "if-modified-since", "if-none-match", "if-unmodified-since")
_KEPT: Final = frozenset(
    {
        "x-ms-client-request-id",
        "x-ms-date",
        "x-ms-encryption-algorithm",
        "x-ms-encryption-key",
        "x-ms-encryption-key-sha256",
        "x-ms-encryption-scope",
        "x-ms-lease-id",
        "x-ms-version",
    }
)
_OF_THE_BLOB: Final = frozenset({"content-encoding", "content-language", "content-type", "cache-control"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """`edits`: those that this request, going on as it is, needs; the body's length is not among them."""

    request: Request
    operation: Operation
    target: Target
    edits: Edits
    sign: Signer

    @property
    def fields(self) -> Fields:
        return self.request.head.fields

    def asking_edits(self) -> Edits:
        """For plans that converse: what of the client's fields goes with requests of ours."""
        dropped = {name for name in self.fields if name.startswith("x-ms-") and name not in _KEPT}
        return self.edits.also(drop=dropped | _OF_THE_BLOB)

    def its_own_fields(self) -> list[tuple[str, str]]:
        """What `asking_edits` drops and the client's own request bears."""
        kept = self.asking_edits().drop - self.edits.drop
        return [(name, value) for name in self.fields if name in kept for value in self.fields.all(name)]
