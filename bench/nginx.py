"""nginx as origin (WebDAV's PUT into memory) and as the peer that passes everything through, untuned."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.machine import OTHER_CORE, PROXY_CORE, BenchError, Process, free_port, serving

# Defaults otherwise: one worker, TLS and buffers as Debian ships them. What is set is named here: nothing is
# written to a disk or a log, bodies are not collected before they are passed on, connections are kept.
_COMMON = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_max_body_size 0;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi;
  scgi_temp_path {directory}/scgi;
  default_type application/octet-stream;
  keepalive_requests 100000000;
  ssl_protocols TLSv1.3;
  ssl_certificate {certificate};
  ssl_certificate_key {key};
"""
_ORIGIN = """
  server {{
    listen 127.0.0.1:{port} ssl {http2};
    root {root};
    location / {{ dav_methods PUT DELETE; create_full_put_path on; }}
  }}
}}
"""
_PASSING = """
  upstream origin {{ server 127.0.0.1:{origin_port}; keepalive 64; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} ssl http2;
    location / {{
      proxy_pass https://origin;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      proxy_request_buffering off;
      proxy_max_temp_file_size 0;
      proxy_ssl_protocols TLSv1.3;
      proxy_ssl_verify on;
      proxy_ssl_name localhost;
      proxy_ssl_trusted_certificate {ca};
    }}
  }}
}}
"""


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM: the CA that everybody trusts, and the certificate for `localhost` with its key."""

    ca: Path
    certificate: Path
    key: Path


def binary() -> str:
    found = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if found is None:
        raise BenchError("nginx is missing: apt-get install nginx-light")
    return found


@contextlib.contextmanager
def origin(directory: Path, tls: Tls, *, http2: bool = False) -> Iterator[tuple[Process, Path]]:
    """The origin and the directory whose files it serves and stores."""
    root = directory / "www"
    root.mkdir(parents=True)
    port = free_port()
    config = _ORIGIN.format(port=port, root=root, http2="http2" if http2 else "")
    with _running(directory, tls, config, port, OTHER_CORE) as process:
        yield process, root


@contextlib.contextmanager
def passing(directory: Path, tls: Tls, origin_port: int) -> Iterator[Process]:
    """nginx in the place of the proxy."""
    directory.mkdir()
    port = free_port()
    config = _PASSING.format(port=port, origin_port=origin_port, ca=tls.ca)
    with _running(directory, tls, config, port, PROXY_CORE) as process:
        yield process


@contextlib.contextmanager
def _running(directory: Path, tls: Tls, config: str, port: int, core: int) -> Iterator[Process]:
    file = directory / "nginx.conf"
    user = "user root;\n" if os.geteuid() == 0 else ""  # Its workers must read and write what is ours.
    file.write_text(
        user + _COMMON.format(directory=directory, certificate=tls.certificate, key=tls.key) + config
    )
    argv = [binary(), "-e", str(directory / "error.log"), "-c", str(file), "-p", str(directory)]
    with (
        (directory / "nginx.log").open("wb") as log,
        serving(directory.name, argv, port=port, core=core, log=log) as process,
    ):
        yield process
