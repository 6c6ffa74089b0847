"""HTTP/2 back-pressure, without sockets: our layers between two real hyper-h2 peers whose credit we control.

`Wire` is a connection handler in miniature. It carries bytes between a client, mitmproxy's HttpLayer and the
origins, completes hooks and connects when told to, and never lets a peer have credit it was not given.
"""

import collections
import os
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mitmproxy import options
from mitmproxy.addonmanager import Loader
from mitmproxy.addons.proxyserver import Proxyserver
from mitmproxy.connection import Client, Connection, ConnectionState
from mitmproxy.proxy import commands, events, layer, layers
from mitmproxy.proxy.context import Context
from mitmproxy.proxy.layers.http import HTTPMode
from mitmproxy.proxy.layers.http._hooks import HttpRequestHeadersHook, HttpResponseHeadersHook
from mitmproxy.proxy.mode_specs import ProxyMode

from proxy import gate
from proxy.gate import h2 as backpressure

DEFAULT_WINDOW_BYTES = 65535
# A piece of at most one window may be on its way when the destination turns out to be full.
BOUND_BYTES = backpressure.STREAM_WINDOW_BYTES + backpressure.HIGH_WATER_BYTES + (1 << 17)
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _begins_with_the_stock_engine() -> None:
    """Engines of other tests in this process have installed the whole gate, once and for good."""
    gate.uninstall()


@pytest.fixture
def installed() -> Iterator[None]:
    with backpressure.install():
        yield


class Peer:
    """One end of an HTTP/2 connection: sends what its window allows, grants credit only while `grants`."""

    def __init__(self, *, client_side: bool) -> None:
        config = h2.config.H2Configuration(client_side=client_side, header_encoding="utf-8")
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.grants = True
        self.received: dict[int, bytearray] = collections.defaultdict(bytearray)
        self.ended: set[int] = set()
        self.reset: set[int] = set()
        self.opened: list[int] = []
        self.terminated = False
        self._owed: dict[int, int] = collections.defaultdict(int)
        self._to_send: dict[int, bytearray] = {}

    def upload(self, stream_id: int, body: bytes) -> None:
        """Queue a body; `pump` sends it as credit allows, and ends the stream after it."""
        self._to_send[stream_id] = bytearray(body)

    def left_to_send(self, stream_id: int) -> int:
        return len(self._to_send.get(stream_id, b""))

    def pump(self) -> bytes:
        for stream_id in list(self._to_send):
            self._send(stream_id)
        return self.h2.data_to_send()

    def _send(self, stream_id: int) -> None:
        rest = self._to_send[stream_id]
        try:
            while rest:
                size = min(
                    self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size, len(rest)
                )
                if size <= 0:
                    return
                self.h2.send_data(stream_id, bytes(rest[:size]))
                del rest[:size]
            self.h2.end_stream(stream_id)
        except h2.exceptions.ProtocolError:
            pass  # The stream was reset meanwhile.
        del self._to_send[stream_id]

    def receive(self, data: bytes) -> None:
        for event in self.h2.receive_data(data):
            match event:
                case h2.events.DataReceived():
                    self.received[event.stream_id] += event.data
                    self._owed[event.stream_id] += event.flow_controlled_length
                    if self.grants:
                        self.grant(event.stream_id)
                case h2.events.RequestReceived() | h2.events.ResponseReceived():
                    self.opened.append(event.stream_id)
                case h2.events.StreamEnded():
                    self.ended.add(event.stream_id)
                case h2.events.StreamReset():
                    self.reset.add(event.stream_id)
                    self._to_send.pop(event.stream_id, None)
                case h2.events.ConnectionTerminated():
                    self.terminated = True

    def grant(self, stream_id: int) -> None:
        owed = self._owed.pop(stream_id, 0)
        if owed:
            self.h2.acknowledge_received_data(owed, stream_id)

    def grant_everything(self) -> None:
        self.grants = True
        for stream_id in list(self._owed):
            self.grant(stream_id)


class Wire:
    """A client, the HTTP layer under test, and one origin per upstream connection."""

    def __init__(self, *, origin_alpn: bytes = b"h2", origin_grants: bool = True) -> None:
        self.options = options.Options()
        Proxyserver().load(Loader(SimpleNamespace(options=self.options)))  # type: ignore[no-untyped-call]
        self.client_conn = Client(
            peername=("192.0.2.1", 1),
            sockname=("192.0.2.2", 443),
            timestamp_start=0.0,
            state=ConnectionState.OPEN,
            alpn=b"h2",
            proxy_mode=ProxyMode.parse("regular"),
        )
        context = Context(self.client_conn, self.options)
        context.server.address = ("origin.test", 80)
        self.layer = layers.HttpLayer(context, HTTPMode.transparent)
        self.client = Peer(client_side=True)
        self.origins: dict[Connection, Peer] = {}
        self.http1_sent: dict[Connection, bytearray] = collections.defaultdict(bytearray)
        self.on_hook: Callable[[commands.StartHook], bool] = lambda _: True
        self.pending: list[commands.StartHook] = []
        self.hooks: list[str] = []
        self.origin_alpn = origin_alpn
        self.origin_grants = origin_grants
        self._todo: collections.deque[events.Event] = collections.deque()
        self._deliver(events.Start())
        self.run()

    @property
    def origin(self) -> Peer:
        (origin,) = self.origins.values()
        return origin

    def request(self, *, method: str = "PUT", body: bytes | None = None, length: int | None = None) -> int:
        """Open a stream, with *body* to follow, or without a body; its id."""
        stream_id = self.client.h2.get_next_available_stream_id()
        headers = [(":method", method), (":scheme", "https"), (":path", "/x"), (":authority", "origin.test")]
        if length is not None:
            headers.append(("content-length", str(length)))
        self.client.h2.send_headers(stream_id, headers, end_stream=body is None)
        if body is not None:
            self.client.upload(stream_id, body)
        self.run()
        return stream_id

    def respond(self, stream_id: int, body: bytes) -> None:
        """Have the only origin answer its stream with 200 and *body*."""
        self.origin.h2.send_headers(stream_id, [(":status", "200")])
        self.origin.upload(stream_id, body)
        self.run()

    def complete_hooks(self) -> None:
        pending, self.pending = self.pending, []
        for hook in pending:
            self._deliver(events.HookCompleted(hook))
        self.run()

    def close_origin(self, connection: Connection) -> None:
        connection.state = ConnectionState.CLOSED
        self._deliver(events.ConnectionClosed(connection))

    def run(self) -> None:
        """Carry bytes until nobody has any more to say."""
        while True:
            moved = False
            if data := self.client.pump():
                moved = True
                self._deliver(events.DataReceived(self.client_conn, data))
            for connection, origin in list(self.origins.items()):
                if (data := origin.pump()) and connection.connected:
                    moved = True
                    self._deliver(events.DataReceived(connection, data))
            if not moved:
                return

    def _deliver(self, event: events.Event) -> None:
        self._todo.append(event)
        if len(self._todo) > 1:
            return  # The loop below takes it: events are handled one after the other, as server_event does.
        while self._todo:
            for command in self.layer.handle_event(self._todo[0]):
                self._obey(command)
            self._todo.popleft()

    def _obey(self, command: commands.Command) -> None:
        match command:
            case commands.SendData(connection=connection, data=data):
                if connection is self.client_conn:
                    self.client.receive(data)
                elif connection in self.origins:
                    self.origins[connection].receive(data)
                else:
                    self.http1_sent[connection] += data
            case commands.OpenConnection(connection=connection):
                connection.state = ConnectionState.OPEN
                connection.alpn = self.origin_alpn
                if self.origin_alpn == b"h2":
                    self.origins[connection] = Peer(client_side=False)
                    self.origins[connection].grants = self.origin_grants
                self._todo.append(events.OpenConnectionCompleted(command, None))
            case commands.CloseConnection(connection=connection):
                if connection.state is not ConnectionState.CLOSED:
                    connection.state = ConnectionState.CLOSED
                    self._todo.append(events.ConnectionClosed(connection))
            case commands.StartHook():
                self._hook(command)
            case commands.Log() | commands.RequestWakeup():
                pass
            case _:
                pytest.fail(f"unexpected command {command!r}")

    def _hook(self, hook: commands.StartHook) -> None:
        self.hooks.append(hook.name)
        if isinstance(hook, HttpRequestHeadersHook):
            hook.flow.request.stream = True
        elif isinstance(hook, HttpResponseHeadersHook) and hook.flow.response:
            hook.flow.response.stream = True
        if self.on_hook(hook):
            self._todo.append(events.HookCompleted(hook))
        else:
            self.pending.append(hook)


def parked_bytes(wire: Wire) -> int:
    """All that waits inside the HTTP layer: unsent at a destination, or queued behind a paused stream."""
    parked = sum(
        len(piece.data)
        for top in wire.layer.connections.values()
        if (connection := getattr(bottom(top), "h2_conn", None)) is not None
        for buffer in connection.stream_buffers.values()
        for piece in buffer
    )
    queued = sum(
        len(event.data)
        for stream in wire.layer.streams.values()
        for event in stream._paused_event_queue
        if hasattr(event, "data")
    )
    return parked + queued


def bottom(top: layer.Layer) -> layer.Layer:
    """The HTTP/2 layer under HttpClient's wrapper."""
    return getattr(top, "child_layer", None) or top


def test_upload_to_an_origin_without_credit_is_bounded_and_then_arrives_whole(installed: None) -> None:
    wire = Wire(origin_grants=False)
    body = os.urandom(6 * MIB)
    stream_id = wire.request(body=body)

    sent = len(body) - wire.client.left_to_send(stream_id)
    assert DEFAULT_WINDOW_BYTES < sent <= DEFAULT_WINDOW_BYTES + BOUND_BYTES
    assert parked_bytes(wire) <= BOUND_BYTES

    wire.origin.grant_everything()
    wire.run()
    assert bytes(wire.origin.received[1]) == body
    assert wire.origin.ended == {1}


def test_stock_mitmproxy_parks_everything() -> None:
    """The harness can see what the patch is for: without it this very transfer is parked whole."""
    wire = Wire()
    body = os.urandom(6 * MIB)
    wire.request(method="GET")
    wire.client.grants = False
    wire.respond(1, body)
    assert wire.origin.left_to_send(1) == 0
    assert parked_bytes(wire) > 5 * MIB


def test_download_to_a_client_without_credit_is_bounded_and_then_arrives_whole(installed: None) -> None:
    wire = Wire()
    body = os.urandom(6 * MIB)
    stream_id = wire.request(method="GET")
    wire.client.grants = False
    wire.respond(1, body)

    assert 0 < len(wire.client.received[stream_id]) <= DEFAULT_WINDOW_BYTES
    assert len(body) - wire.origin.left_to_send(1) <= DEFAULT_WINDOW_BYTES + BOUND_BYTES
    assert parked_bytes(wire) <= BOUND_BYTES

    wire.client.grant_everything()
    wire.run()
    assert bytes(wire.client.received[stream_id]) == body
    assert wire.client.ended == {stream_id}


@pytest.mark.parametrize("waiting_in", ["requestheaders", "server_connect"])
def test_upload_during_a_hook_is_bounded(waiting_in: str, installed: None) -> None:
    wire = Wire()
    body = os.urandom(5 * MIB)
    wire.on_hook = lambda hook: hook.name != waiting_in
    if waiting_in == "server_connect":
        # Connecting is a command here, not a hook; a connect that does not return pauses the stream alike.
        opened: list[commands.OpenConnection] = []
        obey = wire._obey

        def hold_connect(command: commands.Command) -> None:
            if isinstance(command, commands.OpenConnection):
                opened.append(command)
            else:
                obey(command)

        wire._obey = hold_connect  # type: ignore[method-assign]
        stream_id = wire.request(body=body)
        assert len(body) - wire.client.left_to_send(stream_id) <= BOUND_BYTES
        assert parked_bytes(wire) <= BOUND_BYTES
        wire._obey = obey  # type: ignore[method-assign]
        obey(opened[0])
        wire._deliver(wire._todo.pop())
    else:
        stream_id = wire.request(body=body)
        assert wire.hooks == [waiting_in]
        assert len(body) - wire.client.left_to_send(stream_id) <= BOUND_BYTES
        assert parked_bytes(wire) <= BOUND_BYTES
        wire.on_hook = lambda _: True
        wire.complete_hooks()
    wire.run()
    assert bytes(wire.origin.received[1]) == body


def test_a_stalled_stream_does_not_stop_its_sibling(installed: None) -> None:
    wire = Wire()
    wire.on_hook = lambda _: len(wire.hooks) != 1  # The first stream's first hook never returns.
    stalled = wire.request(body=os.urandom(3 * MIB))
    body = os.urandom(20 * MIB)
    wire.request(body=body)
    assert bytes(wire.origin.received[1]) == body
    assert wire.client.left_to_send(stalled) > MIB


def test_parallel_transfers_both_ways_are_byte_identical(installed: None) -> None:
    wire = Wire()
    up = {wire.request(body=body): body for body in (os.urandom(3 * MIB + n) for n in range(4))}
    origin_ids = sorted(wire.origin.received)
    assert [bytes(wire.origin.received[i]) for i in origin_ids] == list(up.values())
    down = [os.urandom(3 * MIB + n) for n in range(4)]
    for origin_id, body in zip(origin_ids, down, strict=True):
        wire.origin.h2.send_headers(origin_id, [(":status", "200")])
        wire.origin.upload(origin_id, body)
    wire.run()
    assert [bytes(wire.client.received[i]) for i in up] == down
    assert wire.client.ended == set(up)
    assert wire.layer.streams == {}


def test_nothing_is_remembered_of_streams_that_ended_or_were_reset(installed: None) -> None:
    wire = Wire()
    for _ in range(3):
        wire.request(body=os.urandom(100))
    wire.on_hook = lambda _: False
    stalled = wire.request(body=os.urandom(3 * MIB))
    connection = wire.layer.connections[wire.client_conn]
    assert isinstance(connection, backpressure._CreditedConnection)
    assert set(connection._stream_debt_bytes) == {stalled}

    wire.client.h2.reset_stream(stalled, h2.errors.ErrorCodes.CANCEL)
    wire.run()
    assert not connection._stream_debt_bytes
    assert not connection.withholds


def test_connection_credit_comes_back_while_every_stream_is_stalled(installed: None) -> None:
    wire = Wire()
    wire.on_hook = lambda _: False
    for _ in range(8):
        wire.request(body=os.urandom(2 * MIB))
    # Eight stalled streams hold 8 MiB; the connection window has been topped up for all but a step of it.
    window = wire.client.h2.outbound_flow_control_window
    assert backpressure.CONNECTION_WINDOW_BYTES - window < backpressure.CONNECTION_STEP_BYTES + MIB


TOGETHER_BYTES = backpressure.WAITING_BYTES + backpressure.CONNECTION_WINDOW_BYTES


@pytest.mark.parametrize(
    ("count", "size"), [(70, 400_000), (32, MIB - 1), (32, 2 * MIB)], ids=["half", "whole", "longer"]
)
def test_streams_that_wait_are_bounded_together_and_then_arrive_whole(
    count: int, size: int, installed: None
) -> None:
    """Bodies that are here to their end, too: nothing is owed for them, but they take their place."""
    wire = Wire()
    wire.on_hook = lambda _: False
    bodies = [os.urandom(size) for _ in range(count)]
    asked = [wire.request(body=body) for body in bodies]
    held = parked_bytes(wire)
    assert backpressure.WAITING_BYTES < held <= TOGETHER_BYTES
    assert any(wire.client.left_to_send(stream_id) for stream_id in asked)
    wire.on_hook = lambda _: True
    wire.complete_hooks()
    wire.run()
    arrived = sorted(bytes(body) for body in wire.origin.received.values())
    assert arrived == sorted(bodies)
    assert parked_bytes(wire) == 0
    connection = wire.layer.connections[wire.client_conn]
    assert isinstance(connection, backpressure._CreditedConnection)
    assert not connection._stream_debt_bytes
    assert not connection._ended


def test_streams_that_wait_and_are_reset_give_their_place_back(installed: None) -> None:
    wire = Wire()
    wire.on_hook = lambda _: False
    stalled = [wire.request(body=os.urandom(MIB)) for _ in range(26)]
    assert wire.client.h2.outbound_flow_control_window == 0
    for stream_id in stalled:
        wire.client.h2.reset_stream(stream_id, h2.errors.ErrorCodes.CANCEL)
    wire.run()
    wire.on_hook = lambda _: True
    body = os.urandom(20 * MIB)
    wire.request(body=body)
    assert bytes(wire.origin.received[1]) == body


def test_answers_that_wait_for_their_client_are_bounded_together(installed: None) -> None:
    """They have ended at the service; their client grants nothing."""
    wire = Wire()
    wire.client.grants = False
    asked = [wire.request(method="GET") for _ in range(60)]
    bodies = {origin_id: os.urandom(MIB - 1) for origin_id in sorted(wire.origin.opened)}
    for origin_id, body in bodies.items():
        wire.origin.h2.send_headers(origin_id, [(":status", "200")])
        wire.origin.upload(origin_id, body)
    wire.run()
    assert parked_bytes(wire) <= TOGETHER_BYTES + 60 * backpressure.HIGH_WATER_BYTES
    wire.client.grant_everything()
    wire.run()
    assert [bytes(wire.client.received[stream_id]) for stream_id in asked] == list(bodies.values())
    assert parked_bytes(wire) == 0


def test_closed_upstream_connections_are_forgotten(installed: None) -> None:
    wire = Wire(origin_alpn=b"http/1.1")
    for turn in range(50):
        stream_id = wire.request(method="GET")
        connection = next(c for c in wire.http1_sent if c.connected)
        wire._deliver(events.DataReceived(connection, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
        wire.run()
        assert bytes(wire.client.received[stream_id]) == b"ok", turn
    assert len(wire.http1_sent) == 50
    assert set(wire.layer.connections) == {wire.client_conn}


def test_stock_mitmproxy_remembers_them_all() -> None:
    wire = Wire(origin_alpn=b"http/1.1")
    for _ in range(50):
        wire.request(method="GET")
        connection = next(c for c in wire.http1_sent if c.connected)
        wire._deliver(events.DataReceived(connection, b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
        wire.run()
    assert len(wire.layer.connections) == 51


def test_an_origin_that_closes_during_a_hook_is_kept_for_the_stream_that_will_still_write_to_it(
    installed: None,
) -> None:
    """Forgetting it at once would be a KeyError in the layer: a crash, and with the gate a cut client."""
    wire = Wire(origin_alpn=b"http/1.1")
    wire.on_hook = lambda hook: hook.name != "request"
    stream_id = wire.request(body=b"abc", length=3)
    assert [hook.name for hook in wire.pending] == ["request"]
    (connection,) = wire.http1_sent
    wire.close_origin(connection)
    assert connection in wire.layer.connections
    wire.complete_hooks()
    assert stream_id in wire.client.ended | wire.client.reset
    wire._deliver(events.DataReceived(wire.client_conn, b""))
    assert set(wire.layer.connections) == {wire.client_conn}


def test_frames_that_arrive_together_are_one_piece_per_stream_and_in_order() -> None:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    state = backpressure._JoiningState(h2.config.H2Configuration(client_side=False))
    client.initiate_connection()
    head = [(":method", "PUT"), (":scheme", "https"), (":path", "/"), (":authority", "h")]
    for stream_id in (1, 3):
        client.send_headers(stream_id, head)
    for stream_id, data in ((1, b"a"), (1, b"bb"), (1, b"ccc"), (3, b"x"), (1, b"d")):
        client.send_data(stream_id, data, pad_length=2)
    client.send_data(1, b"e", end_stream=True)
    told = state.receive_data(client.data_to_send())
    data_events = [event for event in told if isinstance(event, h2.events.DataReceived)]
    assert [(event.stream_id, event.data) for event in data_events] == [(1, b"abbccc"), (3, b"x"), (1, b"de")]
    assert [event.flow_controlled_length for event in data_events] == [15, 4, 5]
    assert [bool(event.stream_ended) for event in data_events] == [False, False, True]
    assert isinstance(told[-1], h2.events.StreamEnded)


def test_install_can_be_undone() -> None:
    before = layers.HttpLayer
    with backpressure.install():
        assert layers.HttpLayer is not before
    assert layers.HttpLayer is before


# Steps of the fuzz: what, and a number that it interprets as size or as the choice of a stream.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "put", "get", "respond", "complete-hooks", "hold-hooks", "client-grants", "origin-grants",
                "client-stops", "origin-stops", "client-resets", "origin-resets", "client-ping", "window",
                "priority", "window-update", "frame",
            ]
        ),
        st.integers(0, 3 * MIB),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, seed_number=st.integers(0, 2**32 - 1))
def test_any_sequence_of_frames_stays_bounded_and_what_was_not_reset_arrives(
    steps: list[tuple[str, int]], seed_number: int, installed: None
) -> None:
    seed = random.Random(seed_number)  # bodies are no part of what is searched and shrunk
    wire = Wire()
    up: dict[int, bytes] = {}
    down: dict[int, bytes] = {}
    spoiled: set[int] = set()
    reset_by_origin: set[int] = set()
    hold = False
    wire.on_hook = lambda _: not hold

    def origin() -> Peer | None:
        return next(iter(wire.origins.values()), None)

    for action, number in steps:
        if wire.client.terminated:
            break
        if action == "put" and wire.client.h2.open_outbound_streams < 60:
            body = seed.randbytes(number)
            up[wire.request(body=body)] = body
        elif action == "get" and wire.client.h2.open_outbound_streams < 60:
            up[wire.request(method="GET")] = b""
        elif action == "respond" and (peer := origin()):
            answered = down.keys() | peer.reset | reset_by_origin
            waiting = [i for i in peer.opened if i not in answered]
            if waiting:
                stream_id = waiting[number % len(waiting)]
                down[stream_id] = seed.randbytes(number)
                wire.respond(stream_id, down[stream_id])
        elif action == "complete-hooks":
            wire.complete_hooks()
        elif action == "hold-hooks":
            hold = number % 2 == 0
        elif action == "client-grants":
            wire.client.grant_everything()
        elif action == "client-stops":
            wire.client.grants = False
        elif action == "origin-grants" and (peer := origin()):
            peer.grant_everything()
        elif action == "origin-stops" and (peer := origin()):
            peer.grants = False
        elif action == "client-resets" and up:
            stream_id = list(up)[number % len(up)]
            if reset(wire.client, stream_id):
                spoiled.add(stream_id)
        elif action == "origin-resets" and (peer := origin()) and peer.opened:
            stream_id = peer.opened[number % len(peer.opened)]
            reset_by_origin.add(stream_id)
            if reset(peer, stream_id):
                spoiled.add(client_id(wire, stream_id))
        elif action == "client-ping":
            wire.client.h2.ping(b"12345678")
        elif action == "window":
            wire.client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: number})
        elif action == "priority":
            wire.client.h2.prioritize(
                wire.client.h2.get_next_available_stream_id() + 100, weight=1 + number % 256
            )
        elif action == "window-update":
            wire.client.h2.increment_flow_control_window(1 + number)
        elif action == "frame":
            # An unknown frame type with a random payload must be ignored (RFC 9113, 5.5).
            payload = seed.randbytes(number % 100)
            frame = len(payload).to_bytes(3, "big") + b"\xee\x00" + (0).to_bytes(4, "big") + payload
            wire._deliver(events.DataReceived(wire.client_conn, frame))
        wire.run()
        live = max(1, len(wire.layer.streams))
        assert parked_bytes(wire) <= live * 2 * BOUND_BYTES

    hold = False
    while wire.pending:
        wire.complete_hooks()
    wire.client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: DEFAULT_WINDOW_BYTES})
    for peer in (wire.client, *wire.origins.values()):
        peer.grant_everything()
    wire.run()
    for peer in (wire.client, *wire.origins.values()):
        peer.grant_everything()
    wire.run()
    assert not wire.client.terminated
    peer = origin()
    if peer is None:
        return
    for origin_id in peer.opened:
        stream_id = client_id(wire, origin_id)
        if stream_id in spoiled or origin_id in peer.reset:
            continue
        assert bytes(peer.received[origin_id]) == up[stream_id]
        if origin_id in down:
            assert bytes(wire.client.received[stream_id]) == down[origin_id]
            assert stream_id in wire.client.ended
    assert parked_bytes(wire) == 0


def reset(peer: Peer, stream_id: int) -> bool:
    try:
        peer.h2.reset_stream(stream_id, h2.errors.ErrorCodes.CANCEL)
    except h2.exceptions.ProtocolError:
        return False  # Closed already.
    return True


def client_id(wire: Wire, origin_id: int) -> int:
    """The client's id of an origin's stream."""
    (connection,) = wire.origins
    client = bottom(wire.layer.connections[connection])
    assert isinstance(client, backpressure._Http2Client)
    return client.http_stream_id(origin_id)
