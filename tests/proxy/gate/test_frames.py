"""What an HTTP/2 peer may make us do for nothing, without sockets: our state machine, frames made by hand."""

from typing import override

import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest
from h2.exceptions import DenialOfServiceError, ProtocolError
from hpack import Decoder, Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from proxy.gate import frames

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SettingsFrame(0).serialize()
HEAD = [(":method", "PUT"), (":scheme", "https"), (":authority", "a"), (":path", "/x")]
ANSWER = [(b":status", b"200"), (b"server", b"x")]


def state(kind: type[frames.FrugalState] = frames.FrugalState) -> frames.FrugalState:
    """A server's that has been greeted."""
    ours = kind(h2.config.H2Configuration(client_side=False, header_encoding=False))
    ours.initiate_connection()  # type: ignore[no-untyped-call]
    ours.receive_data(PREFACE)
    ours.data_to_send()
    return ours


def head(stream_id: int = 1, *, ends: bool = False) -> bytes:
    flags = ["END_HEADERS", "END_STREAM"] if ends else ["END_HEADERS"]
    return HeadersFrame(stream_id, Encoder().encode(HEAD, huffman=False), flags=flags).serialize()


def goodbye(ours: frames.FrugalState) -> int | None:
    """The code of the first GOAWAY that is about to leave."""
    data = memoryview(bytes(ours.data_to_send()))
    while data:
        frame, length = Frame.parse_frame_header(data[:9])
        frame.parse_body(data[9 : 9 + length])
        if isinstance(frame, GoAwayFrame):
            return int(frame.error_code)
        data = data[9 + length :]
    return None


IDLE = {
    "settings": SettingsFrame(0, settings={1: 100}),
    "ping": PingFrame(0, b"12345678"),
    "ping-ack": PingFrame(0, b"12345678", flags=["ACK"]),
    "priority": PriorityFrame(3, depends_on=0, stream_weight=16),
    "window": WindowUpdateFrame(0, window_increment=1),
    "window-of-a-stream": WindowUpdateFrame(1, window_increment=1),
    "empty-data": DataFrame(1, b""),
    "padding": DataFrame(1, b"", pad_length=255, flags=["PADDED"]),
}
IDLE_BYTES = {name: frame.serialize() for name, frame in IDLE.items()}
IDLE_BYTES["unknown"] = b"\x00\x00\x01\xbe\x00\x00\x00\x00\x00x"


@pytest.mark.parametrize("kind", IDLE_BYTES)
def test_frames_that_move_nothing_end_the_connection(kind: str) -> None:
    ours, frame = state(), IDLE_BYTES[kind]
    ours.receive_data(head())
    for _ in range(frames.MAX_PATIENCE - 1):  # one was spent on the greeting
        ours.receive_data(frame)
    assert goodbye(ours) is None
    with pytest.raises(DenialOfServiceError):
        ours.receive_data(frame)
    assert goodbye(ours) == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM


def asking() -> tuple[frames.FrugalState, h2.connection.H2Connection]:
    """A client's, and the service that it has greeted."""
    ours = frames.FrugalState(h2.config.H2Configuration(client_side=True, header_encoding=False))
    service = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
    ours.initiate_connection()  # type: ignore[no-untyped-call]
    service.initiate_connection()
    service.receive_data(ours.data_to_send())
    ours.receive_data(service.data_to_send())
    return ours, service


def test_informational_answers_without_number_end_the_connection() -> None:
    ours, service = asking()
    ours.send_headers(1, HEAD, end_stream=True)
    service.receive_data(ours.data_to_send())
    for _ in range(frames.MAX_PATIENCE + 1):
        service.send_headers(1, [(":status", "103")])
    with pytest.raises(DenialOfServiceError):
        ours.receive_data(service.data_to_send())
    assert goodbye(ours) == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM


def test_a_service_that_answers_may_go_on_for_ever() -> None:
    """By an early hint, a head and trailers for each request."""
    ours, service = asking()
    for stream_id in range(1, 2 * frames.MAX_PATIENCE, 2):
        ours.send_headers(stream_id, HEAD, end_stream=True)
        service.receive_data(ours.data_to_send())
        service.send_headers(stream_id, [(":status", "103")])
        service.send_headers(stream_id, [(":status", "200")])
        service.send_headers(stream_id, [("grpc-status", "0")], end_stream=True)
        ours.receive_data(service.data_to_send())
    assert goodbye(ours) is None


def test_streams_that_are_reset_at_once_end_the_connection() -> None:
    ours = state()
    count = (frames.MAX_PATIENCE - 1) // frames.UNANSWERED_COST
    assert count <= 256, "each of them is a flow: all that come in one read are in memory together"
    for stream_id in range(1, 2 * count, 2):
        ours.receive_data(head(stream_id) + RstStreamFrame(stream_id, error_code=8).serialize())
    with pytest.raises(DenialOfServiceError):
        ours.receive_data(head(2 * count + 1) + RstStreamFrame(2 * count + 1, error_code=8).serialize())


def test_who_is_served_may_say_as_much_as_he_likes() -> None:
    """Each answer is credited twice, prodded, and one in two is cancelled after its head."""
    ours = state()
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    client.initiate_connection()
    client.data_to_send()
    for number in range(frames.MAX_PATIENCE):
        stream_id = client.get_next_available_stream_id()
        client.send_headers(stream_id, HEAD, end_stream=True)
        client.increment_flow_control_window(10, stream_id)
        client.prioritize(stream_id, weight=7)
        client.ping(b"12345678")
        ours.receive_data(client.data_to_send())
        ours.send_headers(stream_id, ANSWER)
        if number % 2:
            ours.send_data(stream_id, b"answer", end_stream=True)
        client.receive_data(ours.data_to_send())
        if not number % 2:
            client.reset_stream(stream_id, error_code=8)
    assert goodbye(ours) is None


def test_a_long_upload_may_be_prodded_between_its_pieces() -> None:
    ours = state()
    ours.receive_data(head())
    piece = DataFrame(1, bytes(frames.DESERVING_BYTES)).serialize() + IDLE_BYTES["ping"]
    for _ in range(2 * frames.MAX_PATIENCE):
        ours.receive_data(piece)
        ours.acknowledge_received_data(frames.DESERVING_BYTES, 1)
    assert goodbye(ours) is None


def test_small_pieces_of_a_body_cost_nothing() -> None:
    ours = state()
    ours.receive_data(head())
    for _ in range(2 * frames.MAX_PATIENCE):
        ours.receive_data(DataFrame(1, b"x").serialize())
        ours.acknowledge_received_data(1, 1)
    assert goodbye(ours) is None


def fragments(count: int, size: int) -> list[bytes]:
    first = HeadersFrame(1, bytes(size)).serialize()
    return [first, *(ContinuationFrame(1, bytes(size)).serialize() for _ in range(count))]


@pytest.mark.parametrize(
    ("pieces", "most"),
    [
        (fragments(9, 16 * 1024), 4),
        (fragments(99, 1), 32),
        (fragments(99, 0), 33),
        (fragments(1, 100 * 1024), 0),
    ],
    ids=["large", "small", "empty", "one"],
)
def test_a_header_block_is_bounded_before_it_is_decoded(pieces: list[bytes], most: int) -> None:
    ours = state()
    for piece in pieces[:most]:
        ours.receive_data(piece)
    with pytest.raises(DenialOfServiceError):
        ours.receive_data(pieces[most])
    assert goodbye(ours) == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM


def test_a_header_block_of_several_frames_is_read() -> None:
    ours = state()
    block = Encoder().encode([*HEAD, ("x-long", "v" * 40_000)], huffman=False)
    cut = [block[at : at + 16_384] for at in range(0, len(block), 16_384)]
    for stream_id in (1, 3):  # what one block has cost is not the next one's
        ours.receive_data(HeadersFrame(stream_id, cut[0]).serialize())
        ours.receive_data(ContinuationFrame(stream_id, cut[1]).serialize())
        last = ContinuationFrame(stream_id, cut[2], flags=["END_HEADERS"]).serialize()
        (event,) = ours.receive_data(last)
        assert isinstance(event, h2.events.RequestReceived)
        assert event.headers is not None
        assert (b"x-long", b"v" * 40_000) in event.headers


def indexed_bomb(stream_id: int, references: int) -> bytes:
    """A field of 4000 bytes goes into the table, then is named again and again by one byte each."""
    block = Encoder().encode(HEAD, huffman=False) + Encoder().encode([("x", "v" * 4000)], huffman=False)
    return HeadersFrame(stream_id, block + b"\xbe" * references, flags=["END_HEADERS"]).serialize()


def test_a_header_block_is_bounded_after_it_is_decoded() -> None:
    ours = state()
    with pytest.raises(ProtocolError) as caught:
        ours.receive_data(indexed_bomb(1, 12_000))
    assert caught.value.error_code == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM
    assert goodbye(ours) == h2.errors.ErrorCodes.ENHANCE_YOUR_CALM


def test_the_peer_does_not_size_our_table() -> None:
    ours = state()
    ours.receive_data(SettingsFrame(0, settings={1: 2**32 - 1}).serialize())
    ours.data_to_send()
    decoder = Decoder()
    decoder.max_allowed_table_size = 2**32 - 1
    for number in range(300):
        stream_id = 2 * number + 1
        ours.receive_data(head(stream_id, ends=True))
        ours.send_headers(stream_id, [*ANSWER, (b"x-%d" % number, b"y" * 100)], end_stream=True)
        data = bytes(ours.data_to_send())
        frame, length = Frame.parse_frame_header(memoryview(data)[:9])
        assert isinstance(frame, HeadersFrame)
        frame.parse_body(memoryview(data)[9 : 9 + length])
        decoder.decode(frame.data)
    assert decoder.header_table_size <= frames.ENCODER_TABLE_BYTES
    assert len(ours.encoder.header_table.dynamic_entries) < 100


def test_a_smaller_table_is_respected() -> None:
    ours = state()
    ours.receive_data(SettingsFrame(0, settings={1: 0}).serialize())
    ours.receive_data(head(ends=True))
    ours.send_headers(1, [*ANSWER, (b"x-one", b"two")], end_stream=True)
    assert ours.encoder.header_table_size == 0
    assert not ours.encoder.header_table.dynamic_entries


def test_streams_that_have_ended_are_forgotten() -> None:
    ours = state()
    for number in range(2 * ours.MAX_CLOSED_STREAMS):
        stream_id = 2 * number + 1
        ours.receive_data(head(stream_id, ends=True))
        ours.send_headers(stream_id, ANSWER, end_stream=True)
        ours.data_to_send()
    assert len(ours._closed_streams) <= ours.MAX_CLOSED_STREAMS
    assert len(ours.streams) < 100


class Watched(frames.FrugalState):
    """Knows how much lay behind a frame when that was taken: it is copied then."""

    most_behind_bytes = 0

    @override
    def _receive_frame(self, frame: Frame) -> list[h2.events.Event]:
        self.most_behind_bytes = max(self.most_behind_bytes, len(self.incoming_buffer._data))
        return super()._receive_frame(frame)


def test_many_frames_at_once_are_not_copied_again_and_again() -> None:
    ours = state(Watched)
    ours.receive_data(head())
    events = ours.receive_data(DataFrame(1, b"x").serialize() * 30_000)
    assert sum(isinstance(event, h2.events.DataReceived) for event in events) == 30_000
    assert isinstance(ours, Watched)
    assert ours.most_behind_bytes < frames.STEP_BYTES
