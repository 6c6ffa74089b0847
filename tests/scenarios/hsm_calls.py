"""What an environment asks of its HSM, call by call: OpenSC's spy stands between the agent and the module.

calls = HsmCalls(site["b"])     # before its agent is started
before = calls.counted()
...
asked = calls.counted() - before        # Counter({"C_DecryptInit": 3, ...})

The spy writes what it sees, PIN and keys included, into a file of mode 0600: no test that searches the files
for keys can use it.
"""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Final

from tests.environments.site import SiteEnvironment

SPY_CANDIDATES: Final = (
    Path(f"/usr/lib/{os.uname().machine}-linux-gnu/pkcs11-spy.so"),
    Path("/usr/lib64/pkcs11-spy.so"),
    Path("/usr/lib/pkcs11-spy.so"),
)
WRAPPING: Final = frozenset({"C_EncryptInit", "C_Encrypt", "C_EncryptUpdate", "C_EncryptFinal", "C_WrapKey"})
"""What puts a key under a KEK in the HSM."""
OPENING: Final = frozenset({"C_DecryptInit", "C_UnwrapKey", "C_DeriveKey"})
"""What opens one there, or agrees on the key that does: once for each."""


class HsmCalls:
    """Has the agent of *one* load the spy in its module's place, from its next start on."""

    def __init__(self, one: SiteEnvironment) -> None:
        self._file = one.directory / "hsm-calls"
        self._file.touch(mode=0o600)
        module = f'module_path = "{one.hsm.module}"'
        text = one.config.read_text()
        assert module in text
        watched = (
            f'module_path = "{find_spy()}"\nenvironment = {{ PKCS11SPY = "{one.hsm.module}", '
            f'PKCS11SPY_OUTPUT = "{self._file}" }}'
        )
        one.config.write_text(text.replace(module, watched))

    def counted(self) -> Counter[str]:
        """How often each function was called so far."""
        return Counter(re.findall(r"^\d+: (C_\w+)", self._file.read_text(errors="replace"), re.MULTILINE))


def find_spy() -> Path:
    """OpenSC's pkcs11-spy. Missing is a failure, never a skip."""
    for candidate in SPY_CANDIDATES:
        if candidate.exists():
            return candidate
    raise FileNotFoundError("pkcs11-spy.so is not installed: apt-get install opensc-pkcs11")
