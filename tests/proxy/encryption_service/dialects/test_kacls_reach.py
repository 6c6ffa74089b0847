from pathlib import Path
from typing import override

from proxy.encryption_service.dialects.kacls_reach import check_kacls
from proxy.encryption_service.model import DialectEntry, DialectName, KaclsSettings
from proxy.encryption_service.outbound import Outbound, outbound_context
from tests.ports import free_port
from tests.proxy.encryption_service.dialects.kacls_rig import GOOGLE, IDP, endpoint
from tests.proxy.encryption_service.dialects.kacls_site import Tls, issuers
from tests.proxy.encryption_service.token_mint import Mint


class Keyless(Mint):
    """An issuer that signs by something else."""

    @override
    def key_set(self) -> bytes:
        return b'{"keys":[{"kty":"EC","kid":"x"}]}'


async def test_each_key_set_is_asked_for(tmp_path: Path) -> None:
    keyless = Keyless("https://guests.example", "guests")
    tls = Tls(tmp_path)
    closed = f"https://localhost:{free_port()}/old"
    async with issuers(tls, IDP, GOOGLE, keyless) as where:
        place = endpoint(
            authentication_issuers=(where[IDP],),
            authorization_issuers=(where[GOOGLE],),
            guest_issuers=(where[keyless],),
            trusted_kacls=(closed,),
        )
        entry = DialectEntry(
            tenant="acme", dialect=DialectName.KACLS, settings=KaclsSettings(endpoints=(place,))
        )
        off = DialectEntry(tenant="globex", dialect=DialectName.KACLS, enabled=False, settings=entry.settings)
        context = outbound_context(tls.ca_file)
        async with Outbound(context, private_hosts=["localhost"]) as outbound:
            checks = {check.name: check for check in await check_kacls([entry, off], outbound)}
        outcomes = {
            name.removeprefix("kacls of acme: keys of "): check.outcome for name, check in checks.items()
        }
        assert outcomes == {
            IDP.issuer: "ok",
            GOOGLE.issuer: "ok",
            keyless.issuer: "warning",
            closed: "failed",
        }
        async with Outbound(context) as strict:
            (check, *_) = await check_kacls([entry], strict)
        assert check.outcome == "failed"
        assert "private_hosts" in str(check.mend)
