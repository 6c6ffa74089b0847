"""The administrator's commands, given in this process, and the two who approve.

ask, files = Commands(done := set()), administrators(tmp_path)
for name in files:
    await ask(a, "admin add", name, "--public-key", str(tmp_path / f"{name}.pub"))
approval = await approved(ask, a, files, "key-rescue", "inc-1", {"keys": [...], "until_ms": ...})
"""

import asyncio
import contextlib
import io
import json
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from key_agent import cli as agent_cli
from key_agent.environments.shared.approvals import AdminPrivateKey
from runtime import cli
from tests.environments.site import SiteEnvironment


class Commands:
    """Commands at one environment, and which were given."""

    def __init__(self, done: set[str]) -> None:
        self._done = done

    async def __call__(self, at: SiteEnvironment, command: str, *words: str, exit_code: int = 0) -> Any:
        """The command's document; with another *exit_code* its error. In this process: most take no time."""
        self._done.add(command)
        if command.startswith("keys reencrypt "):  # those keep the process they are in from being looked at
            return await at.command(*command.split(), *words, exit_code=exit_code)
        out, err = io.StringIO(), io.StringIO()
        line = ["--config", str(at.config), "--json", *command.split(), *words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = await asyncio.to_thread(cli.main, agent_cli.program, line)
        assert code == exit_code, (words, code, out.getvalue(), err.getvalue())
        return json.loads(out.getvalue()) if code == 0 else json.loads(err.getvalue())["error"]


def administrators(directory: Path) -> dict[str, Path]:
    keys: dict[str, AdminPrivateKey] = {
        "ann": ed25519.Ed25519PrivateKey.generate(),
        "bob": ec.generate_private_key(ec.SECP256R1()),
    }
    files = {}
    for name, key in keys.items():
        files[name] = directory / f"{name}.key"
        files[name].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        files[name].chmod(0o600)
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        (directory / f"{name}.pub").write_bytes(public)
    return files


async def approved(  # noqa: PLR0917 - as the command takes it
    ask: Commands,
    at: SiteEnvironment,
    files: dict[str, Path],
    action: str,
    subject: str,
    payload: dict[str, object],
) -> str:
    asked = await ask(at, "approval request", action, subject, "--payload", json.dumps(payload))
    for name, file in files.items():
        await ask(at, "approval sign", asked["approval"], "--admin", name, "--key", str(file), "--yes")
    return str(asked["approval"])
