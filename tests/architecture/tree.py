"""Reads source trees for the architecture tests; a rule is a function of them, so it can be shown to fail."""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PACKAGES: Final = ("envelope", "runtime", "key_agent", "proxy")


@dataclass(frozen=True, slots=True)
class Import:
    module: str  # as written, made absolute
    names: tuple[str, ...]  # of `from module import names`
    line: int


@dataclass(frozen=True, slots=True)
class Module:
    path: str  # relative to the root of the tree
    tree: ast.Module = field(repr=False)

    @property
    def name(self) -> str:
        parts = self.path.removesuffix(".py").split("/")
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def package(self) -> str:
        """The top-level package."""
        return self.path.split("/")[0]

    def imports(self) -> Iterator[Import]:
        """Every import, also inside functions and under TYPE_CHECKING."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(alias.name, (), node.lineno)
            elif isinstance(node, ast.ImportFrom):
                module = node.module or ""
                if node.level:
                    parts = self.path.removesuffix(".py").split("/")
                    base = parts[: len(parts) - node.level]
                    module = ".".join([*base, module] if module else base)
                yield Import(module, tuple(alias.name for alias in node.names), node.lineno)

    def targets(self) -> Iterator[tuple[str, int]]:
        """What each import may load, as dotted names with the line: `from a import b` may load a and a.b."""
        for found in self.imports():
            yield found.module, found.line
            for name in found.names:
                yield f"{found.module}.{name}", found.line


def parse(path: str, text: str) -> Module:
    return Module(path, ast.parse(text, filename=path))


def modules(*packages: str) -> list[Module]:
    """The Python files of *packages* in the repository."""
    return [module for package in packages for module in _modules(package)]


@functools.cache
def _modules(package: str) -> tuple[Module, ...]:
    paths = sorted((ROOT / package).rglob("*.py"))
    assert paths, f"no source below {package}"
    return tuple(parse(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in paths)


def is_or_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")
