"""Requests per environment over time, as an SVG made by hand: no dependency, readable without colours.

1. One band per environment, so that none hides another; all have one scale.
2. What was done at a time is a line through all bands, named above them; names that would overlap take turns in height.
3. Text is escaped; nothing is loaded from anywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 1100
_LEFT, _RIGHT, _TOP, _BOTTOM = 150, 40, 116, 60
_BAND: Final = 120
_GAP: Final = 26
_ROWS: Final = 3
_FONT: Final = "system-ui, sans-serif"


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that was done."""

    at_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shade:
    """An environment served nothing, and was not to, from *begin_s* to *end_s*."""

    name: str
    begin_s: float
    end_s: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    title: str
    footer: str
    times_s: Sequence[float]
    """Of the samples, ascending, from 0."""
    counts: Mapping[str, Sequence[int]]
    """By environment: how many it had answered altogether at each sample."""
    colours: Mapping[str, str]
    moments: Sequence[Moment] = ()
    shades: Sequence[Shade] = ()

    def svg(self) -> str:
        """The whole file."""
        rates = {name: _rates(self.times_s, counts) for name, counts in self.counts.items()}
        most = max((rate for band in rates.values() for _, rate in band), default=0.0)
        scale = _round_up(most)
        height = _TOP + len(rates) * (_BAND + _GAP) + _BOTTOM
        parts = [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
                f'width="{WIDTH}" height="{height}" font-family="{_FONT}" font-size="13">'
            ),
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            f'<text x="20" y="34" font-size="20" font-weight="600" fill="#1c1e21">{escape(self.title)}</text>',
        ]
        for number, (name, band) in enumerate(rates.items()):
            parts += self._band(name, band, _TOP + number * (_BAND + _GAP), scale)
        parts += self._moments(height - _BOTTOM - _GAP)
        parts += self._axis(height - _BOTTOM - _GAP)
        parts.append(
            f'<text x="20" y="{height - 14}" fill="#5a5f66" font-size="12">{escape(self.footer)}</text>'
        )
        return "\n".join([*parts, "</svg>"]) + "\n"

    @property
    def _end_s(self) -> float:
        return max(self.times_s[-1], 1.0) if self.times_s else 1.0

    def _x(self, at_s: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * min(max(at_s / self._end_s, 0.0), 1.0)

    def _band(self, name: str, band: Sequence[tuple[float, float]], top: float, scale: float) -> list[str]:
        base, right = top + _BAND, WIDTH - _RIGHT
        colour = self.colours[name]

        def y(rate: float) -> float:
            return base - _BAND * rate / scale

        parts = [
            f'<text x="20" y="{top + 22}" font-weight="600" fill="{colour}">{escape(name)}</text>',
            f'<text x="{_LEFT - 8}" y="{top + 5}" text-anchor="end" fill="#5a5f66" font-size="11">{scale:g}/s</text>',
            f'<text x="{_LEFT - 8}" y="{base + 4}" text-anchor="end" fill="#5a5f66" font-size="11">0</text>',
            f'<line x1="{_LEFT}" y1="{top}" x2="{right}" y2="{top}" stroke="#e3e5e8"/>',
            f'<line x1="{_LEFT}" y1="{base}" x2="{right}" y2="{base}" stroke="#9aa0a6"/>',
        ]
        for shade in self.shades:
            if shade.name == name:
                begin, end = self._x(shade.begin_s), self._x(shade.end_s)
                parts.append(
                    f'<rect x="{begin:.1f}" y="{top}" width="{end - begin:.1f}" height="{_BAND}" fill="#c0392b" fill-opacity="0.08"/>'
                )
                parts.append(
                    f'<text x="{(begin + end) / 2:.1f}" y="{top + _BAND / 2 + 4}" text-anchor="middle" fill="#a93226">{escape(shade.text)}</text>'
                )
        if band:
            line = " ".join(f"{self._x(at_s):.1f},{y(rate):.1f}" for at_s, rate in band)
            first, last = self._x(band[0][0]), self._x(band[-1][0])
            parts.append(
                f'<polygon points="{first:.1f},{base} {line} {last:.1f},{base}" fill="{colour}" fill-opacity="0.18"/>'
            )
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        return parts

    def _moments(self, bottom: float) -> list[str]:
        parts: list[str] = []
        ends = [0.0] * _ROWS
        """By row of text: where the last name in it ends."""
        for moment in sorted(self.moments, key=lambda one: one.at_s):
            x = self._x(moment.at_s)
            wide = 7.0 * len(moment.text) + 14
            begin = min(x + 4, WIDTH - wide)
            row = next((number for number, end in enumerate(ends) if end <= begin), _ROWS - 1)
            ends[row] = begin + wide
            y = 66 + row * 20
            parts.append(
                f'<line x1="{x:.1f}" y1="{y - 10}" x2="{x:.1f}" y2="{bottom}" stroke="#5a5f66" stroke-dasharray="3 3"/>'
            )
            parts.append(f'<text x="{begin:.1f}" y="{y}" fill="#1c1e21">{escape(moment.text)}</text>')
        return parts

    def _axis(self, bottom: float) -> list[str]:
        step_s = next(
            step
            for step in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
            if self._end_s / step <= 12 or step == 600
        )
        return [
            f'<text x="{self._x(at_s):.1f}" y="{bottom + 18}" text-anchor="middle" fill="#5a5f66" font-size="11">{at_s} s</text>'
            for at_s in range(0, int(self._end_s) + 1, step_s)
        ]


def _rates(times_s: Sequence[float], counts: Sequence[int]) -> list[tuple[float, float]]:
    """Requests per second between each two samples, at the middle of the two."""
    return [
        ((times_s[i] + times_s[i - 1]) / 2, (counts[i] - counts[i - 1]) / (times_s[i] - times_s[i - 1]))
        for i in range(1, len(times_s))
        if times_s[i] > times_s[i - 1]
    ]


def _round_up(most: float) -> float:
    """The next 1, 2 or 5 with zeros."""
    scale = 1.0
    while True:
        for digit in (1, 2, 5):
            if digit * scale >= most:
                return digit * scale
        scale *= 10
