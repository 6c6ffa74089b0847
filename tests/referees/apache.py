"""Apache 2.4 with mod_dav over TLS, by a settings file of its own: the strict referee of WebDAV."""

import asyncio
import contextlib
import os
import tempfile
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
    _directory: Path, certificate_file: Path, key_file: Path, *, slash: bool = True
) -> AsyncIterator[DavServer]:
    """*slash*: GET of a collection without its slash is redirected to the one with it.

    It lives in a directory of its own: pytest keeps those of tests for their owner alone, and its children
    are somebody else.
    """
    with tempfile.TemporaryDirectory(prefix="sealgate-apache-", ignore_cleanup_errors=True) as home:
        async with _serving(Path(home), certificate_file, key_file, slash=slash) as server:
            yield server


@contextlib.asynccontextmanager
async def _serving(
    home: Path, certificate_file: Path, key_file: Path, *, slash: bool
) -> AsyncIterator[DavServer]:
    root = home / "dav"
    root.mkdir()
    # Its children must not be root, and must write what is ours.
    user = "User www-data\nGroup www-data" if os.geteuid() == 0 else ""
    for writable in (home, root):
        writable.chmod(0o777)
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
