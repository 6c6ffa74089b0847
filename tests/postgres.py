"""A PostgreSQL server of the tests' own: `python -m tests.postgres COMMAND...` runs COMMAND beside it.

1. It lives in a temporary directory, listens on a Unix socket there alone, and ends with the command.
2. COMMAND finds it by SEALGATE_TEST_POSTGRES_URL; where that is set already, that server is used.
3. PostgreSQL refuses to run as root: then it runs as the user that Debian's package made.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

URL_VARIABLE = "SEALGATE_TEST_POSTGRES_URL"
SERVER_USER = "postgres"


def find_binaries() -> Path:
    """Where the newest server's programs are. FileNotFoundError, with the package to install."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if not found:
        raise FileNotFoundError("no PostgreSQL server is installed: apt-get install postgresql")
    return found[-1].parent


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The URL of a fresh server with an empty database `sealgate`, while it runs."""
    binaries = find_binaries()
    directory = Path(tempfile.mkdtemp(prefix="sealgate-postgres-"))
    as_user: dict[str, int | list[int]] = {}
    user = pwd.getpwuid(os.geteuid())
    if user.pw_uid == 0:
        user = pwd.getpwnam(SERVER_USER)
        os.chown(directory, user.pw_uid, user.pw_gid)
        as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}

    def run(*words: str | Path) -> None:
        subprocess.run(
            [str(word) for word in words],
            check=True,
            cwd=directory,
            stdout=subprocess.DEVNULL,
            stdin=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "PGHOST": str(directory)},
            **as_user,  # type: ignore[call-overload]
        )

    data, log = directory / "data", directory / "log"
    try:
        run(binaries / "initdb", "--pgdata", data, "--username", "sealgate", "--auth", "trust", "--no-sync")
        # A Unix socket's path is short: the temporary directory's is, as long as TMPDIR is.
        options = f"-c listen_addresses='' -c unix_socket_directories='{directory}'"
        run(binaries / "pg_ctl", "--pgdata", data, "--log", log, "--options", options, "--wait", "start")
        try:
            run(binaries / "createdb", "--username", "sealgate", "sealgate")
            yield f"postgresql+psycopg://sealgate@/sealgate?host={directory}"
        finally:
            run(binaries / "pg_ctl", "--pgdata", data, "--mode", "immediate", "--wait", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


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
