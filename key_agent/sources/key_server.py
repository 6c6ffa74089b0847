"""A key server as key source: OpenBao's transit engine, or KMIP (docs/key-servers.md).

1. As with an HSM, a worker process does the work; this one never sees KM, nor the server's credentials.
2. There is one KEK type, AES-256, and one wrap method for each kind of server.
"""

from pathlib import Path
from typing import override
from urllib.parse import urlsplit

from key_agent.errors import UnsupportedError
from key_agent.sources import wire
from key_agent.sources.pace import Pace
from key_agent.sources.source import KekType, WrapMethod
from key_agent.sources.worker import Worker
from key_agent.sources.worker_source import WorkerSettings, WorkerSource
from runtime.clock import Clock, SystemClock

WORKER_MODULE = "key_agent.sources.server_worker_main"


class _ServerSettings(WorkerSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    @property
    def call_timeout_s(self) -> float:
        """Of one call to the server: its failure is told before the worker is given up."""
        return self.request_timeout_s * 0.4


class OpenBaoSettings(_ServerSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[openbao]` section."""

    url: str
    """https://host:port"""
    token_file: Path
    """Readable by its owner only; read anew at each connection."""
    mount: str = "transit"
    namespace: str | None = None
    ca_file: Path | None = None
    """Default: the system's roots."""
    certificate_file: Path | None = None
    key_file: Path | None = None
    """A client certificate, where the server's listener wants one."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        address = urlsplit(self.url)
        if address.scheme != "https" or not address.hostname or address.username or address.query:
            raise ValueError(f"openbao.url must be https://host:port, not {self.url!r}")
        if not self.mount or self.mount.startswith("/") or self.mount.endswith("/"):
            raise ValueError(f"openbao.mount must have no slash at its ends, not {self.mount!r}")
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("openbao.certificate_file and openbao.key_file: give both or none")


class KmipSettings(_ServerSettings, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[kmip]` section."""

    host: str
    """As in the server's certificate."""
    port: int = 5696
    ca_file: Path
    certificate_file: Path
    key_file: Path
    """The client certificate is the agent's identity at the server."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.host or "/" in self.host:
            raise ValueError(f"kmip.host must be a host name or address, not {self.host!r}")
        if not 1 <= self.port <= 65535:
            raise ValueError("kmip.port must be between 1 and 65535")


type ServerSettings = OpenBaoSettings | KmipSettings


class KeyServerSource(WorkerSource):
    """*signing_key_file* and its certificate are read by the worker, anew for every batch."""

    def __init__(
        self,
        settings: ServerSettings,
        signing_key_file: Path | None = None,
        signing_certificate_file: Path | None = None,
        agent_id: str = "",
        *,
        clock: Clock | None = None,
    ) -> None:
        self._settings = settings
        self._signing_key_file = signing_key_file
        self._signing_certificate_file = signing_certificate_file
        self._agent_id = agent_id
        clock = clock or SystemClock()
        worker = Worker(
            self._hello,
            lambda _verdict: None,  # a login is refused as an outage: nothing locks there
            environment={},
            request_timeout_s=settings.request_timeout_s,
            start_timeout_s=settings.start_timeout_s,
            clock=clock,
            pace=Pace(settings.slow_after_s, of="the key server"),
            module=WORKER_MODULE,
            title="key server's worker",
        )
        super().__init__(worker, settings, clock)

    @override
    def _methods(self, kek_type: KekType | None) -> tuple[WrapMethod, ...]:
        if kek_type not in (None, KekType.AES_256):
            raise UnsupportedError(f"a key server's KEK is of type {KekType.AES_256}, not {kek_type}")
        return self._described_methods()

    @override
    def _described_methods(self) -> tuple[WrapMethod, ...]:
        is_kmip = isinstance(self._settings, KmipSettings)
        return (WrapMethod.CBC_HMAC if is_kmip else WrapMethod.TRANSIT,)

    def _hello(self) -> wire.Greeting:
        settings = self._settings
        if isinstance(settings, KmipSettings):
            return wire.KmipHello(
                host=settings.host,
                port=settings.port,
                ca_file=str(settings.ca_file.absolute()),
                certificate_file=str(settings.certificate_file.absolute()),
                key_file=str(settings.key_file.absolute()),
                timeout_s=settings.call_timeout_s,
                agent_id=self._agent_id,
                signing_key_file=_absolute(self._signing_key_file),
                signing_certificate_file=_absolute(self._signing_certificate_file),
            )
        return wire.OpenBaoHello(
            url=settings.url,
            mount=settings.mount,
            namespace=settings.namespace,
            token_file=str(settings.token_file.absolute()),
            ca_file=_absolute(settings.ca_file),
            certificate_file=_absolute(settings.certificate_file),
            key_file=_absolute(settings.key_file),
            timeout_s=settings.call_timeout_s,
            agent_id=self._agent_id,
            signing_key_file=_absolute(self._signing_key_file),
            signing_certificate_file=_absolute(self._signing_certificate_file),
        )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())
