"""An NSS softokn database for tests: the second module, since one alone teaches its habits as the standard.

Its GCM encryption fails, so `kw` is negotiated; a failed operation stays alive in its session; its serial is
the same for everybody; its configuration comes as an argument of C_Initialize.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from key_agent.sources.pkcs11 import Pkcs11Settings
from key_agent.sources.source import KekReference
from tests.softhsm import in_another_process

LABEL = "NSS Certificate DB"
PIN = "nss password 12"
MODULES = [
    Path(f"/usr/lib/{os.uname().machine}-linux-gnu/libsoftokn3.so"),
    Path(f"/usr/lib/{os.uname().machine}-linux-gnu/nss/libsoftokn3.so"),
]
MISSING = "NSS softokn is not installed (apt-get install libnss3)"
WRAP_AND_UNWRAP = 0x60000
"""CKF_WRAP | CKF_UNWRAP: what a KEK of method `kw` may do."""


@dataclass
class Nss:
    module: Path
    directory: Path

    @classmethod
    def create(cls, directory: Path) -> "Nss | None":
        """A database with a password and a PIN file; None where NSS is not installed."""
        module = next((path for path in MODULES if path.exists()), None)
        if module is None:
            return None
        directory.mkdir(mode=0o700)
        pin_file = directory / "pin"
        pin_file.touch(mode=0o600)
        pin_file.write_text(PIN)
        nss = cls(module, directory)
        nss._run("init-nss", {})
        return nss

    @property
    def arguments(self) -> str:
        return f"configdir='sql:{self.directory}'"

    def run(self, action: str, reference: KekReference, **arguments: Any) -> Any:
        """Do *action* of tests/softhsm.py in another process."""
        name = {"label": reference.label, "id": reference.object_id.hex()}
        return self._run(action, name | arguments)

    def _run(self, action: str, request: dict[str, Any]) -> Any:
        access = {
            "module": str(self.module),
            "module_arguments": self.arguments,
            "token": LABEL,
            "pin": PIN,
        }
        return in_another_process(action, access | request, {})

    def settings(self) -> Pkcs11Settings:
        return Pkcs11Settings(
            module_path=self.module,
            module_arguments=self.arguments,
            token_label=LABEL,
            pin_file=self.directory / "pin",
            request_timeout_s=30.0,
            start_timeout_s=60.0,
        )
