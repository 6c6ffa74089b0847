"""What a test gives to a `sealgate run` of its own: its directory, its ports, its configuration."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from proxy.tenants.directory import DirectoryStore
from runtime.clock import SystemClock
from tests.ports import free_port


@dataclass(frozen=True, slots=True)
class ConfiguredProxy:
    config: Path
    state: Path
    push_port: int
    health_port: int
    service_port: int
    """Of the encryption service if it has *dialects*; else free, for a listener of the caller's."""

    def store(self) -> DirectoryStore:
        return DirectoryStore.open(f"sqlite:///{self.state}/directory.db", self.state, clock=SystemClock())


def configured(
    home: Path,
    name: str,
    *,
    server: tuple[Path, Path],
    ca_file: Path,
    environment: str | None = None,
    dialects: Iterable[str] = (),
    reload_s: float | None = None,
) -> ConfiguredProxy:
    """A proxy called *name* in the new directory *home*. *server*: what its push listener shows to agents."""
    state = home / "state"
    state.mkdir(mode=0o700, parents=True)
    made = ConfiguredProxy(home / "sealgate.toml", state, free_port(), free_port(), free_port())
    sections = [
        f"""
        [proxy]
        id = "{name}"
        state_dir = "{state}"
        {"" if reload_s is None else f"reload_s = {reload_s}"}
        [push]
        host = "127.0.0.1"
        port = {made.push_port}
        certificate_file = "{server[0]}"
        key_file = "{server[1]}"
        [keys]
        wait_s = 0.1
        [engine]
        upstream_ca_file = "{ca_file}"
        drain_s = 1
        [health]
        port = {made.health_port}
        """
    ]
    if environment is not None:
        sections.append(f'[environment]\nname = "{environment}"\n')
    if dialects:
        sections.append(f"""
        [[encryption_service.listen]]
        host = "127.0.0.1"
        port = {made.service_port}
        plain = true
        dialects = [{", ".join(f'"{dialect}"' for dialect in dialects)}]
        """)
    made.config.write_text("".join(sections))
    return made
