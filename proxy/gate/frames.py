"""What an HTTP/2 peer may make us do for nothing: frames cost their sender next to nothing, and us a call.

hyper-h2 bounds what a header block becomes when it is decoded (64 KiB, which ends HPACK bombs), but not what
it was before, nor how many frames come that move nothing; mitmproxy takes frames of 128 KiB. The rules:

1. A peer has MAX_PATIENCE frames that move nothing: SETTINGS, PING, PRIORITY, WINDOW_UPDATE, empty DATA and
   what is unknown; a stream that it resets costs RESET_COST of them, and UNANSWERED_COST if nothing was
   said on it yet: a flow was made for that, and as many as come in one read stand in memory together. Each
   frame of a message that we send earns EARNED of them back, and DATA that deserves its frame one: who is
   served may say as much as he likes. A service's HEADERS count, too: informational answers (1xx) are without
   number, and a request earns more. Beyond that the connection ends by ENHANCE_YOUR_CALM. There is no clock
   in it.
2. A header block has at most MAX_BLOCK_BYTES before it is decoded, CONTINUATION frames included. Each of
   these counts as MIN_FRAGMENT_BYTES at least.
3. The peer may not make our HPACK encoder remember more than ENCODER_TABLE_BYTES, which it would search.
4. Of streams that have ended MAX_CLOSED_STREAMS are remembered, for frames that cross their end.
5. Frames are taken from STEP_BYTES at a time: hyper-h2 copies all that is left behind each frame.
"""

from typing import Final, override

import h2.connection
import h2.events
import h2.frame_buffer
from h2.exceptions import DenialOfServiceError
from h2.settings import SettingCodes
from hyperframe.frame import ContinuationFrame, DataFrame, Frame, HeadersFrame, RstStreamFrame, SettingsFrame
from mitmproxy.proxy.layers.http import _http_h2

MAX_PATIENCE: Final = 4096
"""About a tenth of a second of our time."""
RESET_COST: Final = 4
UNANSWERED_COST: Final = 16
"""256 of them without a word in between: more than two whole sets of 100 concurrent streams given up."""
EARNED: Final = 4
"""A client may answer each of our frames by two WINDOW_UPDATEs, and reset a stream after its head."""
DESERVING_BYTES: Final = 1024
MAX_BLOCK_BYTES: Final = 64 * 1024
"""As much as it may become: who encodes does not make it longer."""
MIN_FRAGMENT_BYTES: Final = 2048
ENCODER_TABLE_BYTES: Final = 4096
STEP_BYTES: Final = 16 * 1024

PINNED: Final[tuple[object, ...]] = (
    h2.connection.H2Connection._receive_frame,  # noqa: SLF001 - the pin is what makes leaning on it bearable
    h2.connection.H2Connection._receive_settings_frame,  # noqa: SLF001
    h2.connection.H2Connection._prepare_for_sending,  # noqa: SLF001
    h2.frame_buffer.FrameBuffer,
)


class _BoundedBlocks(h2.frame_buffer.FrameBuffer):
    """Rule 2."""

    def __init__(self, *, server: bool) -> None:
        super().__init__(server=server)
        self._block_bytes = 0

    @override
    def _update_header_buffer(self, f: Frame | None) -> Frame | None:
        if isinstance(f, HeadersFrame):
            self._block_bytes = len(f.data)
        elif isinstance(f, ContinuationFrame):
            self._block_bytes += max(len(f.data), MIN_FRAGMENT_BYTES)
        if self._block_bytes > MAX_BLOCK_BYTES:
            raise DenialOfServiceError("a header block that is too long")
        return super()._update_header_buffer(f)


class FrugalState(_http_h2.BufferedH2Connection):
    """mitmproxy's HTTP/2 state machine, with patience that ends."""

    MAX_CLOSED_STREAMS = 2048

    def __init__(self, config: h2.config.H2Configuration) -> None:
        super().__init__(config)
        self.incoming_buffer = _BoundedBlocks(server=not config.client_side)
        self._patience = MAX_PATIENCE

    @override
    def receive_data(self, data: bytes) -> list[h2.events.Event]:
        if len(data) <= STEP_BYTES:
            return self._receive(data)
        view, received = memoryview(data), list[h2.events.Event]()
        for start in range(0, len(data), STEP_BYTES):
            received += self._receive(bytes(view[start : start + STEP_BYTES]))
        return received

    def _receive(self, data: bytes) -> list[h2.events.Event]:
        received: list[h2.events.Event] = super().receive_data(data)
        return received

    @override
    def _receive_frame(self, frame: Frame) -> list[h2.events.Event]:
        if isinstance(frame, DataFrame):
            if not frame.data:
                self._patience -= "END_STREAM" not in frame.flags
            elif len(frame.data) >= DESERVING_BYTES:
                self._earn(1)
        elif isinstance(frame, RstStreamFrame):
            self._patience -= RESET_COST if self._has_answered(frame.stream_id) else UNANSWERED_COST
        elif not isinstance(frame, HeadersFrame) or self.config.client_side:
            self._patience -= 1
        if self._patience < 0:
            raise DenialOfServiceError("too many frames that move nothing")
        return super()._receive_frame(frame)

    @override
    def _prepare_for_sending(self, frames: list[Frame]) -> None:
        for frame in frames:
            if isinstance(frame, DataFrame | HeadersFrame):
                self._earn(EARNED)
        super()._prepare_for_sending(frames)

    def _has_answered(self, stream_id: int) -> bool:
        """Whether we have said something on it, or it is over, or was none."""
        stream = self.streams.get(stream_id)
        return stream is None or bool(stream.state_machine.headers_sent)

    def _earn(self, count: int) -> None:
        self._patience = min(self._patience + count, MAX_PATIENCE)

    @override
    def _receive_settings_frame(self, frame: SettingsFrame) -> tuple[list[Frame], list[h2.events.Event]]:
        wanted = frame.settings.get(SettingCodes.HEADER_TABLE_SIZE)
        if wanted is not None:  # less than is allowed may be used without a word (RFC 9113, 6.5.2)
            frame.settings[SettingCodes.HEADER_TABLE_SIZE] = min(wanted, ENCODER_TABLE_BYTES)
        return super()._receive_settings_frame(frame)
