"""The file that says where a store is: TOML, paths relative to it, secrets in files of their own.

[webdav]
store_url = "https://files.example.com/dav/"       the store itself
through_url = "https://files.acme.example/dav/"    the same, by way of the enterprise's proxy
store_ca_file = "store-ca.pem"
through_ca_file = "proxy-ca.pem"
user = "sealgate"
password_file = "password"                         mode 0600
"""

import tomllib
from pathlib import Path

import msgspec

from key_agent.reencryption.webdav import WebDavStore
from runtime.settings import SettingsError, read_secret_file


class _WebDav(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    store_url: str
    through_url: str
    store_ca_file: str
    through_ca_file: str
    user: str | None = None
    password_file: str | None = None
    timeout_s: float = 60.0


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    webdav: _WebDav


def read_store(file: Path) -> WebDavStore:
    """SettingsError names what is wrong."""
    try:
        found = msgspec.convert(tomllib.loads(file.read_text(encoding="utf-8")), _File, strict=False).webdav
    except OSError as error:
        raise SettingsError(str(file), "", allowed=f"cannot be read: {error.strerror}") from None
    except (ValueError, msgspec.ValidationError) as error:
        raise SettingsError(str(file), "", allowed=str(error)) from None
    here = file.parent
    password = None
    if found.password_file is not None:
        secret = read_secret_file(here / found.password_file)
        password = bytes(secret).decode("utf-8").rstrip("\n")
        secret[:] = bytes(len(secret))
    return WebDavStore(
        store_url=found.store_url,
        through_url=found.through_url,
        store_ca_file=here / found.store_ca_file,
        through_ca_file=here / found.through_ca_file,
        user=found.user,
        password=password,
        timeout_s=found.timeout_s,
    )
