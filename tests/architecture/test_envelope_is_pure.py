"""`envelope` is bytes in, bytes out: it knows no socket, no file, no clock, no library but cryptography."""

import ast
import sys
from collections.abc import Iterable
from typing import Final

import pytest

from tests.architecture.tree import Module, is_or_below, modules, parse

LIBRARIES: Final = {"envelope", "cryptography"}
# What overwrites secrets has to reach memory.
EXCUSED: Final = {("envelope/memory.py", "ctypes")}
# The standard library's ways to the outside.
IMPURE: Final = {
    "asyncio", "concurrent", "ctypes", "fcntl", "ftplib", "glob", "http", "io", "logging", "mmap", "pathlib",
    "multiprocessing", "pickle", "queue", "random", "sched", "select", "selectors", "shelve", "shutil",
    "signal", "smtplib", "socket", "socketserver", "sqlite3", "ssl", "subprocess", "sys", "tempfile",
    "threading", "time", "urllib", "zoneinfo",
}  # fmt: skip
IMPURE_CALLS: Final = {"open", "print", "input", "exec", "eval", "breakpoint"}
IMPURE_METHODS: Final = {"now", "utcnow", "today", "getLogger"}
OF_OS: Final = {"urandom"}


def impurities(found: Iterable[Module]) -> list[str]:
    wrong = []
    for module in found:
        for item in module.imports():
            top = item.module.split(".")[0]
            if (str(module.path), top) in EXCUSED:
                continue
            if top not in LIBRARIES and top not in sys.stdlib_module_names:
                wrong.append(f"{module.path}:{item.line} imports {item.module}")
            if top in IMPURE or (top == "os" and (item.module != "os" or not OF_OS.issuperset(item.names))):
                wrong.append(f"{module.path}:{item.line} imports {item.module}")
        wrong += [f"{module.path}:{line} {what}" for what, line in _acts(module.tree)]
    return wrong


def _acts(tree: ast.Module) -> Iterable[tuple[str, int]]:
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if name not in OF_OS:
                yield f"uses os.{name}", node.lineno
            case ast.Call(func=ast.Name(id=name)) if name in IMPURE_CALLS:
                yield f"calls {name}", node.lineno
            case ast.Call(func=ast.Attribute(attr=name)) if name in IMPURE_METHODS:
                yield f"calls .{name}()", node.lineno
            case ast.AsyncFunctionDef() | ast.Await():
                yield "is asynchronous", node.lineno


def test_envelope_is_pure() -> None:
    assert impurities(modules("envelope")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import socket",
        "import asyncio",
        "from time import time",
        "from pathlib import Path",
        "import urllib.request",
        "def f():\n    import ssl",
        "from os import open",
        "import os.path",
        "import os\nos.open('x', 0)",
        "import os\nos.environ['x']",
        "open('x')",
        "print(1)",
        "from datetime import datetime\ndatetime.now()",
        "async def f(): pass",
        "import structlog",
        "import msgspec",
        "import cryptographer",
        "import joserfc.jwe",
    ],
)
def test_an_impurity_is_found(text: str) -> None:
    assert impurities([parse("envelope/a.py", text)])


def test_purity_is_not_found() -> None:
    text = """
import os, json, hashlib
from datetime import UTC, datetime
from cryptography.hazmat.primitives import hashes
from envelope.keys import KeyId
os.urandom(16)
datetime.fromtimestamp(0, UTC)
"""
    assert impurities([parse("envelope/a.py", text)]) == []
    assert is_or_below("os.path", "os")
