"""KM is in the worker and nowhere else; the PIN is on no command line; the agent loads no vendor library."""

import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envelope.derive import ekm_binding
from envelope.keys import KeyId, NetworkService
from tests.key_agent.sources.conftest import REFERENCE
from tests.pki import Tenant, write_certificate, write_credential
from tests.softhsm import SoftHsm

ROOT = Path(__file__).parents[3]
AGENT = """
import asyncio, json, os, sys
from pathlib import Path
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from envelope.keys import KeyState
from key_agent.sources.pkcs11 import Pkcs11Source
from key_agent.sources.source import EnvelopeRequest, Recipient
from tests.key_agent.sources.conftest import REFERENCE, new_keys
from tests.softhsm import SoftHsm

async def main():
    directory = Path(sys.argv[1])
    marker = os.urandom(32)
    source = Pkcs11Source(
        SoftHsm(directory=directory).settings(), directory / "signing.key", directory / "signing.pem", "hq"
    )
    kek = await source.create_kek(REFERENCE)
    keys = await source.generate(kek, new_keys(1) * 20)
    certificate = x509.load_pem_x509_certificate((directory / "service.pem").read_bytes())
    recipient = Recipient(
        audience="proxy-0", nonce=None, certificate_der=certificate.public_bytes(Encoding.DER), sequence=1
    )
    request = EnvelopeRequest(
        owner=keys[0].owner,
        keys=tuple((key, KeyState.ACTIVE) for key in keys),
        recipients=(recipient,),
        issued_at_s=1_800_000_000,
        expires_at_s=1_800_000_330,
    )
    for _ in range(3):
        [result] = await source.seal_envelopes(kek, [request])
        assert result.tokens and not result.failed_keys, result
    assert (await source.diagnose(kek)).verdict == "ok"
    print("REPORT " + json.dumps({
        "worker": source.worker_pid,
        "marker": [byte ^ 0x55 for byte in marker],
        "vendor": [name for name in sys.modules if name.split(".")[0] == "pkcs11"],
        "maps": "softhsm" in Path("/proc/self/maps").read_text(),
        "keys": [
            {"kid": str(key.key_id), "owner": str(key.owner), "wrapped": key.wrapped.hex()} for key in keys
        ],
    }), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    assert marker
    await source.close()

asyncio.run(main())
"""


def memory(pid: int) -> Iterator[bytes]:
    """Every readable and writable mapping of the process, as it is now."""
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as mem:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            found = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if not found:
                continue
            start, stop = int(found[1], 16), int(found[2], 16)
            try:
                mem.seek(start)
                yield mem.read(stop - start)
            except (OSError, ValueError, OverflowError):
                continue  # [vvar] and the like


def spellings(secret: bytes) -> list[bytes]:
    return [
        secret,
        secret.hex().encode(),
        secret.hex().upper().encode(),
        base64.b64encode(secret)[:40],
        base64.urlsafe_b64encode(secret)[:40],
        secret[:16],
        secret[16:],
    ]


@pytest.fixture
def agent(hsm: SoftHsm, acme: Tenant) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """An agent that has just generated and sealed 20 keys, three times, and now waits."""
    write_credential(acme.agent_signing("hq"), hsm.directory, "signing")
    write_certificate(acme.service("service-0").certificate, hsm.directory / "service.pem")
    process = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(hsm.directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    with process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("REPORT "):
                report = json.loads(line.removeprefix("REPORT "))
                yield process, report
                break
        else:
            pytest.fail("".join(lines))
        process.communicate(timeout=60)


def learn(hsm: SoftHsm, report: dict[str, Any]) -> list[bytes]:
    """The KM of the report's first keys: opened by a third process, from the token."""
    learnt = []
    for key in report["keys"][:3]:
        binding = ekm_binding(
            NetworkService.parse(key["owner"]),
            KeyId.parse(key["kid"]),
            kek_id=REFERENCE.kek_id,
            environment_id=REFERENCE.environment_id,
        )
        arguments = {"wrapped": key["wrapped"], "binding": binding.hex()}
        learnt.append(bytes.fromhex(hsm.run("unwrap-gcm", REFERENCE, arguments=arguments)))
    return learnt


def test_no_byte_of_key_material_is_in_the_agents_memory(
    hsm: SoftHsm, agent: tuple[subprocess.Popen[str], dict[str, Any]]
) -> None:
    process, report = agent
    materials = learn(hsm, report)
    assert len({*materials}) == 3
    marker = bytes(byte ^ 0x55 for byte in report["marker"])
    wanted = [spelling for material in materials for spelling in spellings(material)]
    marker_seen = False
    for piece in memory(process.pid):
        marker_seen = marker_seen or marker in piece
        for spelling in wanted:
            assert spelling not in piece
    assert marker_seen, "the scan does not find what is there, so it proves nothing"


def test_neither_pin_nor_key_material_is_on_the_workers_command_line_or_in_its_environment(
    hsm: SoftHsm, agent: tuple[subprocess.Popen[str], dict[str, Any]]
) -> None:
    process, report = agent
    worker = Path(f"/proc/{report['worker']}")
    shown = (worker / "cmdline").read_bytes() + (worker / "environ").read_bytes()
    assert b"worker_main" in shown
    assert b"SOFTHSM2_CONF" in shown
    assert hsm.pin.encode() not in shown
    for material in learn(hsm, report):
        for spelling in spellings(material):
            assert spelling not in shown
    output, _ = process.communicate(timeout=60)  # with what the worker printed
    assert process.returncode == 0, output
    assert hsm.pin not in output
    for material in learn(hsm, report):
        assert material.hex() not in output
        assert base64.b64encode(material).decode()[:40] not in output


def test_the_worker_leaves_no_core_and_gets_no_stray_variable(
    agent: tuple[subprocess.Popen[str], dict[str, Any]],
) -> None:
    _, report = agent
    worker = Path(f"/proc/{report['worker']}")
    limits = (worker / "limits").read_text()
    assert re.search(r"Max core file size\s+0\s+0", limits)
    names = {item.partition(b"=")[0] for item in (worker / "environ").read_bytes().split(b"\0") if item}
    allowed = {b"PATH", b"HOME", b"LANG", b"LC_ALL", b"TZ", b"TMPDIR", b"SOFTHSM2_CONF", b"LC_CTYPE"}
    assert names <= allowed


def test_the_agent_loads_neither_the_wrapper_nor_the_module(
    agent: tuple[subprocess.Popen[str], dict[str, Any]],
) -> None:
    _, report = agent
    assert report["vendor"] == []
    assert report["maps"] is False


def test_one_door_to_the_hsm() -> None:
    """Only key_agent/sources/hsm and the worker's main import pkcs11; only the latter imports the former."""
    door = ROOT / "key_agent" / "sources" / "hsm"
    main = ROOT / "key_agent" / "sources" / "worker_main.py"
    for path in (ROOT / "key_agent").rglob("*.py"):
        text = path.read_text()
        inside = door in path.parents or path == main
        if re.search(r"^\s*(import|from) pkcs11\b", text, re.MULTILINE):
            assert inside, path
        if re.search(r"^\s*(import|from) key_agent\.sources\.(hsm|worker_main)\b", text, re.MULTILINE):
            assert inside, path
