"""litmus, the compliance suite of WebDAV servers: one run, and what each of its tests said."""

import asyncio
import re
from pathlib import Path

from tests.referees.tls_front import clean_environment

LITMUS = "/usr/bin/litmus"
_SUITE = re.compile(r"-> running `(\w+)'")
_TEST = re.compile(r"\s*\d+\. (\w+)\.* (.*)")


async def litmus(directory: Path, url: str, *, proxy: str | None = None) -> dict[str, list[str]]:
    """Results by `suite/test`: the verdict with its reason, and warnings, in the order they were printed.

    *directory*, which is there and empty, keeps litmus' own traces.
    """
    arguments = ["-k", *([f"--proxy={proxy}"] if proxy else []), url]
    process = await asyncio.create_subprocess_exec(
        LITMUS,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=directory,
        env=clean_environment(),
    )
    try:
        async with asyncio.timeout(300):
            out, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return _results(out.decode("utf-8", "replace"))


def _results(text: str) -> dict[str, list[str]]:
    results: dict[str, list[str]] = {}
    suite = name = ""
    for line in re.split(r"[\r\n]+", text):
        if match := _SUITE.match(line):
            suite, name = match[1], ""
        elif match := _TEST.fullmatch(line):
            name = f"{suite}/{match[1]}"
            if match[2].strip():  # else the test is running yet
                results.setdefault(name, []).append(match[2].strip())
        elif name and line.strip().startswith("WARNING"):
            results.setdefault(name, []).append(line.strip())
    return results
