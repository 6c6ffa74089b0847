"""What an agent would send to another environment, and environments in a state of the test's choice."""

import msgspec

from key_agent.environments.keys.wrap_messages import Delivery, SealedKey
from key_agent.environments.shared.documents import Kind
from key_agent.environments.shared.draft import Draft
from key_agent.environments.states import EnvironmentState
from tests.environments.key_site import KeySite


async def put_state(site: KeySite, name: str, state: EnvironmentState) -> None:
    def change(draft: Draft) -> None:
        body = draft.shared.environments[name]
        draft.put(Kind.ENVIRONMENT, name, msgspec.structs.replace(body, state=state, incident_id="inc-1"))

    await site["a"].change(change)
    await site.in_step()


async def parcels_for(site: KeySite, name: str) -> Delivery:
    """What a sends there."""
    member = site["a"]
    to, kek = member.wraps.destination(name), await member.kek()
    held = await member.registry.wrapped_keys(kek.reference.kek_id)
    exported = await member.source.export_keys(kek, held, [to])
    return Delivery(
        environment=name,
        kek_id=to.kek_id,
        keys=tuple(
            SealedKey(key_id=str(parcel.key_id), route=parcel.route, sealed=parcel.sealed)
            for parcel in exported.parcels
        ),
    )
