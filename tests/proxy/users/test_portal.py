"""PAC file, CA download and page, over real HTTP; the PAC script is run by Node where there is one."""

import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from envelope.certificates import fingerprint
from envelope.keys import NetworkService
from proxy.tenants.directory import DirectoryStore
from proxy.tenants.model import Listen, Upstream
from proxy.tenants.network_service_store import add_service
from proxy.tenants.tenant_store import add_tenant, update_tenant
from proxy.tenants.user_store import set_access
from proxy.users.model import UserAccess
from proxy.users.portal import PAC_TYPE, make_portal, pac_script, proxies_of
from runtime.serve import serving
from tests.fakes.clock import ManualClock
from tests.pki import make_tenant

ACTOR = "tester"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DirectoryStore]:
    clock = ManualClock()
    store = DirectoryStore.open(f"sqlite:///{tmp_path}/directory.db", tmp_path, clock=clock)
    root = make_tenant("acme").root.certificate
    add_tenant(store, "acme", root, actor=ACTOR, forward_listen=Listen("127.0.0.1", 3128))
    upstream = Upstream.parse("https://Drive.example.com")
    add_service(store, NetworkService("acme", "drive"), upstream, actor=ACTOR)
    add_tenant(store, "hidden", make_tenant("hidden").root.certificate, actor=ACTOR)
    yield store
    store.close()


@pytest.fixture
async def portal(store: DirectoryStore) -> AsyncIterator[str]:
    async with serving(make_portal(store.snapshot), host="127.0.0.1", port=0) as port:
        yield f"http://127.0.0.1:{port}"


async def get(url: str) -> tuple[int, str, bytes]:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        assert answer.headers.get("Server") == "sealgate"
        if answer.status == 200:
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        return answer.status, answer.content_type, await answer.read()


async def test_the_pac_file(portal: str, store: DirectoryStore) -> None:
    status, kind, body = await get(f"{portal}/acme/proxy.pac")
    assert (status, kind) == (200, PAC_TYPE)
    assert b"PROXY 127.0.0.1:3128" in body
    assert b"drive.example.com" in body
    access = UserAccess(proxies=("one.example:3128", "two.example:3128"), proxies_speak_tls=True)
    set_access(store, "acme", access, actor=ACTOR)
    _, _, body = await get(f"{portal}/acme/proxy.pac")
    assert b"HTTPS one.example:3128; HTTPS two.example:3128" in body
    update_tenant(store, "acme", actor=ACTOR, forward_listen=Listen("0.0.0.0", 3128))
    set_access(store, "acme", UserAccess(), actor=ACTOR)
    status, _, body = await get(f"{portal}/acme/proxy.pac")
    assert (status, json.loads(body)["code"]) == (404, "no-address")


async def test_the_ca(portal: str, store: DirectoryStore) -> None:
    file = store.snapshot().tenants["acme"].interception_ca.certificate_file
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    assert (await get(f"{portal}/acme/ca.crt"))[1:] == (
        "application/x-x509-ca-cert",
        certificate.public_bytes(Encoding.DER),
    )
    _, _, pem = await get(f"{portal}/acme/ca.pem")
    assert x509.load_pem_x509_certificate(pem) == certificate
    assert b"PRIVATE" not in pem
    status, kind, page = await get(f"{portal}/acme/")
    assert (status, kind) == (200, "text/html")
    shown = page.replace(b":", b"").decode()
    assert fingerprint(certificate).hex().upper() in shown
    assert "drive.example.com" in page.decode()
    file.unlink()
    assert (await get(f"{portal}/acme/ca.crt"))[0] == 503


@pytest.mark.parametrize(
    "path",
    ["/", "/acme", "/globex/", "/hidden/proxy.pac", "/hidden/ca.crt", "/acme/ca.key", "/acme/../acme/x"],
)
async def test_what_is_not_there(portal: str, path: str) -> None:
    assert (await get(portal + path))[0] == 404


async def test_it_changes_nothing(portal: str) -> None:
    async with aiohttp.ClientSession() as session:
        for method in ("POST", "PUT", "DELETE"):
            async with session.request(method, f"{portal}/acme/proxy.pac", data=b"x") as answer:
                assert answer.status == 405


def test_an_address_of_everywhere_is_none(store: DirectoryStore) -> None:
    update_tenant(store, "acme", actor=ACTOR, forward_listen=Listen("::", 3128))
    assert proxies_of(store.snapshot().tenants["acme"]) == ()


NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="no node to run the PAC script with")
def test_managed_hosts_never_go_past_the_proxies() -> None:
    script = pac_script(["drive.example.com", "*.s3.example", "10.0.0.5"], ["a:1", "b:2"])
    hosts = {
        "drive.example.com": True,
        "DRIVE.example.com": True,
        "drive.example.com.": True,
        "bucket.s3.example": True,
        "a.b.S3.example.": True,
        "10.0.0.5": True,
        "s3.example": False,
        "xs3.example": False,
        "evil-drive.example.com": False,
        "drive.example.com.evil": False,
        "": False,
    }
    asked = script + "".join(
        f"console.log(FindProxyForURL('https://x/', {json.dumps(host)}));\n" for host in hosts
    )
    done = subprocess.run([NODE or "", "-"], input=asked, capture_output=True, text=True, check=True)
    answers = dict(zip(hosts, done.stdout.splitlines(), strict=True))
    assert answers == {
        host: "PROXY a:1; PROXY b:2" if managed else "DIRECT" for host, managed in hosts.items()
    }
