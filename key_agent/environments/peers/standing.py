"""Whether an environment may serve at this moment: what the signed rows say of it, and how fresh they are.

1. Only an environment that is active or draining serves, and only while its registry lease runs
   (registry_lease.py): one that has not heard from the others acts as healing.
2. An agent that has just started and has heard nobody yet waits: it pushes nothing and takes nothing back.
   What the proxies hold ends by itself, since no key outlives the lease under which it was pushed.
3. A registry that was tampered with, or an own word that the environment is breached, withdraws at once; no
   manager is needed to be careful.
4. Without shared rows the environment is the only one, and serves.
"""

from dataclasses import dataclass
from typing import Final

from key_agent.consent import EnvironmentStanding
from key_agent.environments.shared.documents import EnvironmentBody
from key_agent.environments.shared.registry_lease import NEVER_S
from key_agent.environments.shared.shared_view import Shared

DEFAULT_LEASE_S: Final = 300


def lease_s_of(shared: Shared) -> int:
    """The registry lease of all environments, in seconds."""
    return DEFAULT_LEASE_S if shared.tenant is None else shared.tenant.registry_lease_s


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the agent acts on, and tells proxies and peers."""

    standing: EnvironmentStanding
    state: str
    """As the proxies are told: the signed state, or `healing` where the agent is more careful than that."""
    reason: str | None
    until_boot_s: float | None = None
    """End of the registry lease; None: there is none to end."""


def judge(
    own: EnvironmentBody | None,
    *,
    is_shared: bool,
    tampered: str | None,
    declared: str | None,
    proven_boot_s: float,
    was_proven: bool,
    lease_s: float,
    now_boot_s: float,
) -> Verdict:
    """*own*: the environment's row. *is_shared*: there is a set of environments. *tampered*, *declared*: why
    the agent itself says that it is not to be trusted. *was_proven*: since it started, once.
    """
    for reason in (tampered, declared):
        if reason is not None:
            return Verdict(EnvironmentStanding.WITHDRAWN, "healing", reason)
    if not is_shared:
        return Verdict(EnvironmentStanding.SERVES, "active", None)
    if own is None:
        return Verdict(EnvironmentStanding.WITHDRAWN, "provisioning", "it is none of the environments yet")
    if not own.state.pushes:
        return Verdict(EnvironmentStanding.WITHDRAWN, own.state, own.reason or f"it is {own.state}")
    until_boot_s = proven_boot_s + lease_s
    if proven_boot_s == NEVER_S and not was_proven:
        return Verdict(
            EnvironmentStanding.UNPROVEN, "healing", "no majority of the environments was heard yet"
        )
    if now_boot_s >= until_boot_s:
        return Verdict(
            EnvironmentStanding.WITHDRAWN,
            "healing",
            f"the registry lease of {lease_s:g} s is over: no majority of the environments was heard",
        )
    return Verdict(EnvironmentStanding.SERVES, own.state, own.reason, until_boot_s)
