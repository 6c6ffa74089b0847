"""What an administrator can ask of the agent: the same whether it runs (api.py) or not (app.py).

1. Commands that change something run one at a time. Only the taking back of keys does not wait for its turn.
2. Each leaves an audit event *before* it changes anything; if that cannot be written it is refused. Taking
   keys back is the exception: it happens first, whatever the disk says.
3. seal -> open again and compare (the source does) -> COMMIT -> push. What is not committed never reached a
   proxy.
4. Every command can be repeated: after a crash at any point the same command finishes the work.
5. Results are JSON-able; errors are RefusedChangeError (with `next_step`), KeySourceError, RegistryError.
"""

import asyncio
from typing import Final
from urllib.parse import urlsplit

import structlog

from envelope.certificates import fingerprint
from envelope.errors import FormatError, MisuseError
from envelope.keys import KeyState, KeyUse, NetworkService, SigningAlgorithm, check_name
from key_agent.environments.commands.incident_commands import IncidentCommands
from key_agent.environments.commands.membership_commands import MembershipCommands
from key_agent.environments.commands.policy_commands import PolicyCommands
from key_agent.environments.commands.promotion_commands import PromotionCommands
from key_agent.environments.commands.recovery_commands import RecoveryCommands
from key_agent.errors import KeyAgentError, KeySourceError
from key_agent.operations import survey
from key_agent.operations.backup import RESERVED_SERVICE, BackupCommands
from key_agent.operations.commands import DELIVERY_PATIENCE_S, Json
from key_agent.operations.kek_making import KekWish, make_kek, wish_of
from key_agent.operations.kek_rotation import KekRotation, give_up
from key_agent.operations.key_commands import KeyCommands
from key_agent.operations.restoration import Restoration
from key_agent.push.pusher import Outcome
from key_agent.push.recipients import leaf_sha256, read_chain
from key_agent.registry.model import Link, Proxy
from key_agent.registry.states import REVOKED_BY_COMMAND, KekState
from key_agent.registry.store import RefusedChangeError
from key_agent.rotation import hosts_of
from key_agent.sources.source import Kek, NewKey, Verdict
from runtime.audit import AuditUnavailableError

log = structlog.get_logger(__name__)

_WITHDRAWAL_PATIENCE_S: Final = 8.0
_LOOK_S: Final = 0.1


class Operations(
    KeyCommands,
    BackupCommands,
    MembershipCommands,
    PromotionCommands,
    RecoveryCommands,
    IncidentCommands,
    PolicyCommands,
):
    # The KEK.

    async def kek_create(
        self,
        *,
        kek_type: str | None = None,
        valid_days: int | None = None,
        hsm_label: str | None = None,
        hsm_id: str | None = None,
    ) -> Json:
        """The first KEK of this environment, made in the HSM; or, with label and id, one that is there."""
        wish = wish_of(kek_type=kek_type, valid_days=valid_days, hsm_label=hsm_label, hsm_id=hsm_id)
        async with self._one_at_a_time:
            current = await self._agent.registry.current_kek()
            if current is not None:
                raise RefusedChangeError(
                    f"there is a KEK already: {current.reference.kek_id} ({current.state})",
                    "`key-agent kek status` shows it; a revoked one is followed by `key-agent reinstate`",
                )
            return await self._make_kek("kek-create", wish)

    async def kek_status(self) -> Json:
        """The registry's word on the KEK, and a fresh look at it."""
        agent = self._agent
        row = await agent.registry.current_kek()
        if row is None or row.kek is None:
            return {"kek": None, "standing": agent.consent.standing, "diagnosis": None}
        diagnosis = await agent.source.diagnose(row.kek)
        agent.consent.observe(row.kek, diagnosis)
        older = [
            survey.kek_json(other) for other in await agent.registry.keks() if other.version != row.version
        ]
        return {
            "kek": survey.kek_json(row),
            "standing": agent.consent.standing,
            "diagnosis": {"verdict": diagnosis.verdict, "detail": diagnosis.detail},
            "older": older,
        }

    async def kek_revoke(self) -> Json:
        """Take every key back and destroy the KEK in the HSM: what its keys sealed becomes unreadable."""
        agent = self._agent
        # Before its turn: a command that hangs (HSM, disk, proxy) must not hold up the kill switch.
        self._take_back()
        async with self._one_at_a_time:
            # Once more: the command that was running may have made or restored a KEK.
            kek = self._take_back()
            agent.journal.note("kek-revoke", outcome="begun", kek=kek.reference.kek_id)
            problems: list[str] = []
            await asyncio.gather(
                self._destroy(kek, problems), agent.wait_for_withdrawals(timeout_s=_WITHDRAWAL_PATIENCE_S)
            )
            is_destroyed = not problems
            await self._mark(kek, destroyed=is_destroyed, problems=problems)
            return {
                "kek": kek.reference.kek_id,
                "destroyed": is_destroyed,
                "proxies": self._withdrawn_everywhere(),
                "problems": problems,
            }

    def _take_back(self) -> Kek:
        """Pushing stops and withdrawals leave, before anything that can hang or fail."""
        agent = self._agent
        # From memory: a registry that does not answer is no reason to keep the keys out there.
        if (kek := agent.consent.kek) is None:
            raise RefusedChangeError("there is no KEK", "nothing to revoke; `key-agent kek create` makes one")
        agent.consent.revoke(REVOKED_BY_COMMAND)
        agent.withdrawals.at_once()
        return kek

    async def _destroy(self, kek: Kek, problems: list[str]) -> None:
        try:
            await self._agent.source.destroy_kek(kek)
        except KeyAgentError as error:
            problems.append(f"destroy in the HSM: {error}")
        try:
            # A rotation of KEKs under way: there is a second one that opens the same keys.
            problems += await give_up(self._agent, REVOKED_BY_COMMAND)
        except KeyAgentError as error:
            problems.append(str(error))

    async def _mark(self, kek: Kek, *, destroyed: bool, problems: list[str]) -> None:
        registry, kek_id = self._agent.registry, kek.reference.kek_id
        try:
            row = await registry.current_kek()
            if row is not None and row.reference.kek_id == kek_id and (destroyed or not row.state.is_sticky):
                state = KekState.DESTROYED if destroyed else KekState.REVOKED
                await registry.set_kek_state(kek_id, state, REVOKED_BY_COMMAND, now_ms=self._agent.now_ms())
        except KeyAgentError as error:
            problems.append(str(error))
        try:
            await self._agent.journal.record(
                "kek-revoke",
                outcome="ok" if destroyed else "failed",
                kek=kek_id,
                problem="; ".join(problems) or None,
            )
        except AuditUnavailableError as error:
            problems.append(str(error))

    async def reinstate(
        self,
        *,
        restore: bool = False,
        kek_type: str | None = None,
        valid_days: int | None = None,
        hsm_label: str | None = None,
        hsm_id: str | None = None,
    ) -> Json:
        """After a revocation: a new KEK and new keys. With *restore* the old KEK, proven to be back, and the
        keys of earlier ones that are.
        """
        wish = wish_of(kek_type=kek_type, valid_days=valid_days, hsm_label=hsm_label, hsm_id=hsm_id)
        async with self._one_at_a_time:
            if restore:
                return await self._restore()
            row = await self._agent.registry.current_kek()
            if row is None or row.kek is None:
                raise RefusedChangeError("there never was a KEK", "`key-agent kek create` makes the first")
            if not row.state.is_withdrawn:
                raise RefusedChangeError(
                    f"the KEK {row.reference.kek_id} is {row.state}: nothing to reinstate",
                    "`key-agent status` shows what the proxies hold",
                )
            if (await self._agent.source.diagnose(row.kek)).verdict is Verdict.OK:
                raise RefusedChangeError(
                    f"the KEK {row.reference.kek_id} is in the HSM and works: a new one would leave what it "
                    "sealed unreadable",
                    "`key-agent reinstate --restore` uses it again; `key-agent kek revoke` destroys it first",
                )
            # Of a rotation that the revocation met halfway.
            if problems := await give_up(self._agent, f"{row.reference.kek_id} was revoked"):
                raise KeySourceError("; ".join(problems))
            return {"replaced": row.reference.kek_id, **await self._make_kek("kek-reinstate", wish)}

    async def restorable(self) -> Json:
        """What `reinstate --restore` would make readable, looked at now. Refused if that is nothing."""
        return (await Restoration(self._agent).plan()).as_json()

    async def _restore(self) -> Json:
        agent = self._agent
        restoration = Restoration(agent)
        plan = await restoration.plan()
        kek_id = plan.current.reference.kek_id
        if plan.restores_current:
            await agent.journal.record("kek-restore", outcome="begun", kek=kek_id, proof=plan.proof.detail)
            await agent.registry.set_kek_state(
                kek_id, KekState.ACTIVE, "restored by the administrator", now_ms=agent.now_ms()
            )
            await agent.reload(kek_changed=True)
            await agent.watch.look()
            await agent.journal.record("kek-restore", kek=kek_id)
        # Keys of earlier KEKs are in the other environments too, and come from there.
        earlier = [] if self._manager() is not None else await restoration.restore_earlier(plan)
        return {
            "kek": kek_id,
            "restored": plan.restores_current,
            "earlier": earlier,
            "proxies": await self._pushed(),
        }

    async def kek_rotate(
        self,
        *,
        kek_type: str | None = None,
        valid_days: int | None = None,
        hsm_label: str | None = None,
        hsm_id: str | None = None,
    ) -> Json:
        """All keys move to a new KEK while the old one works; then the old one is destroyed in the HSM."""
        wish = wish_of(kek_type=kek_type, valid_days=valid_days, hsm_label=hsm_label, hsm_id=hsm_id)
        async with self._one_at_a_time:
            return await KekRotation(self._agent).run(wish)

    async def _make_kek(self, action: str, wish: KekWish) -> Json:
        agent = self._agent
        kek = await make_kek(agent, action, wish)
        reference = kek.reference
        wanted = await self._wanted_anew()
        keys = await agent.source.generate(kek, wanted) if wanted else []
        await agent.registry.complete_kek(kek, keys, now_ms=agent.now_ms(), patience=agent.rotations.patience)
        await agent.reload(kek_changed=True)
        await agent.watch.look()
        agent.rotations.wake()
        await agent.journal.record(action, kek=reference.kek_id, method=kek.method, keys=len(keys))
        return {
            "kek": reference.kek_id,
            "label": reference.label,
            "method": kek.method,
            "token_serial": kek.token_serial,
            "new_keys": len(keys),
            "proxies": await self._pushed_twice(),
        }

    async def _wanted_anew(self) -> list[NewKey]:
        """A key for every service, and for every use that it had; none where other environments have them."""
        if self._manager() is not None:
            return []
        registry = self._agent.registry
        services = (await registry.book()).services
        found = {(owner, KeyUse.DATA): NewKey(owner=owner) for owner in services}
        for key in await registry.data_keys():
            if key.owner in services:
                found[key.owner, key.use] = NewKey(owner=key.owner, use=key.use, algorithm=key.algorithm)
        return list(found.values())

    async def _pushed_twice(self, proxies: list[str] | None = None) -> list[Json]:
        """New keys went out; where they need two phases, the second one too."""
        first = await self._pushed(proxies)
        if not first or not await self._agent.registry.open_rotations():
            return first
        await self._carried_on(
            [rotation.id for rotation in await self._agent.registry.open_rotations()], first
        )
        return first

    # Network services.

    async def service_add(
        self,
        *,
        service: str,
        proxy: str,
        certificate_pem: str,
        use: str = KeyUse.DATA,
        algorithm: str | None = None,
    ) -> Json:
        """Provision a network service at a proxy; its first key is made, committed and pushed."""
        async with self._one_at_a_time:
            agent = self._agent
            owner = self._owner(service)
            if owner.service == RESERVED_SERVICE:
                raise RefusedChangeError(
                    f"{RESERVED_SERVICE} names the keys of backups", "choose another name"
                )
            leaf = agent.recipients.check(owner, certificate_pem, now_s=agent.clock.wall_s())
            if proxy not in agent.targets.fed() and (
                proxy not in agent.targets.proxies or agent.targets.proxies[proxy].removed
            ):
                raise RefusedChangeError(f"no proxy {proxy!r}", "`key-agent proxy add` adds it")
            kek = await self._usable_kek()
            new = _new_key(owner, use, algorithm)
            sha256 = fingerprint(leaf).hex()
            await agent.journal.record(
                "service-add", outcome="begun", service=str(owner), proxy=proxy, certificate_sha256=sha256
            )
            new_key = None
            if (manager := self._manager()) is not None:
                await manager.ensure_service(owner, new.use, new.algorithm)
            elif not await agent.registry.has_active_key(owner, new.use):
                (new_key,) = await agent.source.generate(kek, [new])
            await agent.registry.add_service(
                owner,
                proxy_id=proxy,
                certificate_pem=certificate_pem,
                key=new_key,
                now_ms=agent.now_ms(),
                patience=agent.rotations.patience,
            )
            await agent.reload()
            agent.rotations.wake()
            kid = None if new_key is None else str(new_key.key_id)
            hosts = hosts_of(agent.targets, {owner})
            if manager is not None and agent.is_running:
                # Its key seals once the proxies that host it have it, and this one has not been told yet.
                agent.refresh.at_once([proxy])
                await self._keys_arrive(owner)
            await agent.journal.record("service-add", service=str(owner), proxy=proxy, kid=kid)
            return {
                "service": str(owner),
                "proxy": proxy,
                "certificate_sha256": sha256,
                "new_key": kid,
                "proxies": await self._pushed_twice([proxy] if new_key is None else hosts),
            }

    async def _keys_arrive(self, owner: NetworkService) -> None:
        """Return when a key of *owner* seals here, or it takes too long: the manager goes on with it."""
        ends_s = self._agent.clock.boot_s() + DELIVERY_PATIENCE_S
        while self._agent.clock.boot_s() < ends_s:
            if any(key.state is KeyState.ACTIVE for key in await self._keys_of(owner)):
                return
            await self._agent.clock.sleep(_LOOK_S)

    async def service_remove(self, *, service: str, proxy: str | None = None) -> Json:
        """Take a network service from one proxy; or altogether, erasing its wrapped keys."""
        async with self._one_at_a_time:
            agent = self._agent
            owner = self._owner(service)
            await agent.journal.record("service-remove", outcome="begun", service=str(owner), proxy=proxy)
            manager = self._manager() if proxy is None else None
            if manager is not None:
                hosts = hosts_of(agent.targets, {owner})
                await manager.remove_service(owner)  # with its rows the places go, in every environment
            else:
                hosts = await agent.registry.remove_service(owner, proxy_id=proxy, now_ms=agent.now_ms())
            await agent.reload()
            await self._withdraw()
            await agent.journal.record("service-remove", service=str(owner), proxy=proxy)
            return {
                "service": str(owner),
                "removed_from": hosts,
                "keys_erased": proxy is None and manager is None,
                "proxies": self._withdrawn_everywhere(hosts),
            }

    async def service_list(self) -> Json:
        agent = self._agent
        keys = survey.by_owner(await agent.registry.data_keys())
        book = await agent.registry.book()
        links = survey.by_owner(book.links)
        ages = await agent.registry.rotate_after()
        return {
            "services": [
                {
                    "service": str(owner),
                    "rotate_after_days": ages.get(owner),
                    "keys": [
                        {
                            "kid": str(key.key_id),
                            "use": key.use,
                            "algorithm": key.algorithm,
                            "state": key.state,
                            "version": key.version,
                            "keks": key.wrapped_by,
                        }
                        for key in keys[owner]
                    ],
                    "proxies": [
                        {"proxy": link.proxy_id, "certificate_sha256": leaf_sha256(link.certificate_pem)}
                        for link in links[owner]
                        if not link.withdrawn
                    ],
                }
                for owner in book.services
            ]
        }

    # Proxies.

    async def proxy_add(self, *, proxy: str, url: str, ca_pem: str) -> Json:
        """Make a proxy known: where its push listener is and which authority vouches for it."""
        async with self._one_at_a_time:
            agent = self._agent
            check_name("proxy", proxy)
            _check_url(url)
            read_chain(ca_pem)
            await agent.journal.record("proxy-add", outcome="begun", proxy=proxy, url=url)
            is_new = await agent.registry.add_proxy(
                Proxy(id=proxy, url=url, ca_pem=ca_pem), now_ms=agent.now_ms()
            )
            await agent.reload()
            await agent.journal.record("proxy-add", proxy=proxy, url=url)
            if agent.is_running:
                agent.refresh.at_once([proxy])
            return {"proxy": proxy, "url": url, "new": is_new}

    async def proxy_remove(self, *, proxy: str) -> Json:
        """Take back every key it holds, and send it no more."""
        async with self._one_at_a_time:
            agent = self._agent
            await agent.journal.record("proxy-remove", outcome="begun", proxy=proxy)
            owners = await agent.registry.remove_proxy(proxy, now_ms=agent.now_ms())
            await agent.reload()
            await self._withdraw()
            await agent.journal.record("proxy-remove", proxy=proxy)
            return {
                "proxy": proxy,
                "services": [str(owner) for owner in owners],
                "proxies": self._withdrawn_everywhere([proxy]),
            }

    async def proxy_list(self) -> Json:
        book = await self._agent.registry.book()
        return {
            "proxies": [
                {
                    "proxy": proxy.id,
                    "url": proxy.url,
                    "services": [
                        str(link.owner)
                        for link in book.links
                        if link.proxy_id == proxy.id and not link.withdrawn
                    ],
                }
                for proxy in book.proxies.values()
                if not proxy.removed
            ]
        }

    # Looking.

    async def status(self) -> Json:
        """Who holds what until when, and whether the enterprise still consents."""
        return await survey.status(self._agent, environments=self.env_list, rotations=self._rotation_rows)

    async def diagnosis(self) -> Json:
        """For `doctor`: the source's own description, the KEK, and a session with every proxy."""
        return await survey.diagnosis(self._agent, kek=self.kek_status)

    # Shared by the above.

    async def _withdraw(self) -> None:
        self._agent.withdrawals.at_once()
        await self._agent.wait_for_withdrawals(timeout_s=_WITHDRAWAL_PATIENCE_S)

    def _withdrawn_everywhere(self, only: list[str] | None = None) -> list[Json]:
        """Per proxy: confirmed, or until when it may hold keys."""
        agent = self._agent
        now_ms = agent.now_ms()
        left: dict[str, int] = {}
        for link in agent.targets.links:
            if self._may_hold_keys(link, now_ms) and (link.withdrawn or agent.consent.is_withdrawn):
                left[link.proxy_id] = max(left.get(link.proxy_id, 0), link.silent_at_ms)
        names = sorted({link.proxy_id for link in agent.targets.links} if only is None else set(only))
        return [
            {
                "proxy": name,
                "outcome": Outcome.FAILED if name in left else Outcome.ACCEPTED,
                "may_hold_keys_until_ms": left.get(name),
                "error": self._withdrawal_error(name) if name in left else None,
            }
            for name in names
        ]

    def _withdrawal_error(self, proxy: str) -> str:
        seen = self._agent.withdrawals_seen.get(proxy)
        return (seen and seen.error) or f"no answer within {_WITHDRAWAL_PATIENCE_S:g} s"

    def _may_hold_keys(self, link: Link, now_ms: int) -> bool:
        return link.may_hold_keys(now_ms, self._agent.clock.boot_s())


def _new_key(owner: NetworkService, use: str, algorithm: str | None) -> NewKey:
    """RefusedChangeError if there is no such key."""
    try:
        return NewKey(owner=owner, use=KeyUse(use), algorithm=algorithm)
    except (MisuseError, ValueError):
        raise RefusedChangeError(
            f"no key has the use {use!r} and the algorithm {algorithm!r}",
            "`data` without an algorithm, or `sign` with one of " + ", ".join(SigningAlgorithm),
        ) from None


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    try:
        port_is_good = parts.port is None or 0 < parts.port < 65536
    except ValueError:
        port_is_good = False
    if parts.scheme != "https" or not parts.hostname or not port_is_good or parts.username is not None:
        raise FormatError(f"not the URL of a push listener: {url!r} (https://host:port is)")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise FormatError(f"{url!r}: only https://host:port, the paths are the protocol's")
