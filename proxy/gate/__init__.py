"""The default-deny gate below the addon: the only package that knows a private name of mitmproxy.

The addon permits (`permit`), everything else is refused by code without policy (`stream`, `handler`,
`http1`), without letting memory grow (`h2`) and fast enough (`levers`). Before the first listener opens:

    gate.check_versions()                  # UnknownEngineError: not the engine this was tested with
    gate.install()                         # once per process; again is no harm
    await gate.self_test()                 # SelfTestError: the gate does not hold
    gate.on_refused(master, audit_it)      # per Master
    gate.limit(master, Clients(limits))    # how many clients, how long

`install` replaces classes of mitmproxy for the whole process, nothing else here is global: engines may start
and stop after each other.
"""

import contextlib

from mitmproxy.proxy import mode_servers
from mitmproxy.proxy.layers import http, tls
from mitmproxy.proxy.layers.http import _http1

from proxy.gate import ends, h2, hello, levers
from proxy.gate.deadlines import Phase
from proxy.gate.handler import (
    Clients,
    GuardedConnectionHandler,
    OnRefused,
    abort_all_connections,
    hold_reading,
    limit,
    on_refused,
)
from proxy.gate.http1 import GuardedHttp1Client, GuardedHttp1Server, bad_message_response
from proxy.gate.levers import ALL, Lever, warmed_up
from proxy.gate.permit import (
    CLEAR,
    Clear,
    Collect,
    Grant,
    Permit,
    Piece,
    Shape,
    Transform,
    TransformError,
    permit,
)
from proxy.gate.pins import UnknownEngineError, check_versions
from proxy.gate.places import Refused
from proxy.gate.selftest import SelfTestError, self_test
from proxy.gate.stream import GuardedStream

__all__ = [
    "ALL",
    "CLEAR",
    "Clear",
    "Clients",
    "Collect",
    "Grant",
    "Lever",
    "OnRefused",
    "Permit",
    "Phase",
    "Piece",
    "Refused",
    "SelfTestError",
    "Shape",
    "Transform",
    "TransformError",
    "UnknownEngineError",
    "abort_all_connections",
    "check_versions",
    "hold_reading",
    "install",
    "limit",
    "on_refused",
    "permit",
    "self_test",
    "uninstall",
    "warmed_up",
]

_installed: contextlib.ExitStack | None = None


def install(
    *,
    http2_backpressure: bool = True,
    levers: frozenset[Lever] = ALL,
    reuse_port: bool = False,
    backlog: int = levers.BACKLOG,
) -> None:
    """Put the gate in place of mitmproxy's classes, for connections accepted from now on.

    Call it before a Master exists. A second call changes nothing: `uninstall` first for other arguments.
    *reuse_port* and *backlog* are those of listeners opened from now on.
    """
    global _installed  # noqa: PLW0603 - what it replaces is global as well
    if _installed is not None:
        return
    undo = contextlib.ExitStack()
    if http2_backpressure:
        undo.push(h2.install())
    undo.push(_pull(levers, reuse_port=reuse_port, backlog=backlog))
    for owner, name, ours in (
        (http, "HttpStream", GuardedStream),
        (http, "Http1Server", GuardedHttp1Server),
        (http, "Http1Client", GuardedHttp1Client),
        (_http1, "make_error_response", bad_message_response),
        (tls.TLSLayer, "receive_close", ends.receive_close),
        (tls.ClientTLSLayer, "receive_handshake_data", hello.receive_handshake_data),
        (mode_servers, "ProxyConnectionHandler", GuardedConnectionHandler),
    ):
        undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, ours)
    _installed = undo


def uninstall() -> None:
    """Put mitmproxy's own classes back: for tests and comparisons. They fail open."""
    global _installed  # noqa: PLW0603
    if _installed is not None:
        _installed.close()
        _installed = None


_pull = levers.install
