"""What every demo stands on: what the audience sees, and the programs that run behind it.

1. Each step is verified on the real thing. Exit status 0 only if every step was.
2. What is printed behind `$` is what is run, so that it can be typed by hand.
3. Everything lives in one directory and ends with the demo.
"""

import contextlib
import itertools
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol

BIN: Final = Path(sys.executable).parent
SOFTHSM_MODULES: Final = (
    Path("/usr/lib/softhsm/libsofthsm2.so"),
    Path(f"/usr/lib/{os.uname().machine}-linux-gnu/softhsm/libsofthsm2.so"),
    Path("/usr/lib64/pkcs11/libsofthsm2.so"),
)
START_LIMIT_S: Final = 20.0


class DemoError(Exception):
    """A step that could not be carried out or verified."""


class Stage:
    """What the audience sees. Counts what was verified."""

    def __init__(self) -> None:
        self.verified = 0
        self._colour = sys.stdout.isatty()

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self._colour else text

    def act(self, text: str) -> None:
        print(f"\n{self._paint('1', text)}", flush=True)

    def command(self, words: Iterable[object], *, end: str = "") -> None:
        text = shlex.join(str(word).removeprefix(f"{BIN}/") for word in words)
        print(self._paint("2", f"  $ {text}{end}"), flush=True)

    def say(self, text: str) -> None:
        for line in text.splitlines():
            print(f"    {line}", flush=True)

    def verify(self, claim: str, holds: bool, *, seen: object = "") -> None:
        """DemoError, naming what was *seen*, unless *claim* holds."""
        if not holds:
            raise DemoError(f"not true: {claim}" + (f" (seen: {seen})" if seen != "" else ""))
        self.verified += 1
        print(f"  {self._paint('32', '✔')} {claim}", flush=True)


def free_ports(count: int) -> list[int]:
    """Different ports, below those from which the kernel serves outgoing connections."""
    found: list[int] = []
    for port in random.sample(range(15_000, 32_000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise DemoError(f"no {count} free ports between 15000 and 32000")


def wait_until(what: str, done: Callable[[], bool], *, limit_s: float) -> float:
    """Seconds it took until *done*; DemoError when *limit_s* is over."""
    begin = time.monotonic()
    while not done():
        if time.monotonic() - begin > limit_s:
            raise DemoError(f"{what}: not within {limit_s:g} s")
        time.sleep(0.05)
    return time.monotonic() - begin


def is_listening(port: int) -> bool:
    with contextlib.closing(socket.socket()) as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def softhsm_module() -> Path:
    """DemoError if SoftHSM2 is not installed."""
    for path in SOFTHSM_MODULES:
        if path.exists():
            return path
    raise DemoError("SoftHSM2's module was not found: apt-get install softhsm2")


class Programs:
    """Programs that a demo runs, to their end or in the background, from one directory."""

    def __init__(self, stage: Stage, home: Path, environment: Mapping[str, str]) -> None:
        """*environment*: of every program, besides PATH, HOME and LANG."""
        self.stage = stage
        self.home = home
        self.typed = ""
        """All command lines so far."""
        self._processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._environment = {
            "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
            "HOME": str(home),
            "LANG": "C.UTF-8",
            **({"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}),
            **environment,
        }

    def run(
        self, *words: object, show: bool = True, secret_environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """Run to the end. DemoError with what it said, unless it succeeds."""
        self.typed += shlex.join(map(str, words)) + "\n"
        if show:
            self.stage.command(words)
        result = self.attempt(*words, secret_environment=secret_environment)
        if result.returncode:
            said = (result.stderr + result.stdout).decode(errors="replace").strip()
            raise DemoError(f"{Path(str(words[0])).name} ended with status {result.returncode}:\n{said}")
        return result

    def attempt(
        self, *words: object, secret_environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [str(word) for word in words],
            env=self._environment | dict(secret_environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )

    def start(self, name: str, *words: object, environment: Mapping[str, str] | None = None) -> None:
        """Run in the background; its output goes to NAME.log."""
        self.stage.command(words, end=" &")
        log = (self.home / f"{name}.log").open("wb")
        process = subprocess.Popen(
            [str(word) for word in words],
            env=self._environment | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        self._processes.append((name, process))

    def wait_for(self, name: str, done: Callable[[], bool], *, limit_s: float = START_LIMIT_S) -> float:
        """As `wait_until`, and says at once if a process that should be running is not."""

        def check() -> bool:
            for process_name, process in self._processes:
                if process.poll() is not None:
                    tail = (self.home / f"{process_name}.log").read_text(errors="replace")[-2000:]
                    raise DemoError(f"{process_name} ended with status {process.returncode}:\n{tail}")
            return done()

        return wait_until(name, check, limit_s=limit_s)

    def make_token(self, label: str, pin_file: Path, *, environment: Mapping[str, str] | None = None) -> None:
        """A token of SoftHSM2's, with a user PIN that is drawn into *pin_file*, by a stock HSM tool."""
        pin_file.touch(mode=0o600)
        pin_file.write_text(secrets.token_hex(12))
        hidden = {"SO_PIN": secrets.token_hex(12), "PIN": pin_file.read_text(), **(environment or {})}
        tool = ("pkcs11-tool", "--module", softhsm_module())
        self.run(
            *tool, "--slot", self._free_slot(environment), "--init-token", "--label", label,
            "--so-pin", "env:SO_PIN", secret_environment=hidden,
        )  # fmt: skip
        self.run(
            *tool, "--token-label", label, "--login", "--login-type", "so", "--so-pin", "env:SO_PIN",
            "--init-pin", "--new-pin", "env:PIN", secret_environment=hidden,
        )  # fmt: skip

    def _free_slot(self, environment: Mapping[str, str] | None) -> str:
        """The id of SoftHSM2's slot whose token is not initialised yet."""
        listing = self.run(
            "pkcs11-tool", "--module", softhsm_module(), "--list-slots",
            show=False, secret_environment=environment,
        )  # fmt: skip
        for line, following in itertools.pairwise(listing.stdout.decode().splitlines()):
            if line.startswith("Slot ") and "uninitialized" in following:
                return line.split("(")[1].split(")")[0]
        raise DemoError("SoftHSM2 shows no free slot")

    def stop(self) -> None:
        for _name, process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for _name, process in reversed(self._processes):
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def home_directory(*, keep: bool) -> Iterator[Path]:
    home = Path(tempfile.mkdtemp(prefix="sealgate-demo-"))
    try:
        yield home
    finally:
        if keep:
            print(f"the demo's files stay in {home}", flush=True)
        else:
            shutil.rmtree(home, ignore_errors=True)


class Play(Protocol):
    """A demo."""

    def play(self) -> None:
        """All acts. DemoError at the first claim that does not hold."""

    def addresses(self) -> str:
        """What can be tried while it runs."""

    def stop(self) -> None:
        """End every program."""


def play(make: Callable[[Stage, Path], Play], *, keep: bool) -> int:
    """The whole of a demo; its exit status."""
    # What was started ends with the demo, however it is asked to end.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    stage = Stage()
    began = time.monotonic()
    with home_directory(keep=keep) as home:
        demo = make(stage, home)
        try:
            demo.play()
            stage.act(f"All {stage.verified} claims verified in {time.monotonic() - began:.0f} s.")
            if keep:
                stage.say("Running until Ctrl-C. To try:\n" + demo.addresses())
                with contextlib.suppress(KeyboardInterrupt):
                    signal.pause()
        except (DemoError, subprocess.TimeoutExpired) as error:
            print(
                f"\nThe demo failed after {stage.verified} verified claims.\n{error}",
                file=sys.stderr,
                flush=True,
            )
            kept = Path(tempfile.mkdtemp(prefix="sealgate-demo-logs-"))
            for log in home.glob("*.log"):
                shutil.copy(log, kept)
            print(f"  next: the processes' logs are in {kept}", file=sys.stderr, flush=True)
            return 1
        except KeyboardInterrupt:
            return 130
        finally:
            demo.stop()
    return 0
