"""Peers that a user would pick, and the origins that both sides share: Apache's WebDAV, rclone's crypt."""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.machine import OTHER_CORE, PROXY_CORE, BenchError, Process, free_port, serving
from bench.nginx import Tls

_REFEREES: Final = Path(__file__).parents[1] / ".venv-referees" / "bin"
_APACHE: Final = "/usr/sbin/apache2"
_MODULES: Final = Path("/usr/lib/apache2/modules")

_APACHE_SETTINGS = """
ServerRoot {directory}
PidFile {directory}/apache.pid
ErrorLog {directory}/error.log
LogLevel warn
Mutex file:{directory}
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
LoadModule ssl_module {modules}/mod_ssl.so
LoadModule dav_module {modules}/mod_dav.so
LoadModule dav_fs_module {modules}/mod_dav_fs.so
{user}
ServerName localhost
Listen 127.0.0.1:{port}
DocumentRoot {root}
DavLockDB {directory}/locks
SSLSessionCache none
MaxKeepAliveRequests 0
LimitRequestBody 0
SSLEngine on
SSLProtocol TLSv1.3
SSLCertificateFile {certificate}
SSLCertificateKeyFile {key}
<Directory {root}>
  Dav On
  Require all granted
</Directory>
"""


@contextlib.contextmanager
def apache_webdav(directory: Path, tls: Tls) -> Iterator[tuple[Process, Path]]:
    """Apache's mod_dav over TLS, and the directory where it stores."""
    if not Path(_APACHE).exists():
        raise BenchError("apache2 is missing: apt-get install apache2-bin")
    root = directory / "dav"
    root.mkdir(parents=True)
    port = free_port()
    # Its children must not be root, and must write what is ours.
    user = "User www-data\nGroup www-data" if os.geteuid() == 0 else ""
    for writable in (directory, root):
        writable.chmod(0o777)
    settings = directory / "apache.conf"
    settings.write_text(
        _APACHE_SETTINGS.format(
            directory=directory,
            modules=_MODULES,
            user=user,
            port=port,
            root=root,
            certificate=tls.certificate,
            key=tls.key,
        )
    )
    argv = [_APACHE, "-X" if not user else "-DFOREGROUND", "-f", str(settings)]
    with (
        (directory / "apache.log").open("wb") as log,
        serving("apache", argv, port=port, core=OTHER_CORE, log=log) as process,
    ):
        yield process, root


@contextlib.contextmanager
def rclone_crypt(directory: Path, tls: Tls, origin_port: int) -> Iterator[Process]:
    """`rclone serve webdav` over a crypt remote over the WebDAV origin: our two hops, by another product."""
    rclone = _REFEREES / "rclone"
    if not rclone.exists():
        raise BenchError("rclone is missing: make referees")
    directory.mkdir()
    obscured = subprocess.run(
        [str(rclone), "obscure", "-"],
        input=secrets.token_urlsafe(24),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    settings = directory / "rclone.conf"
    settings.write_text(
        f"[origin]\ntype = webdav\nurl = https://localhost:{origin_port}\nvendor = other\n\n"
        f"[crypt]\ntype = crypt\nremote = origin:\nfilename_encryption = off\n"
        f"directory_name_encryption = false\npassword = {obscured}\n"
    )
    port = free_port()
    argv = [
        str(rclone), "serve", "webdav", "crypt:", "--config", str(settings), "--ca-cert", str(tls.ca),
        "--addr", f"127.0.0.1:{port}", "--cert", str(tls.certificate), "--key", str(tls.key),
        "--dir-cache-time", "0", "--log-level", "ERROR",
    ]  # fmt: skip
    with (
        (directory / "rclone.log").open("wb") as log,
        serving("rclone", argv, port=port, core=PROXY_CORE, log=log) as process,
    ):
        yield process
