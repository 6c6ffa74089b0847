"""Whether a KACLS reaches those whose keys it needs, for `sealgate doctor`: key sets are fetched, no more."""

import asyncio
from collections.abc import Iterable, Mapping
from typing import Final

from proxy.encryption_service.dialects.kacls_endpoint import Kacls
from proxy.encryption_service.jwks import KeySetError, parse_key_set
from proxy.encryption_service.model import DialectEntry, KaclsSettings
from proxy.encryption_service.outbound import Outbound, OutboundError
from runtime.doctor import Check, failed, ok, warning

_MEND: Final = (
    "check jwks_url, route and firewall; a private authority belongs in encryption_service.outbound.ca_file, "
    "a host inside in encryption_service.outbound.private_hosts"
)


async def check_kacls(entries: Iterable[DialectEntry], outbound: Outbound) -> list[Check]:
    """One check for each key set that a KACLS which is switched on may need."""
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(_check(name, url, outbound), name=f"doctor:{name}")
            for name, url in sorted(_key_sets(entries).items())
        ]
    return [task.result() for task in tasks]


def _key_sets(entries: Iterable[DialectEntry]) -> Mapping[str, str]:
    """URL by what it is for."""
    found: dict[str, str] = {}
    for entry in entries:
        if not entry.enabled or not isinstance(entry.settings, KaclsSettings):
            continue
        for endpoint in entry.settings.endpoints:
            kacls = Kacls.of(entry, endpoint)
            for parties in (kacls.users, kacls.guests, kacls.authorization, kacls.sources):
                found |= {
                    f"kacls of {entry.tenant}: keys of {name}": issuer.jwks_url
                    for name, issuer in parties.items()
                    if name != kacls.url  # ours are in memory
                }
    return found


async def _check(name: str, url: str, outbound: Outbound) -> Check:
    try:
        keys = parse_key_set(await outbound.get(url))
    except (OutboundError, KeySetError) as error:
        return failed(name, f"{url}: {error}", _MEND)
    if not keys:
        return warning(name, f"{url} has no RSA key for RS256", "have the issuer sign by RS256")
    return ok(name, f"{len(keys)} at {url}")
