"""A descriptor that the loop was given is closed once, whenever the peer goes."""

import asyncio
import contextlib
import gc
import os
import socket
import ssl
import struct
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, override

import aiohttp
import pytest
import uvloop

from runtime.event_loop import EventLoop

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of 0 s: close sends RST."""


@contextlib.contextmanager
def listener() -> Iterator[socket.socket]:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        made.listen()
        yield made


async def reset_while_it_is_taken(loop: asyncio.AbstractEventLoop, heard: socket.socket) -> socket.socket:
    """A socket given to the loop, whose peer resets between two turns of it."""
    given = socket.socket()
    given.setblocking(False)
    await loop.sock_connect(given, heard.getsockname())
    peer, _ = heard.accept()

    def reset() -> None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        peer.close()
        time.sleep(0.01)  # the loop stands still until the reset is here, as on a loaded machine

    loop.call_soon(reset)
    with pytest.raises(ConnectionResetError):
        await loop.create_connection(
            asyncio.Protocol, sock=given, ssl=ssl.create_default_context(), server_hostname="localhost"
        )
    return given


def run(factory: Callable[[], asyncio.AbstractEventLoop], main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


def test_a_connection_reset_at_once_does_not_close_somebody_elses_descriptor() -> None:
    async def main() -> None:
        with listener() as heard:
            given = await reset_while_it_is_taken(asyncio.get_running_loop(), heard)
            await asyncio.sleep(0)
            assert given.fileno() == -1
            others = [os.open("/dev/null", os.O_RDONLY) for _ in range(8)]  # one has the number now
            del given
            gc.collect()
            for number in others:
                os.close(number)  # EBADF if it was closed already

    run(EventLoop, main())


def test_uvloop_alone_would() -> None:
    """When this fails uvloop has mended it, and `EventLoop` can go."""

    async def main() -> None:
        with listener() as heard:
            given = await reset_while_it_is_taken(asyncio.get_running_loop(), heard)
            await asyncio.sleep(0.01)
            number = given.detach()
            assert number != -1
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.close(number)

    run(uvloop.new_event_loop, main())


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_a_given_socket_is_the_loops_and_works(family: str) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        if family == "tcp":
            with listener() as heard:
                given = socket.create_connection(heard.getsockname())
                peer, _ = heard.accept()
        else:
            given, peer = socket.socketpair()
        with peer:
            received = loop.create_future()

            class Echo(asyncio.Protocol):
                @override
                def data_received(self, data: bytes) -> None:
                    received.set_result(data)

            transport, _ = await loop.create_connection(Echo, sock=given)
            assert given.fileno() == -1
            peer.sendall(b"hello")
            assert await received == b"hello"
            transport.close()
            await asyncio.sleep(0.01)
            assert peer.recv(1) == b""

    run(EventLoop, main())


def test_a_socket_that_is_refused_before_it_is_taken_stays_the_callers() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        with socket.socket(type=socket.SOCK_DGRAM) as datagram:
            with pytest.raises(ValueError, match="Stream Socket"):
                await loop.create_connection(asyncio.Protocol, sock=datagram)
            assert datagram.fileno() != -1
        ours, peer = socket.socketpair()
        with ours, peer:

            def fail() -> asyncio.Protocol:
                raise RuntimeError("no protocol")

            with pytest.raises(RuntimeError, match="no protocol"):
                await loop.create_unix_connection(fail, sock=ours)
            assert ours.fileno() != -1

    run(EventLoop, main())


def test_aiohttp_against_a_peer_that_resets_leaves_nothing() -> None:
    """aiohttp hands its sockets over; warnings of what is left unclosed are errors here."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with listener() as heard:
            heard.setblocking(False)

            async def reset_all() -> None:
                while True:
                    peer, _ = await loop.sock_accept(heard)
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    peer.close()

            resetting = asyncio.create_task(reset_all(), name="resets")
            connector = aiohttp.TCPConnector(ssl=ssl.create_default_context())
            async with aiohttp.ClientSession(connector=connector) as client:
                for _ in range(40):
                    with pytest.raises(aiohttp.ClientOSError):
                        await client.get(f"https://127.0.0.1:{heard.getsockname()[1]}/")
            resetting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await resetting
        gc.collect()

    run(EventLoop, main())
