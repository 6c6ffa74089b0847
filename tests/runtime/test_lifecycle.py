import asyncio
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from runtime.lifecycle import run_until_signalled

ROOT = Path(__file__).parents[2]
DEADLINE_S = 90


def start(program: str, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def output_of(program: str) -> str:
    with start(program) as process:
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    return output


HARDENED = """
    import ctypes, os, resource
    from pathlib import Path
    from runtime.lifecycle import harden_process
    {before}
    warnings = harden_process()
    print(resource.getrlimit(resource.RLIMIT_CORE))
    print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # PR_GET_DUMPABLE
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmLck")))
    print(warnings)
    block = bytearray(64 << 20)  # allocation still works
"""


def test_a_hardened_process_leaves_no_memory_behind() -> None:
    core, dumpable, locked_kb, warnings = output_of(HARDENED.format(before="")).splitlines()
    assert core == "(0, 0)"
    assert dumpable == "0"
    # Either the memory is locked or the process says that it is not.
    assert (int(locked_kb) > 0) == (warnings == "[]")


def test_what_the_system_refuses_is_said() -> None:
    if os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_MEMLOCK)[1] == 0:
        pytest.skip("memlock is forbidden altogether")
    before = """
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
    if os.geteuid() == 0:
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
    """
    output = output_of(HARDENED.format(before=textwrap.indent(textwrap.dedent(before), "    ").strip()))
    *_, locked_kb, warnings = output.splitlines()
    assert locked_kb == "0"
    assert "memory can be swapped: the memlock limit is 65536 bytes" in warnings
    assert "LimitMEMLOCK=infinity" in warnings


def test_other_processes_cannot_read_the_memory() -> None:
    """Another process of the same user, which may look into any process that can be dumped."""
    program = """
        import os, sys
        from runtime.lifecycle import harden_process
        import ctypes
        if os.geteuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
            ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE, which setuid has taken
        if sys.argv[1] == "yes":
            harden_process()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(os.open(f"/proc/{os.getppid()}/environ", os.O_RDONLY))
                os.write(write, b"open")
            except PermissionError:
                os.write(write, b"closed")
            os._exit(0)
        os.waitpid(child, 0)
        print(os.read(read, 10).decode())
    """
    answers = []
    for harden in ("no", "yes"):
        with start(program, harden) as process:
            output, errors = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, errors
        answers.append(output.strip())
    assert answers == ["open", "closed"]


def test_end_with_parent() -> None:
    program = """
        import os, sys, time
        from runtime.lifecycle import end_with_parent
        read, write = os.pipe()
        parent = os.getpid()
        child = os.fork()
        if child == 0:
            end_with_parent(parent)
            os.write(write, b"!")
            time.sleep(600)
        os.read(read, 1)
        print(child, flush=True)
        os._exit(0)
    """
    child = int(output_of(program))
    deadline = os.times().elapsed + DEADLINE_S
    while True:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            break
        if state == "Z":  # dead; whoever adopted it has not looked yet
            break
        assert os.times().elapsed < deadline, "the child outlived its parent"


def test_a_parent_that_has_gone_already() -> None:
    program = """
        from runtime.lifecycle import end_with_parent
        try:
            end_with_parent(999999999)
        except ProcessLookupError as error:
            print(error)
    """
    assert "has ended" in output_of(program)


SERVICE = """
    import asyncio, sys
    from runtime.lifecycle import run
    from runtime.observe import configure_logging

    configure_logging(json=True)

    async def main(stop):
        print(type(asyncio.get_running_loop()).__module__, flush=True)
        if sys.argv[1] == "deaf":
            try:
                await asyncio.Event().wait()
            finally:
                print("cancelled", flush=True)
        if sys.argv[1] == "failing":
            raise RuntimeError("a bug")
        await stop.wait()
        print("cleaning up", flush=True)

    run(main, on_hangup=lambda: print("reloaded", flush=True))
    print("ended", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly(number: signal.Signals) -> None:
    with start(SERVICE, "good") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "runtime.event_loop\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert output == "cleaning up\nended\n"
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_a_second_signal_does_not_wait() -> None:
    with start(SERVICE, "deaf") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        assert "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=DEADLINE_S)
    assert output == "cancelled\nended\n"
    assert process.returncode == 0
    assert "Traceback" not in errors


def test_hangup_reloads() -> None:
    with start(SERVICE, "good") as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "reloaded\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0


def test_a_bug_ends_the_process() -> None:
    with start(SERVICE, "failing") as process:
        _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "a bug" in errors


async def test_the_handlers_are_removed() -> None:
    async def main(stop: asyncio.Event) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()

    before = signal.getsignal(signal.SIGTERM)
    await run_until_signalled(main)
    assert signal.getsignal(signal.SIGTERM) == before


async def test_a_cancellation_from_outside_is_passed_on() -> None:
    async def main(stop: asyncio.Event) -> None:
        await stop.wait()

    task = asyncio.create_task(run_until_signalled(main))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_as_many_files_as_the_machine_allows() -> None:
    program = """
        import resource
        from runtime.lifecycle import raise_open_files
        hard = min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        print(raise_open_files() == hard, resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard))
        print(raise_open_files() == hard)
    """
    assert output_of(program).split() == ["True"] * 3
