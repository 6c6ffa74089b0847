"""A real third-party storage server: WsgiDAV on cheroot over TLS, in a process of its own.

    python -m tests.integration.webdav_server ROOT CERTIFICATE KEY [PORT]

Prints its port when it listens. `ROOT` is what the service stores.
"""

import socket
import sys
from typing import Any

from cheroot import wsgi
from cheroot.ssl.builtin import BuiltinSSLAdapter
from wsgidav.fs_dav_provider import FilesystemProvider
from wsgidav.wsgidav_app import WsgiDAVApp


def main(root: str, certificate: str, key: str, port: str = "0") -> None:
    app: Any = WsgiDAVApp(
        {
            "provider_mapping": {"/": FilesystemProvider(root, readonly=False)},
            "simple_dc": {"user_mapping": {"*": True}},
            "http_authenticator": {"domain_controller": None},
            "property_manager": True,
            "lock_storage": True,
            "verbose": 0,
            "logging": {"enable": False},
        }
    )
    server = wsgi.Server(("127.0.0.1", int(port)), app, numthreads=8, timeout=30)
    server.ssl_adapter = BuiltinSSLAdapter(certificate, key)
    server.prepare()
    listening: socket.socket = server.socket
    print(listening.getsockname()[1], flush=True)
    server.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
