"""Apache 2.4 with mod_dav over TLS, by a settings file of its own: the strict referee of WebDAV."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

from tests.ports import free_port
from tests.referees.tls_front import clean_environment, ended, listening
from tests.referees.wsgidav import DavServer

APACHE = "/usr/sbin/apache2"
MODULES = Path("/usr/lib/apache2/modules")

_SETTINGS = """\
ServerRoot {home}
PidFile {home}/apache.pid
ErrorLog {home}/error.log
LogLevel warn
Mutex file:{home}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule ssl_module {modules}/mod_ssl.so
LoadModule mime_module {modules}/mod_mime.so
LoadModule dir_module {modules}/mod_dir.so
LoadModule autoindex_module {modules}/mod_autoindex.so
LoadModule dav_module {modules}/mod_dav.so
LoadModule dav_fs_module {modules}/mod_dav_fs.so
LoadModule dav_lock_module {modules}/mod_dav_lock.so
{user}
ServerName localhost
Listen 127.0.0.1:{port}
DocumentRoot {root}
DirectoryIndex disabled
DirectorySlash {slash}
TypesConfig /etc/mime.types
DavLockDB {home}/locks
StartServers 1
SSLSessionCache none
MaxKeepAliveRequests 0
LimitRequestBody 0
SSLEngine on
SSLCertificateFile {certificate}
SSLCertificateKeyFile {key}
<Directory {root}>
  Dav On
  DavDepthInfinity On
  Options Indexes
  Require all granted
</Directory>
"""


@contextlib.asynccontextmanager
async def apache(
    directory: Path, certificate_file: Path, key_file: Path, *, slash: bool = True
) -> AsyncIterator[DavServer]:
    """*slash*: GET of a collection without its slash is redirected to the one with it."""
    home = directory / "apache"
    root = home / "dav"
    root.mkdir(parents=True)
    # Its children must not be root, and must write what is ours.
    user = "User www-data\nGroup www-data" if os.geteuid() == 0 else ""
    for writable in (home, root):
        writable.chmod(0o777)
    _let_through(home)
    port = free_port()
    settings = home / "apache.conf"
    settings.write_text(
        _SETTINGS.format(
            home=home,
            root=root,
            modules=MODULES,
            user=user,
            port=port,
            certificate=certificate_file,
            key=key_file,
            slash="On" if slash else "Off",
        ),
        encoding="ascii",
    )
    process = await asyncio.create_subprocess_exec(
        APACHE, "-DFOREGROUND", "-f", str(settings), env=clean_environment()
    )
    try:
        await listening(port, process)
        yield DavServer("apache", port, root)
    finally:
        await ended(process)


def _let_through(directory: Path) -> None:
    """pytest's directories are for their owner alone; the server's children pass through them."""
    if os.geteuid() != 0:
        return
    for parent in directory.parents:
        if parent.owner() == "root" and parent != Path("/") and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
