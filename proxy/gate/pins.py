"""The versions and the very functions of mitmproxy that the gate was read and tested against.

1. Another version of a package in VERSIONS: refuse to start.
2. Another source of anything in `pinned()`: refuse to start. The table is renewed by hand, function by
   function, after reading the difference (docs: mitmproxy upgrades); `python -m proxy.gate.pins` prints the
   present one. Sources are cut out of the files by their syntax tree, so it does not matter what has been
   replaced in memory meanwhile, and all supported Python versions agree.
3. What another package has replaced before us has another name and is not in the table: refuse to start.
"""

import ast
import hashlib
import importlib.metadata
import inspect
import sys
from functools import cache
from pathlib import Path
from typing import Any, Final

from h11._receivebuffer import ReceiveBuffer
from mitmproxy import addonmanager, flow
from mitmproxy.addons import next_layer, proxyserver
from mitmproxy.net.http import validate
from mitmproxy.net.http.http1 import assemble, read
from mitmproxy.proxy import commands, context, layer, mode_servers, server, tunnel, utils
from mitmproxy.proxy.layers import http, modes, tls
from mitmproxy.proxy.layers.http import _base, _events, _http1, _http2, _http_h2, _upstream_proxy

from proxy.gate import frames, h2, hello, levers
from proxy.gate.pinned import TABLE, VERSIONS

# What the gate itself replaces, subclasses, or whose order of events its rules lean on.
PINNED: Final[tuple[Any, ...]] = (
    http.HttpStream,
    http.HttpLayer,
    http.HttpClient,
    http.validate_request,
    _base.HttpConnection,
    _base.ReceiveHttp,
    _events.ErrorCode,
    _http1.Http1Connection,
    _http1.Http1Server,
    _http1.Http1Client,
    _http1.make_body_reader,
    _http1.make_error_response,
    _http1.should_make_pipe,
    _http2.Http2Connection,
    _http2.Http2Server,
    _http2.Http2Client,
    _http2.format_h2_request_headers,
    _http2.format_h2_response_headers,
    _http2.normalize_h1_headers,
    _http_h2.BufferedH2Connection,
    _upstream_proxy.HttpUpstreamProxy,
    layer.Layer,
    layer.NextLayer,
    tunnel.TunnelLayer,
    tls.TLSLayer,
    tls.ClientTLSLayer,
    tls.ServerTLSLayer,
    modes.HttpProxy,
    modes.HttpUpstreamProxy,
    modes.DestinationKnown,
    modes.ReverseProxy,
    modes.TransparentProxy,
    commands.StartHook,
    context.Context,
    utils.expect,
    server.ConnectionIO,
    server.TimeoutWatchdog,
    server.ConnectionHandler,
    server.LiveConnectionHandler,
    mode_servers.ProxyConnectionHandler,
    mode_servers.ServerInstance.handle_stream,
    mode_servers.AsyncioServerInstance,
    addonmanager.traverse,
    addonmanager.AddonManager.trigger,
    next_layer.NextLayer,
    proxyserver.Proxyserver.register_connection,
    flow.Flow.kill,
    flow.Flow.wait_for_resume,
    read.expected_http_body_size,
    read.read_request_head,
    read.read_response_head,
    read._read_headers,  # noqa: SLF001 - the pin is what makes leaning on it bearable
    read._read_request_line,  # noqa: SLF001
    ReceiveBuffer,
    read.connection_close,
    assemble.assemble_request_head,
    assemble.assemble_response_head,
    validate.parse_content_length,
    validate.parse_transfer_encoding,
    validate.validate_headers,
)


class UnknownEngineError(Exception):
    """The engine is not the one the gate was tested with."""

    def __init__(self, differences: list[str]) -> None:
        super().__init__("the gate was not tested with this mitmproxy: " + "; ".join(differences))
        self.differences = differences


def pinned() -> dict[str, Any]:
    """Name -> object of everything that is pinned, those of the modules beside this one included."""
    return {
        _name_of(thing): thing
        for thing in (*PINNED, *frames.PINNED, *h2.PINNED, *hello.PINNED, *levers.PINNED)
    }


def check_versions() -> None:
    """Compare versions and sources with the recorded ones; UnknownEngineError names every difference."""
    differences = [
        f"{package} {found} instead of {wanted}"
        for package, wanted in VERSIONS.items()
        if (found := importlib.metadata.version(package)) != wanted
    ]
    present = sources()
    for name in sorted(present.keys() | TABLE.keys()):
        if name not in present:
            differences.append(f"{name} is recorded but not pinned")
        elif name not in TABLE:
            differences.append(f"{name} is not recorded")
        elif present[name] != TABLE[name]:
            differences.append(f"{name} has another source")
    if differences:
        raise UnknownEngineError(differences)


def sources() -> dict[str, str]:
    """Name -> SHA-256 of the source of everything that is pinned."""
    return {name: _digest(name) for name in pinned()}


def _name_of(thing: Any) -> str:
    thing = inspect.unwrap(thing)
    return f"{thing.__module__}:{thing.__qualname__}"


def _digest(name: str) -> str:
    module, _, path = name.partition(":")
    if path not in (segments := _segments(module)):
        return "no such source"
    return hashlib.sha256(segments[path].encode()).hexdigest()


@cache
def _segments(module: str) -> dict[str, str]:
    """Qualified name -> source text of every class and function of *module*, decorators included."""
    file = sys.modules[module].__file__
    text = Path(file).read_text() if file else ""
    lines = text.splitlines()
    found: dict[str, str] = {}

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                found[prefix + child.name] = "\n".join(lines[first - 1 : child.end_lineno])
                if isinstance(child, ast.ClassDef):
                    walk(child, f"{prefix}{child.name}.")

    walk(ast.parse(text), "")
    return found


if __name__ == "__main__":
    print("\n".join(f'    "{name}": "{digest}",' for name, digest in sorted(sources().items())))  # noqa: T201
