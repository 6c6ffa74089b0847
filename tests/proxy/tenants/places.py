"""Where one test's directory is: SQLite, or a database of its own on the PostgreSQL server of the tests."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

import pytest
from cryptography import x509
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import make_url

from certs import pki
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.errors import DirectoryUnavailableError
from tests.fakes.clock import ManualClock
from tests.pki import Tenant

POSTGRES_URL = os.environ.get("SEALGATE_TEST_POSTGRES_URL", "")
BOTH = [
    "sqlite",
    pytest.param(
        "postgresql",
        marks=pytest.mark.skipif(
            not POSTGRES_URL, reason="SEALGATE_TEST_POSTGRES_URL names no PostgreSQL server"
        ),
    ),
]


@dataclass
class Place:
    url: str
    state_dir: Path
    clock: ManualClock

    def open(self, *, migrate: bool = True) -> DirectoryStore:
        return DirectoryStore.open(self.url, self.state_dir, clock=self.clock, migrate=migrate)

    def files(self) -> set[str]:
        return {
            str(path.relative_to(self.state_dir))
            for path in self.state_dir.rglob("*")
            if path.is_file() and path.suffix in {".key", ".pem"}
        }


def sign(tenant: Tenant, csr: x509.CertificateSigningRequest) -> x509.Certificate:
    return pki.sign_service_csr(
        tenant.root, csr, timedelta(days=3650), valid_from=datetime(2026, 1, 1, tzinfo=UTC)
    )


@contextmanager
def make_place(database: str, path: Path) -> Iterator[Place]:
    """An empty place in the directory *path*; what it has at the server goes again."""
    state_dir = path / "state"
    if database == "sqlite":
        yield Place(f"sqlite:///{state_dir / 'directory.db'}", state_dir, ManualClock())
        return
    name = f"sealgate_test_{secrets.token_hex(6)}"
    admin = create_engine(POSTGRES_URL, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    url = make_url(POSTGRES_URL).set(database=name).render_as_string(hide_password=False)
    try:
        yield Place(url, state_dir, ManualClock())
    finally:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


def never_answers(store: DirectoryStore) -> DirectoryStore:
    """*store*, whose database loses the connection after each commit, before it answers."""
    real = store._transaction

    @contextmanager
    def transaction(*arguments: Any) -> Iterator[Connection]:
        with real(*arguments) as connection:
            yield connection
        raise DirectoryUnavailableError("the connection was lost while it committed: it may have been kept")

    cast("Any", store)._transaction = transaction
    return store
