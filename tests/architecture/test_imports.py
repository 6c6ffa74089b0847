"""Arrows point one way, there is no cycle, and every outside library has its door."""

import subprocess
import sys
import textwrap
from collections.abc import Iterable, Mapping
from typing import Final

import pytest

from tests.architecture.tree import PACKAGES, ROOT, Module, is_or_below, modules, parse

MAY_IMPORT: Final[Mapping[str, set[str]]] = {
    "envelope": set(),
    "runtime": {"envelope"},
    "key_agent": {"runtime", "envelope"},
    "proxy": {"runtime", "envelope"},
}
# Rooms in the order in which they are built: none imports from a later one.
ROOMS: Final[Mapping[str, tuple[str, ...]]] = {
    "key_agent": ("operations", "command_line"),
    "key_agent.environments": ("shared", "peers", "changes", "keys", "incidents", "commands"),
    "proxy": ("messages", "plans", "bodies", "exchange", "command_line"),
}
# What is ours but not shipped: no product imports it.
FIRST_PARTY: Final = {*PACKAGES, "tests", "bench", "certs", "deploy"}

# An outside library -> where it may be imported. Everything else is free to all.
DOORS: Final[Mapping[str, tuple[str, ...]]] = {
    "mitmproxy": ("proxy.gate", "proxy.engine", "proxy.addon", "proxy.exchange", "proxy.interception"),
    "h2": ("proxy.gate",),
    "h11": ("proxy.gate",),
    # `key_agent.sources.hsm` is what runs inside worker_main's process.
    "pkcs11": ("key_agent.sources.worker_main", "key_agent.sources.hsm"),
    "key_agent.sources.hsm": ("key_agent.sources.worker_main", "key_agent.sources.hsm"),
    "key_agent.sources.worker_main": (),
    # The same for key servers: what sees key material is in the worker.
    "kmip": ("key_agent.sources.servers",),
    "key_agent.sources.servers": ("key_agent.sources.server_worker_main", "key_agent.sources.servers"),
    "key_agent.sources.server_worker_main": (),
    "alembic": ("runtime.database", "key_agent.registry", "proxy.tenants"),
    "sqlalchemy": (
        "runtime.database",
        "key_agent.registry",
        "key_agent.environments.changes.founding",
        "key_agent.environments.shared.projection",
        "key_agent.environments.shared.shared",
        "key_agent.environments.shared.shared_tables",
        "proxy.tenants",
        "proxy.uploads",
    ),
    "typer": (
        "runtime.cli",
        "runtime.audit_command",
        "key_agent.command_line.backup_cli",
        "key_agent.cli",
        "key_agent.command_line.kek_cli",
        "key_agent.command_line.key_cli",
        "key_agent.command_line.performing",
        "key_agent.command_line.proxy_cli",
        "key_agent.command_line.reinstating_cli",
        "key_agent.command_line.service_cli",
        "key_agent.command_line.status_cli",
        "key_agent.environments.commands.approval_cli",
        "key_agent.environments.commands.cli",
        "key_agent.environments.commands.healing_cli",
        "key_agent.environments.commands.recovery_cli",
        "key_agent.environments.commands.incident_cli",
        "key_agent.environments.commands.old_keys_cli",
        "key_agent.load_balancing.cli",
        "proxy.cli",
        "proxy.command_line.errors_cli",
        "proxy.command_line.inspect_cli",
        "proxy.command_line.network_service_cli",
        "proxy.command_line.operating",
        "proxy.command_line.profile_cli",
        "proxy.command_line.tenant_cli",
        "proxy.encryption_service.credential_cli",
        "proxy.encryption_service.dialect_cli",
        "proxy.encryption_service.key_cli",
        "proxy.encryption_service.provisioning",
        "proxy.users.cli",
        "proxy.vault.cli",
        "proxy.vault.azure_cli",
    ),
    "prometheus_client.REGISTRY": (),  # the global one; ours is runtime.observe's
    "structlog.configure": ("runtime.observe",),
}


def wrong_arrows(found: Iterable[Module]) -> list[str]:
    return [
        f"{module.path}:{line} imports {name}"
        for module in found
        for name, line in module.targets()
        if (top := name.split(".")[0]) in FIRST_PARTY
        and top != module.package
        and top not in MAY_IMPORT[module.package]
    ]


def room(name: str, house: str) -> int | None:
    """The number of the room of *house* that a module is in."""
    rooms = ROOMS[house]
    return next((at for at, name_ in enumerate(rooms) if is_or_below(name, f"{house}.{name_}")), None)


def upstairs(found: Iterable[Module]) -> list[str]:
    return [
        f"{module.path}:{line} imports {name}"
        for module in found
        for house in ROOMS
        if (own := room(module.name, house)) is not None
        for name, line in module.targets()
        if (other := room(name, house)) is not None and other > own
    ]


def cycles(found: Iterable[Module]) -> list[list[str]]:
    """Groups of modules that import each other (strongly connected components of more than one; Tarjan)."""
    listed = list(found)
    names = {module.name for module in listed}
    graph: dict[str, set[str]] = {}
    for module in listed:
        edges = set()
        for item in module.imports():
            # `from a import b` where a.b is a module depends on a.b, else on a.
            below = {f"{item.module}.{name}" for name in item.names}
            edges |= (below & names) or ({item.module} & names)
        graph[module.name] = edges - {module.name}
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in graph[node]:
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            group, stack[at:] = stack[at:], []
            if len(group) > 1:
                groups.append(sorted(group))

    for node in graph:
        if node not in index:
            visit(node)
    return groups


def through_the_wall(found: Iterable[Module]) -> list[str]:
    return [
        f"{module.path}:{line} imports {name}, which is for {', '.join(doors) or 'nobody'}"
        for module in found
        for name, line in module.targets()
        for library, doors in DOORS.items()
        if is_or_below(name, library) and not any(is_or_below(module.name, door) for door in doors)
    ]


def test_arrows_point_one_way() -> None:
    assert wrong_arrows(modules(*PACKAGES)) == []


def test_no_room_imports_from_a_later_one() -> None:
    assert upstairs(modules(*PACKAGES)) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("key_agent/environments/peers/a.py", "from key_agent.environments.keys.manager import Manager"),
        ("proxy/messages/a.py", "from proxy.plans import plan"),
        ("proxy/plans/a.py", "import proxy.bodies"),
    ],
)
def test_a_way_upstairs_is_found(path: str, text: str) -> None:
    assert upstairs([parse(path, text)]) != []


def test_there_is_no_cycle() -> None:
    assert cycles(modules(*PACKAGES)) == []


def test_every_library_has_its_door() -> None:
    assert through_the_wall(modules(*PACKAGES)) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("envelope/a.py", "import runtime.clock"),
        ("envelope/a.py", "def f():\n    from runtime import clock"),
        ("runtime/a.py", "from proxy.x import y"),
        ("runtime/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import key_agent"),
        ("key_agent/a.py", "import proxy"),
        ("proxy/a.py", "import key_agent.sources.source as s"),
        ("proxy/a/b.py", "from certs import pki"),
        ("proxy/a/b.py", "from tests.pki import make_tenant"),
    ],
)
def test_a_wrong_arrow_is_found(path: str, text: str) -> None:
    assert len(wrong_arrows([parse(path, text)])) >= 1


def test_right_arrows_are_not_found() -> None:
    text = "import proxy.b, envelope, runtime.x\nfrom . import c\nfrom .. import proxying\nimport keyagent"
    assert wrong_arrows([parse("proxy/a.py", text)]) == []


def test_a_cycle_is_found() -> None:
    ring = [
        parse("proxy/a.py", "from proxy import b"),
        parse("proxy/b.py", "import proxy.c"),
        parse("proxy/c.py", "def late():\n    from .a import thing"),
        parse("proxy/d.py", "import proxy.a"),
        parse("proxy/__init__.py", ""),
    ]
    assert cycles(ring) == [["proxy.a", "proxy.b", "proxy.c"]]
    assert cycles(ring[1:]) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("proxy/plans/planner.py", "from mitmproxy import http"),
        ("proxy/plans/planner.py", "import h2.connection"),
        ("key_agent/agent.py", "import pkcs11"),
        ("key_agent/sources/pkcs11.py", "from pkcs11 import Mechanism"),
        ("key_agent/sources/pkcs11.py", "from key_agent.sources import worker_main"),
        ("key_agent/sources/pkcs11.py", "from key_agent.sources.hsm import session"),
        ("proxy/addon.py", "from sqlalchemy import select"),
        ("proxy/metrics.py", "from prometheus_client import REGISTRY"),
    ],
)
def test_a_way_round_the_door_is_found(path: str, text: str) -> None:
    assert through_the_wall([parse(path, text)])


def test_the_doors_are_open() -> None:
    assert through_the_wall([parse("proxy/gate/h2.py", "import mitmproxy.proxy.layers\nimport h2")]) == []
    assert through_the_wall([parse("key_agent/sources/hsm/session.py", "import pkcs11")]) == []
    # A module of ours that is named like a library is not the library.
    assert (
        through_the_wall([parse("key_agent/app.py", "from key_agent.sources.pkcs11 import Pkcs11Source")])
        == []
    )


# --- what the imports do not show


BLOCKED: Final = """
    import importlib, pkgutil, sys

    class Blocked:
        '''An installation without the other half's libraries.'''
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {blocked}:
                raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

    sys.meta_path.insert(0, Blocked())
    count = 0
    for package in {packages}:
        root = importlib.import_module(package)
        for found in pkgutil.walk_packages(root.__path__, package + "."):
            if found.name.endswith(".migrations.env"):
                continue  # alembic runs it, in its own context
            importlib.import_module(found.name)
            count += 1
    print(count)
"""


def import_all(packages: set[str], blocked: set[str]) -> subprocess.CompletedProcess[str]:
    program = textwrap.dedent(BLOCKED).format(packages=sorted(packages), blocked=blocked)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_the_agent_runs_without_the_proxys_libraries() -> None:
    done = import_all(
        {"envelope", "runtime", "key_agent"},
        {
            "mitmproxy",
            "mitmproxy_rs",
            "cachetools",
            "h2",
            "h11",
            "OpenSSL",
            "proxy",
            "tests",
            "certs",
            "bench",
        },
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_the_proxy_runs_without_the_agents_libraries() -> None:
    done = import_all({"envelope", "runtime", "proxy"}, {"pkcs11", "key_agent", "tests", "certs", "bench"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_the_block_blocks() -> None:
    done = import_all({"envelope"}, {"cryptography"})
    assert done.returncode != 0
    assert "blocked: cryptography" in done.stderr
