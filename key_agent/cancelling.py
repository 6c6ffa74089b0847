"""Whose end a CancelledError is.

A client of aiohttp that is closed cancels what its requests wait for: a name to be resolved, a free
connection. They see a CancelledError that nobody has asked for, and a task that lets it through ends without
a word: its peer is not followed any more, its withdrawal not tried again.
"""

import asyncio


def is_to_end() -> bool:
    """Whether somebody has asked for the end of this task, or a timeout for that of what it waits for."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
