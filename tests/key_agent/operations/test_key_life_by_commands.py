"""The life of keys as its administrator lives it: commands, a real agent process, SoftHSM2, TLS, SIGHUP."""

import json
import signal
import stat

from envelope.certificates import fingerprint
from envelope.keys import KeyState
from envelope.material import Signer
from tests.key_agent import test_agent_softhsm as rig
from tests.key_agent.test_agent_softhsm import AGENT_ID, S3, Site, until
from tests.pki import write_credential

site = rig.site


def _states(site: Site) -> dict[str, KeyState]:
    return {str(key.key_id): key.state for key in site.proxy.held[S3].claims.keys}


async def test_keys_rotate_end_and_are_backed_up(site: Site) -> None:
    await rig._init(site)
    await site.command("kek", "create", "--valid-days", "365")
    await rig._provision(site)
    backup = site.directory / "keys.backup"
    async with site.running():
        await until(lambda: site.proxy.valid_keys(S3))
        [old] = site.proxy.valid_keys(S3)
        rotated = await site.command("rotate", "s3")
        [row] = rotated["rotations"]
        assert (row["phase"], row["old_kid"]) == ("done", old)
        assert _states(site) == {old: KeyState.DEACTIVATED, row["new_kid"]: KeyState.ACTIVE}
        made = await site.command("backup", "export", str(backup))
        assert made["keys"] == 2
        assert stat.S_IMODE(backup.stat().st_mode) == 0o600
        asked = await site.command("key", "destroy", "s3", old, exit_code=3)
        assert asked["code"] == "not-confirmed"
        assert "version 1" in asked["cause"]
        await site.command("key", "destroy", "s3", old, "--confirm", old)
        assert _states(site)[old] is KeyState.DESTROYED
        tried = await site.command("backup", "import", str(backup), "--try")
        assert "stays destroyed" in tried["kept"][old]

        asked = await site.command("kek", "rotate", exit_code=3)
        assert asked["code"] == "not-confirmed"
        result = await site.command("kek", "rotate", "--yes")
        assert (result["moved"], result["retired"]) == (1, True)
        await site.command("key", "suspend", "s3", row["new_kid"])
        assert _states(site)[row["new_kid"]] is KeyState.SUSPENDED, "pushed from the new KEK"
        refused = await site.command("backup", "import", str(backup), exit_code=3)
        assert "kek_destroyed" in refused["cause"]
    audit = [json.loads(line) for line in (site.state_dir / "audit.jsonl").read_text().splitlines()]
    actions = {event["action"] for event in audit}
    assert {"key-rotate", "key-destroy", "kek-rotate", "kek-retire", "backup-export"} <= actions


async def test_own_certificates_are_renewed_by_sighup(site: Site) -> None:
    await rig._init(site)
    await site.command("kek", "create")
    await rig._provision(site)
    async with site.running() as process:
        await until(lambda: site.proxy.valid_keys(S3))
        signing, tls = site.tenant.agent_signing(AGENT_ID), site.tenant.agent_tls(AGENT_ID)
        files = site.directory / "key-agent"
        new = site.directory / "new"
        new.mkdir()
        write_credential(signing, new, "signing")
        write_credential(tls, new, "tls")
        for path in sorted(new.iterdir()):
            path.replace(files / path.name)
        site.proxy.signers = {fingerprint(signing.certificate): Signer(signing.certificate, AGENT_ID)}
        process.send_signal(signal.SIGHUP)
        await until(lambda: '"signing-certificate"' in (site.state_dir / "audit.jsonl").read_text())
        pushes = len(site.proxy.accepted)
        await site.command("rotate", "s3")
        assert len(site.proxy.accepted) > pushes, "signed by the new key"
        assert fingerprint(tls.certificate) in site.server.clients, "and the new one shown"
        revoked = await site.command("kek", "revoke", "--yes")
        assert revoked["destroyed"]
        assert not site.proxy.valid_keys(S3), "withdrawals too"
