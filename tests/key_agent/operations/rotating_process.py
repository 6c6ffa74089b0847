"""`kek rotate` as a process of its own that ends by SIGKILL: at the step it is told, or from outside.

    python rotating_process.py CONFIG [STEP]

A step is a call of registry or HSM: "not begun" and "done" count as one each. Prints the step's name first.
"""

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from key_agent import app, config
from key_agent.operations.operations import Operations
from runtime import observe


class Mortal:
    """Stands before another object and ends the process at the *fatal*-th call."""

    left: int | None = None

    def __init__(self, behind: Any) -> None:
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._behind, name)
        if not callable(member):
            return member

        async def call(*arguments: Any, **named: Any) -> Any:
            _step(f"{name} not begun")
            result = await member(*arguments, **named)
            _step(f"{name} done")
            return result

        return call


def _step(name: str) -> None:
    if Mortal.left is None:
        return
    Mortal.left -= 1
    if Mortal.left < 0:
        print(name, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


async def _rotate(path: Path) -> None:
    async with app.opened(config.load(path, os.environ)) as agent:
        print("opened", flush=True)
        agent.registry = Mortal(agent.registry)  # type: ignore[assignment]
        agent.source = Mortal(agent.source)  # type: ignore[assignment]
        result = await Operations(agent).kek_rotate()
        print(result["kek"], result["retired"], flush=True)


if __name__ == "__main__":
    Mortal.left = int(sys.argv[2]) if len(sys.argv) > 2 else None
    observe.configure_logging(level=logging.ERROR)
    asyncio.run(_rotate(Path(sys.argv[1])))
