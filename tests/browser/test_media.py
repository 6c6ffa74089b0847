"""A video at the application, sealed: it plays in the browser, and seeking asks for ranges of it."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Page, Response

from tests.browser.browser_site import browser, only_the_proxy_resolves, signed_in, site
from tests.browser.webm import frame_of_webp, video

FRAMES, FRAME_MS, WIDTH, HEIGHT = 40, 1000, 640, 360

# A frame says its number by its colour, in a block at its corner; the rest is noise, which takes up room.
DRAW = """
async ([frames, width, height]) => {
    const canvas = Object.assign(document.createElement("canvas"), {width, height});
    const context = canvas.getContext("2d");
    const noise = context.createImageData(width, height);
    const made = [];
    for (let number = 0; number < frames; number++) {
        for (let at = 0; at < noise.data.length; at += 65536)
            crypto.getRandomValues(noise.data.subarray(at, at + 65536));
        for (let at = 3; at < noise.data.length; at += 4) noise.data[at] = 255;
        context.putImageData(noise, 0, 0);
        context.fillStyle = `rgb(${number * 6}, ${255 - number * 6}, 128)`;
        context.fillRect(0, 0, 64, 64);
        made.push(canvas.toDataURL("image/webp", 0.9).split(",")[1]);
    }
    return made;
}
"""
PLAY = """
async ([address, times]) => {
    const player = Object.assign(document.createElement("video"), {muted: true, preload: "metadata"});
    document.body.append(player);
    const when = (name) => new Promise((resolve, reject) => {
        player.addEventListener(name, resolve, {once: true});
        player.addEventListener("error", () => reject(new Error(player.error.message)), {once: true});
    });
    const ready = when("loadeddata");
    player.src = address;
    await ready;
    const canvas = Object.assign(document.createElement("canvas"), {width: 16, height: 16});
    const context = canvas.getContext("2d", {willReadFrequently: true});
    const shown = [];
    for (const time of times) {
        const there = when("seeked");
        player.currentTime = time;
        await there;
        context.drawImage(player, 24, 24, 16, 16, 0, 0, 16, 16);
        shown.push(context.getImageData(8, 8, 1, 1).data[0]);
    }
    const seen = {duration: player.duration, width: player.videoWidth, shown, ranges: player.seekable.length};
    player.remove();
    return seen;
}
"""


@pytest.fixture(autouse=True)
def _name(monkeypatch: pytest.MonkeyPatch) -> None:
    only_the_proxy_resolves(monkeypatch)


async def filmed(page: Page) -> bytes:
    pictures = await page.evaluate(DRAW, [FRAMES, WIDTH, HEIGHT])
    frames = [frame_of_webp(base64.b64decode(picture)) for picture in pictures]
    return video(frames, width=WIDTH, height=HEIGHT, frame_ms=FRAME_MS)


def collector(answers: list[Response]) -> Callable[[Response], None]:
    def collect(answer: Response) -> None:
        answers.append(answer)

    return collect


def numbers_of(shown: list[int]) -> list[int]:
    """Of the frames whose colours were seen: encoding has moved them a little."""
    return [round(colour / 6) for colour in shown]


async def test_a_video_plays_and_is_sought_in(tmp_path: Path) -> None:
    async with site(tmp_path) as place, browser(place) as context:
        page = await signed_in(context, place, "forward")
        film = await filmed(page)
        assert len(film) > 4_000_000, "more than a browser reads ahead"
        (tmp_path / "film.webm").write_bytes(film)
        await page.click("a[data-dest=bup]")
        await page.set_input_files("#op_bup input[type=file]", tmp_path / "film.webm")
        async with page.expect_navigation():
            await page.click("#op_bup input[type=submit]")
        assert place.opened([film]) == {"film.webm": film}
        for way in ("forward", "reverse"):
            if way == "reverse":
                page = await signed_in(context, place, way)
            answers: list[Response] = []
            page.on("response", collector(answers))
            seen: dict[str, Any] = await page.evaluate(
                PLAY, [f"{place.base(way)}/film.webm", [35.5, 3.5, 38.5, 20.5]]
            )
            assert seen["duration"] == FRAMES * FRAME_MS / 1000
            assert seen["width"] == WIDTH
            assert numbers_of(seen["shown"]) == [35, 3, 38, 20]
            ranges = [answer for answer in answers if answer.url.endswith("film.webm")]
            assert all(answer.status == 206 for answer in ranges)
            starts = {int(answer.headers["content-range"].split()[1].split("-")[0]) for answer in ranges}
            assert len(starts) > 1, "it was sought by ranges, not read through"
            assert any(start > len(film) // 2 for start in starts)
            totals = {answer.headers["content-range"].rpartition("/")[2] for answer in ranges}
            assert totals == {str(len(film))}


def test_a_picture_that_is_no_frame() -> None:
    empty = b"RIFF" + bytes(4) + b"WEBP"
    for picture in (b"", b"GIF89a" + bytes(20), empty, empty + b"VP8L" + bytes(4)):
        with pytest.raises(ValueError, match="WebP picture"):
            frame_of_webp(picture)
