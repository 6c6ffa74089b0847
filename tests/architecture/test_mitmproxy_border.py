"""The proxy's border with mitmproxy: private names only in proxy/gate, every hook guarded.

mitmproxy logs what a hook raises and forwards the flow as it is (docs/adr/0003): a hook that can let
something through must be guarded; which ones cannot, and why, is a table here.
"""

import ast
import importlib
from collections.abc import Iterable, Mapping
from typing import Final

import pytest

from tests.architecture.tree import Module, is_or_below, modules, parse

GATE: Final = "proxy.gate"
# mitmproxy documents its API by module; of `mitmproxy.proxy` only these belong to it.
PUBLIC_OF_PROXY: Final = (
    "mitmproxy.proxy.context",
    "mitmproxy.proxy.mode_specs",
    "mitmproxy.proxy.server_hooks",
    "mitmproxy.proxy.layers.quic",  # QuicTlsData, the argument of two documented hooks
)
GUARDS: Final = {"fail_closed"}
# (class, hook) -> why its failure lets nothing through.
HARMLESS: Final[Mapping[tuple[str, str], str]] = {
    ("SealgateAddon", "client_connected"): "without its entry every flow of the client is refused",
    ("SealgateAddon", "client_disconnected"): "book-keeping about a connection that has ended",
    ("SealgateAddon", "tls_clienthello"): "its first statement says not to pass the connection through",
    ("SealgateAddon", "error"): "book-keeping about a message that has ended",
    ("TenantTls", "load"): "at the start: the process ends",
    ("TenantTls", "configure"): "at the start and on a change of options: neither touches a flow",
    ("TenantTls", "running"): "at the start",
    ("TenantTls", "quic_start_client"): "raises: without settings QUIC is refused",
    ("TenantTls", "quic_start_server"): "raises: without settings QUIC is refused",
}


def hook_names() -> set[str]:
    """Every hook this mitmproxy knows, from itself."""
    for module in ("addonmanager", "proxy.layers", "proxy.server"):  # hooks register when defined
        importlib.import_module(f"mitmproxy.{module}")
    from mitmproxy.hooks import all_hooks

    return set(all_hooks) | {"load", "running", "configure", "done"}


def private_imports(found: Iterable[Module]) -> list[str]:
    wrong = []
    for module in found:
        if is_or_below(module.name, GATE):
            continue
        for item in module.imports():
            if not is_or_below(item.module, "mitmproxy"):
                continue
            names = [f"{item.module}.{name}" for name in item.names] or [item.module]
            wrong += [f"{module.path}:{item.line} imports {name}" for name in names if _is_private(name)]
    return wrong


def _is_private(name: str) -> bool:
    if any(part.startswith("_") for part in name.split(".")):
        return True
    return is_or_below(name, "mitmproxy.proxy") and not any(
        is_or_below(name, open_) for open_ in PUBLIC_OF_PROXY
    )


def private_attributes(found: Iterable[Module]) -> list[str]:
    """`x._name` on anything but self and cls, in modules that import mitmproxy outside the gate."""
    return [
        f"{module.path}:{node.lineno} uses .{node.attr}"
        for module in found
        if not is_or_below(module.name, GATE)
        and any(is_or_below(item.module, "mitmproxy") for item in module.imports())
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.endswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in {"self", "cls"})
    ]


def replaced_attributes(found: Iterable[Module]) -> list[str]:
    """`module.name = ...` on something imported from mitmproxy: a patch outside the gate."""
    wrong = []
    for module in found:
        if is_or_below(module.name, GATE):
            continue
        theirs = {
            alias.asname or alias.name.split(".")[0]
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if is_or_below(alias.name if isinstance(node, ast.Import) else node.module or "", "mitmproxy")
        }
        for node in ast.walk(module.tree):
            targets = (
                node.targets
                if isinstance(node, ast.Assign)
                else [node.target]
                if isinstance(node, ast.AugAssign | ast.AnnAssign)
                else []
            )
            for target in targets:
                root: ast.expr = target
                while isinstance(root, ast.Attribute):
                    root = root.value
                if root is not target and isinstance(root, ast.Name) and root.id in theirs:
                    wrong.append(f"{module.path}:{target.lineno} patches {ast.unparse(target)}")
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                first = node.args[0] if node.args else None
                while isinstance(first, ast.Attribute):
                    first = first.value
                if isinstance(first, ast.Name) and first.id in theirs:
                    wrong.append(f"{module.path}:{node.lineno} patches by setattr")
    return wrong


def unguarded_hooks(found: Iterable[Module], hooks: set[str]) -> list[str]:
    """Methods named like a hook, where mitmproxy is imported, neither guarded nor declared harmless."""
    wrong = []
    for module in found:
        if is_or_below(module.name, GATE) or not any(
            is_or_below(item.module, "mitmproxy") for item in module.imports()
        ):
            continue
        wrong += [
            f"{module.path}:{method.lineno} {owner.name}.{method.name}"
            for owner in ast.walk(module.tree)
            if isinstance(owner, ast.ClassDef)
            for method in owner.body
            if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
            and method.name in hooks
            and (owner.name, method.name) not in HARMLESS
            and not _is_guarded(method)
        ]
    return wrong


def _is_guarded(method: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """By a decorator, or by being one `try` that handles BaseException. A class method is nobody's hook."""
    decorators = {node.id for node in method.decorator_list if isinstance(node, ast.Name)}
    if not decorators.isdisjoint(GUARDS | {"classmethod"}):
        return True
    body = [
        node
        for node in method.body
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    ]
    return (
        len(body) == 1
        and isinstance(body[0], ast.Try)
        and any(
            handler.type is None
            or (isinstance(handler.type, ast.Name) and handler.type.id == "BaseException")
            for handler in body[0].handlers
        )
    )


def test_private_names_only_in_the_gate() -> None:
    found = modules("proxy")
    assert private_imports(found) == []
    assert private_attributes(found) == []


def test_patches_only_in_the_gate() -> None:
    assert replaced_attributes(modules("proxy")) == []


def test_every_hook_is_guarded() -> None:
    assert unguarded_hooks(modules("proxy"), hook_names()) == []


def test_what_is_declared_harmless_exists() -> None:
    existing = {
        (owner.name, method.name)
        for module in modules("proxy")
        for owner in ast.walk(module.tree)
        if isinstance(owner, ast.ClassDef)
        for method in owner.body
        if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert set(HARMLESS) - existing == set()


def test_pass_through_is_denied_first() -> None:
    """What HARMLESS says of tls_clienthello."""
    (module,) = [module for module in modules("proxy") if module.path == "proxy/addon.py"]
    (hook,) = [
        node
        for node in ast.walk(module.tree)
        if isinstance(node, ast.FunctionDef) and node.name == "tls_clienthello"
    ]
    first = next(node for node in hook.body if not isinstance(node, ast.Expr))
    assert ast.unparse(first) == "data.ignore_connection = False"


def test_mitmproxys_hooks_are_known() -> None:
    assert hook_names() >= {
        "requestheaders", "request", "responseheaders", "response", "error", "http_connect",
        "tls_clienthello", "tls_start_client", "tls_start_server", "server_connect", "client_connected",
        "tcp_message", "udp_message", "websocket_message", "dns_request",
    }  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "from mitmproxy.proxy.layers.http import _http1",
        "from mitmproxy.proxy import layers",
        "from mitmproxy.proxy.layers import http",
        "import mitmproxy.proxy.server",
        "from mitmproxy.proxy import mode_servers",
        "from mitmproxy import _internal",
        "def f():\n    from mitmproxy.http import _private",
    ],
)
def test_a_private_import_is_found(text: str) -> None:
    assert private_imports([parse("proxy/addon.py", text)])
    assert private_imports([parse("proxy/gate/h2.py", text)]) == []


def test_the_public_api_is_free() -> None:
    text = "from mitmproxy import http\nfrom mitmproxy.proxy import mode_specs\nimport mitmproxy.flow"
    assert private_imports([parse("proxy/addon.py", text)]) == []


def test_a_private_attribute_is_found() -> None:
    text = "from mitmproxy import http\ndef f(self, flow):\n    self._mine = flow._theirs"
    assert private_attributes([parse("proxy/addon.py", text)]) == ["proxy/addon.py:3 uses ._theirs"]


@pytest.mark.parametrize(
    "text",
    [
        "from mitmproxy.addons import proxyserver\nproxyserver.Proxyserver.x = 1",
        "import mitmproxy.http\nmitmproxy.http.Headers = 1",
        "from mitmproxy import http as h\nsetattr(h.HTTPFlow, 'kill', None)",
    ],
)
def test_a_patch_is_found(text: str) -> None:
    assert replaced_attributes([parse("proxy/engine.py", text)])
    assert replaced_attributes([parse("proxy/gate/levers.py", text)]) == []


TRY = """    def response(self, flow):
        '''text'''
        try:
            pass
        except {handled}:
            pass
"""


@pytest.mark.parametrize(
    "method",
    [
        "    def request(self, flow): pass",
        "    async def requestheaders(self, flow): pass",
        "    @other\n    async def requestheaders(self, flow): pass",
        TRY.format(handled="Exception"),
        TRY.format(handled="BaseException") + "        x()",
        "    def tcp_message(self, flow): pass",
    ],
)
def test_an_unguarded_hook_is_found(method: str) -> None:
    text = f"from mitmproxy import http\nclass Addon:\n{method}\n"
    assert unguarded_hooks([parse("proxy/x.py", text)], hook_names())


@pytest.mark.parametrize(
    "method",
    [
        "    @fail_closed\n    async def requestheaders(self, flow): pass",
        TRY.format(handled="BaseException"),
        "    def no_hook(self, flow): pass",
    ],
)
def test_a_guarded_hook_is_not_found(method: str) -> None:
    text = f"from mitmproxy import http\nclass Addon:\n{method}\n"
    assert unguarded_hooks([parse("proxy/x.py", text)], hook_names()) == []
