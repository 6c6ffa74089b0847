"""Child processes of asyncio that leave nothing behind, however the wait for them ends.

A test that runs out of time is cancelled while it waits for a program. The program would go on, and its pipes
would be found open by whichever test runs next in this process, which fails in its place.
"""

import contextlib
from asyncio.subprocess import Process
from typing import Any


async def output_of(process: Process, given: bytes | None = None) -> tuple[bytes, bytes]:
    """What *process* writes until its end, as `communicate`; it ends with the wait for it."""
    try:
        return await process.communicate(given)
    except BaseException:  # a test's time-out is a cancellation
        await end(process)
        raise


async def end(process: Process) -> None:
    """Kill *process* if it is still there, and close its pipes: also those that a child of its own keeps.

    One that has ended, and has been waited for, stays as it is.
    """
    if process.stdin is not None and process.stdin.transport.get_write_buffer_size():
        process.stdin.transport.abort()  # `close` would wait until somebody reads it
    transport: Any = process._transport  # type: ignore[attr-defined]  # no public way to its pipes
    transport.close()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            with contextlib.suppress(ValueError):
                await pipe.read()  # until it is closed in truth
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            await process.stdin.wait_closed()
    await process.wait()
