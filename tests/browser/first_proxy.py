"""A proxy in a process of its own, so that it can be killed: of the tenant and service that it is told of.

    python -m tests.browser.first_proxy DIRECTORY    < a Told, in JSON

It says `ready`, and then serves until it ends.
"""

import asyncio
import sys
from pathlib import Path

import msgspec
import pytest

from envelope.keys import KeyId, NetworkService
from proxy.tenants.model import CertificateFiles, LegacyPolicy, Listen, ServiceEntry, TenantEntry, Upstream
from tests import pki
from tests.browser.browser_site import only_the_proxy_resolves
from tests.integration.proxy_rig import proxy


class Told(msgspec.Struct, frozen=True):
    owner: str
    upstream: str
    options: dict[str, object]
    port: int
    ca_file: str
    """Of the application's certificate."""
    interception: tuple[str, str]
    """Files of the tenant's authority: certificate, key."""
    materials: dict[str, bytes]
    """By key id."""


async def serve(directory: Path, told: Told) -> None:
    owner = NetworkService.parse(told.owner)
    async with proxy(directory, Path(told.ca_file)) as rig:
        rig.tenants[owner.tenant] = TenantEntry(
            tenant=owner.tenant,
            root_certificate=pki.make_tenant(owner.tenant).root.certificate,
            forward_listen=Listen("127.0.0.1", told.port),
            tunnel_hosts=frozenset(),
            interception_ca=CertificateFiles(
                certificate_file=Path(told.interception[0]), key_file=Path(told.interception[1])
            ),
        )
        rig.services[owner] = ServiceEntry(
            owner=owner,
            upstream=Upstream.parse(told.upstream),
            profile="web",
            profile_options=told.options,
            legacy=LegacyPolicy.STRICT,
            reverse_listen=None,
            certificate=None,
            key_file=directory / "unused",
        )
        for key_id, material in told.materials.items():
            rig.push(owner, key_id=KeyId(bytes.fromhex(key_id)), material=material)
        await rig.engine.prepare()
        await rig.engine.start(rig.picture())
        sys.stdout.write("ready\n" if not rig.engine.problems else f"{rig.engine.problems}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


def main() -> None:
    with pytest.MonkeyPatch.context() as patches:
        only_the_proxy_resolves(patches)
        told = msgspec.json.decode(sys.stdin.buffer.read(), type=Told)
        asyncio.run(serve(Path(sys.argv[1]), told))


if __name__ == "__main__":
    main()
