"""Whose end a CancelledError is: the task's, or that of something it waited for."""

import asyncio
from collections.abc import Callable

import pytest

from key_agent.cancelling import is_to_end


async def said_of(end: Callable[[asyncio.Task[object], asyncio.Future[None]], object]) -> bool:
    """What a task says that waits for a future, and is ended by *end* of the two."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    said: list[bool] = []

    async def waiting() -> None:
        try:
            await future
        except asyncio.CancelledError:
            said.append(is_to_end())
            raise

    task: asyncio.Task[object] = asyncio.create_task(waiting())
    await asyncio.sleep(0)
    end(task, future)
    with pytest.raises(asyncio.CancelledError):
        await task
    return said[0]


async def test_a_task_whose_end_was_asked_for_is_to_end() -> None:
    assert await said_of(lambda task, _: task.cancel())


async def test_a_task_whose_future_was_cancelled_by_somebody_else_is_not() -> None:
    assert not await said_of(lambda _, future: future.cancel())


async def test_a_timeout_asks_for_the_end_of_what_it_is_about() -> None:
    said: list[bool] = []

    async def timed() -> None:
        async with asyncio.timeout(0):
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                said.append(is_to_end())
                raise

    with pytest.raises(TimeoutError):
        await timed()
    assert said == [True]
    assert not is_to_end()
