"""Real key servers as the worker sees them, without a process in between, and KEKs there."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

from envelope.keys import NetworkService
from key_agent.sources.servers import keks
from key_agent.sources.servers.diagnosis import diagnose
from key_agent.sources.servers.kmip import Kmip
from key_agent.sources.servers.openbao import OpenBao
from key_agent.sources.servers.server import (
    CANARY_NAME,
    KeyServer,
)
from key_agent.sources.source import Kek, KekReference
from key_agent.sources.verdict import Verdict
from tests.key_agent.sources.conftest import REFERENCE
from tests.key_servers import BaoServer, KmipServer

NOW_S = 1_800_000_000
OWNER = NetworkService("acme", "s3")


@dataclass
class Subject:
    """A server, how to reach it, and its owner."""

    hand: BaoServer | KmipServer
    connect: Callable[[], KeyServer]


def of_bao(hand: BaoServer) -> Subject:
    def connect() -> KeyServer:
        return OpenBao(
            hand.url, lambda: hand.token_file.read_text().strip(), ca_file=hand.ca_file, timeout_s=2.0
        )

    return Subject(hand, connect)


def of_kmip(hand: KmipServer) -> Subject:
    def connect() -> KeyServer:
        return Kmip(
            "127.0.0.1",
            hand.port,
            canary_name=CANARY_NAME,
            ca_file=hand.ca_file,
            certificate_file=hand.certificate_file,
            key_file=hand.key_file,
            timeout_s=2.0,
        )

    return Subject(hand, connect)


def new_reference() -> KekReference:
    """Another name for each test: the servers live as long as the module's tests."""
    return replace(REFERENCE, object_id=b"sealgate-kek" + os.urandom(6))


def make_kek(server: KeyServer, reference: KekReference | None = None) -> Kek:
    return keks.create_kek(
        server, reference or new_reference(), None, None, replace_unfinished=False, now_ms=NOW_S * 1000
    )


def verdict_of(server: KeyServer, kek: Kek, now_s: float = NOW_S) -> Verdict:
    return diagnose(server, kek, now_s=now_s).verdict
