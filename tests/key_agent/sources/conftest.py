"""A SoftHSM2 token, a source over it, and the misbehaving module of fake_module.c."""

import shutil
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.keys import KeyState, NetworkService
from key_agent.sources.key_server import KeyServerSource, KmipSettings, OpenBaoSettings
from key_agent.sources.pkcs11 import Pkcs11Source
from key_agent.sources.source import EnvelopeRequest, KekReference, NewKey, Recipient, WrappedKey
from key_agent.sources.worker_source import WorkerSource
from tests.key_servers import BaoServer, KmipServer, running
from tests.nss import MISSING, Nss
from tests.pki import ServiceCredential, Tenant, write_credential
from tests.softhsm import SoftHsm

AGENT = "hq"
NONCE = b"challenge-of-16b"
MakeSource = Callable[..., Pkcs11Source]

REFERENCE = KekReference(
    kek_id="kek-1", label="sealgate-kek", object_id=b"sealgate-kek\0\0\0\1", environment_id="env-1"
)

ANOTHER_REFERENCE = KekReference(
    kek_id="kek-2", label="sealgate-kek", object_id=b"sealgate-kek\0\0\0\2", environment_id="env-1"
)


@dataclass(frozen=True)
class Kind:
    """What somebody with other tools has to know of a KEK of one method."""

    opening: str
    """The attribute that disables it."""
    capabilities: int
    """PKCS#11 mechanism flags: ENCRYPT 0x100, DECRYPT 0x200, WRAP 0x20000, UNWRAP 0x40000, DERIVE 0x80000."""
    object_class: str = "SECRET_KEY"
    key_type: str = "AES"
    function: str = "C_Decrypt"
    """The function that opens."""

    @property
    def where(self) -> dict[str, str]:
        return {"class": self.object_class}

    @property
    def make(self) -> dict[str, Any]:
        return {"type": self.key_type, "capabilities": self.capabilities}


KINDS = {
    "gcm": Kind("DECRYPT", 0x300),
    "gcm-in-place": Kind("DECRYPT", 0x300),
    "gcm-appended": Kind("DECRYPT", 0x300),
    "kw": Kind("UNWRAP", 0x60000, function="C_UnwrapKey"),
    "cbc+hmac": Kind("DECRYPT", 0x300),
    "rsa-oaep-256": Kind("DECRYPT", 0x300, "PRIVATE_KEY", "RSA"),
    "rsa-oaep-1": Kind("DECRYPT", 0x300, "PRIVATE_KEY", "RSA"),
    "ecdh-es": Kind("DERIVE", 0x80000, "PRIVATE_KEY", "EC", "C_DeriveKey"),
}
SOFTHSM_METHODS = ["gcm", "kw", "cbc+hmac", "rsa-oaep-1", "ecdh-es"]


@pytest.fixture
def hsm(tmp_path: Path) -> SoftHsm:
    return SoftHsm.create(tmp_path / "hsm")


@pytest.fixture
def nss(tmp_path: Path) -> Nss:
    made = Nss.create(tmp_path / "nss")
    if made is None:
        pytest.skip(MISSING)
    return made


@dataclass
class FakeModule:
    """The misbehaving module over a SoftHSM2 token: faults are set here, in the test's process."""

    hsm: SoftHsm
    library: Path

    @property
    def _faults(self) -> Path:
        return self.hsm.directory / "faults"

    def settings(self, **changes: Any) -> Any:
        environment = {
            **self.hsm.environment,
            "FAKE_HSM": str(self.hsm.directory),
            "FAKE_HSM_MODULE": str(self.hsm.module),
        }
        return self.hsm.settings(**({"module_path": self.library, "environment": environment} | changes))

    def be(self, *modes: str) -> None:
        """From now on the HSM is like that."""
        (self.hsm.directory / "modes").write_text("\n".join(modes))

    def fail(self, **faults: str) -> None:
        """From now on *function* does so: `fail(C_Decrypt="hang")`."""
        new = self._faults.with_suffix(".new")
        new.write_text("".join(f"{function} {fault}\n" for function, fault in faults.items()))
        new.replace(self._faults)

    def recover(self) -> None:
        self._faults.unlink(missing_ok=True)

    @property
    def is_armed(self) -> bool:
        return self._faults.exists()

    @property
    def logins(self) -> int:
        """Attempts that reached the token."""
        path = self.hsm.directory / "logins"
        return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: the misbehaving PKCS#11 module cannot be built (apt-get install gcc)")
    library = tmp_path_factory.mktemp("fake-module") / "libfakehsm.so"
    source = Path(__file__).with_name("fake_module.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True, timeout=60
    )
    return library


@pytest.fixture
def fake(hsm: SoftHsm, fake_library: Path) -> FakeModule:
    return FakeModule(hsm, fake_library)


@pytest.fixture
async def make_source(hsm: SoftHsm, acme: Tenant) -> AsyncIterator[MakeSource]:
    """Sources over the token, or with `settings=` over anything else; closed at the end."""
    certificate_file, key_file = write_credential(acme.agent_signing(AGENT), hsm.directory, "signing")
    made: list[WorkerSource] = []

    def make(settings: Any = None, **changes: Any) -> Any:
        settings = settings or hsm.settings(**changes)
        kind = KeyServerSource if isinstance(settings, OpenBaoSettings | KmipSettings) else Pkcs11Source
        source = kind(settings, key_file, certificate_file, AGENT)
        made.append(source)
        return source

    yield make
    for source in made:
        await source.close()


@pytest.fixture(scope="session")
def openbao_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaoServer]:
    with running(BaoServer(tmp_path_factory.mktemp("openbao") / "server")) as server:
        yield server


@pytest.fixture(scope="session")
def kmip_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KmipServer]:
    with running(KmipServer(tmp_path_factory.mktemp("kmip") / "server")) as server:
        yield server


@pytest.fixture
def source(make_source: MakeSource) -> Pkcs11Source:
    return make_source()


def owners(count: int) -> list[NetworkService]:
    return [NetworkService("acme", f"service-{number}") for number in range(count)]


def new_keys(count: int) -> list[NewKey]:
    """One data key for each of `owners(count)`."""
    return [NewKey(owner=owner) for owner in owners(count)]


def request_for(
    keys: WrappedKey | list[WrappedKey],
    *recipients: ServiceCredential,
    state: KeyState = KeyState.ACTIVE,
    owner: NetworkService | None = None,
) -> EnvelopeRequest:
    """Those keys for proxies proxy-0, proxy-1 ..., issued at 1000 s."""
    keys = [keys] if isinstance(keys, WrappedKey) else keys
    return EnvelopeRequest(
        owner=owner or keys[0].owner,
        keys=tuple((key, state) for key in keys),
        recipients=tuple(
            Recipient(
                audience=f"proxy-{number}",
                nonce=NONCE,
                certificate_der=recipient.certificate.public_bytes(Encoding.DER),
                sequence=number + 1,
            )
            for number, recipient in enumerate(recipients)
        ),
        issued_at_s=1_800_000_000,
        expires_at_s=1_800_000_330,
    )
