"""A PostgreSQL server of the tests' own: `python -m tests.postgres COMMAND...` runs COMMAND beside it.

1. It lives in a temporary directory, listens on a Unix socket there alone, and ends with the command.
2. COMMAND finds it by SEALGATE_TEST_POSTGRES_URL; where that is set already, that server is used.
3. Test processes side by side (pytest-xdist) each have a database of their own there.
4. PostgreSQL refuses to run as root: then it runs as the user that Debian's package made.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

URL_VARIABLE = "SEALGATE_TEST_POSTGRES_URL"
SERVER_USER = "postgres"
_STATUS_LINE: Final = 7
"""Of postmaster.pid, counted from 0."""


def take_own_database() -> None:
    """In a test process of several: its own database, made at the first call, in place of the common one."""
    worker, url = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get(URL_VARIABLE)
    if worker is None or url is None:
        return
    common = make_url(url)
    own = common.set(database=f"{common.database}_{worker}")
    if common.database is None or common.database.endswith(f"_{worker}"):
        return  # taken already
    engine = create_engine(common, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        known = connection.scalars(text("SELECT datname FROM pg_database")).all()
        if own.database not in known:
            connection.execute(text(f'CREATE DATABASE "{own.database}"'))
    engine.dispose()
    os.environ[URL_VARIABLE] = own.render_as_string(hide_password=False)


def find_binaries() -> Path:
    """Where the newest server's programs are. FileNotFoundError, with the package to install."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise FileNotFoundError("no PostgreSQL server is installed: apt-get install postgresql")
    return found[-1].parent


class Cluster:
    """A server that can be stopped, killed and started again. *directory*, for its socket too, must exist."""

    def __init__(self, directory: Path, *, data: Path | None = None) -> None:
        self.directory = directory
        self._data = data or directory / "data"
        self._binaries = find_binaries()
        self._server: subprocess.Popen[bytes] | None = None
        self._conditions: dict[str, Any] = {
            "cwd": directory,
            "stdin": subprocess.DEVNULL,
            "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PGHOST": str(directory)},
        }
        user = pwd.getpwuid(os.geteuid())
        if user.pw_uid == 0:
            user = pwd.getpwnam(SERVER_USER)
            for place in {directory, self._data.parent}:
                os.chown(place, user.pw_uid, user.pw_gid)
            self._conditions |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://sealgate@/sealgate?host={self.directory}"

    def create(self, *words: str) -> None:
        """Make it, with an empty database `sealgate`; it runs then. *words* are for `initdb`."""
        self._run(
            "initdb",
            *("--pgdata", self._data, "--username", "sealgate", "--auth", "trust", "--no-sync"),
            *words,
        )
        self.start()
        self._run("createdb", "--username", "sealgate", "sealgate")

    def follow(self, primary: "Cluster") -> None:
        """Become a synchronous standby of *primary*, which runs; it runs then, and takes no writes."""
        self._run(
            "pg_basebackup",
            *("--pgdata", self._data, "--host", primary.directory, "--username", "sealgate"),
            *("--write-recovery-conf", "--checkpoint", "fast", "--no-sync"),
        )
        self.start()
        self._psql(primary, "ALTER SYSTEM SET synchronous_standby_names = '*'", "SELECT pg_reload_conf()")

    def promote(self) -> None:
        """A standby becomes the primary; waits for nobody any more."""
        self._psql(
            self,
            "ALTER SYSTEM RESET synchronous_standby_names",
            "SELECT pg_promote(wait => true, wait_seconds => 60)",
        )

    def _psql(self, server: "Cluster", *statements: str) -> None:
        for statement in statements:  # one each: ALTER SYSTEM stands in no transaction
            self._run(
                "psql",
                *("--host", server.directory, "--username", "sealgate", "--dbname", "sealgate"),
                *("--set", "ON_ERROR_STOP=1", "--quiet", "--command", statement),
            )

    def start(self) -> None:
        """Returns when it accepts connections: after a crash, when it has recovered."""
        # Our own child: if it is killed, its lock file is stale as soon as we have waited for it.
        with (self.directory / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [
                    *(str(self._binaries / "postgres"), "-D", str(self._data)),
                    # A Unix socket's path is short: the temporary directory's is, as long as TMPDIR is.
                    *("-c", "listen_addresses=", "-c", f"unix_socket_directories={self.directory}"),
                    # After a crash: one sync of the file system, not one of each of a thousand files.
                    *("-c", "recovery_init_sync_method=syncfs"),
                ],
                stdout=log,
                stderr=log,
                **self._conditions,
            )
        deadline_s = time.monotonic() + 60
        while not self._is_ready(self._server.pid):
            if self._server.poll() is not None or time.monotonic() > deadline_s:
                self.stop()
                raise RuntimeError((self.directory / "log").read_text()[-2000:])
            time.sleep(0.01)

    def _is_ready(self, process: int) -> bool:
        """The server's own word, which is what `pg_ctl` looks at too."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        status = [line.strip() for line in (*lines[:1], *lines[_STATUS_LINE:][:1])]
        return status in ([str(process), "ready"], [str(process), "standby"])

    def stop(self) -> None:
        """At once, without a last checkpoint. No-op if it does not run."""
        if self._server is not None:
            self._server.send_signal(signal.SIGQUIT)
            self._server.wait(60)
            self._server = None

    def processes(self) -> list[int]:
        """The first one and its children; none if it does not run."""
        if self._server is None:
            return []
        first = self._server.pid
        children = Path(f"/proc/{first}/task/{first}/children").read_text()
        return [first, *map(int, children.split())]

    def kill(self) -> None:
        """kill -9 of every process of it; of the first one first, which would start the others anew."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if self._server is not None:
            self._server.wait()
            self._server = None
        deadline_s = time.monotonic() + 60
        while any(map(_is_alive, processes)):
            if time.monotonic() > deadline_s:
                raise TimeoutError("a killed server lives on")
            time.sleep(0.005)

    def _run(self, program: str, *words: str | Path) -> None:
        subprocess.run(
            [str(self._binaries / program), *map(str, words)],
            check=True,
            stdout=subprocess.DEVNULL,
            **self._conditions,
        )


def _is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


@contextlib.contextmanager
def running() -> Iterator[Cluster]:
    """A fresh server, while the block runs."""
    directory = Path(tempfile.mkdtemp(prefix="sealgate-postgres-"))
    try:
        cluster = Cluster(directory)
        try:
            cluster.create()
            yield cluster
        finally:
            cluster.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The URL of a fresh server with an empty database `sealgate`, while it runs."""
    with running() as cluster:
        yield cluster.url


def main() -> int:
    command = sys.argv[1:]
    if not command:
        print("usage: python -m tests.postgres COMMAND...", file=sys.stderr)
        return 2
    if os.environ.get(URL_VARIABLE):
        return subprocess.run(command, check=False).returncode
    with serving() as url:
        return subprocess.run(command, check=False, env={**os.environ, URL_VARIABLE: url}).returncode


if __name__ == "__main__":
    sys.exit(main())
