"""Private keys and certificates of the directory as files, below the state directory.

1. A file is written before the row that names it is committed, and removed after the row that did is gone, or
   once it is certain that the change was refused. A commit that was not answered may have been kept.
2. A crash between leaves a file that nobody uses (`sealgate doctor` lists it), never a row without its key.
"""

import contextlib
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

from cryptography import x509

from envelope.keys import NetworkService
from proxy.tenants import certificates
from proxy.tenants.errors import DirectoryUnavailableError


class NewFiles:
    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir
        self.written: list[Path] = []

    def private_key(self, name: str, key: certificates.PrivateKey) -> None:
        path = self._state_dir / name
        certificates.write_private_key(key, path)
        self.written.append(path)

    def certificate(self, name: str, certificate: x509.Certificate) -> None:
        path = self._state_dir / name
        certificates.write_new_file(path, certificates.certificate_pem(certificate), mode=0o600)
        self.written.append(path)


@contextlib.contextmanager
def new_files(state_dir: Path) -> Iterator[NewFiles]:
    """Files that go again if the change that names them is refused (rule 1)."""
    files = NewFiles(state_dir)
    try:
        yield files
    except DirectoryUnavailableError:
        raise  # it may have been kept
    except Exception:
        remove_files(files.written)
        raise


def key_name(owner: NetworkService) -> str:
    return f"keys/{owner.tenant}/{owner.service}-{secrets.token_hex(4)}.key"


def remove_files(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # nobody uses it any more; doctor lists what is left
            path.unlink(missing_ok=True)
