"""Charts of the report as inline SVG: colours and fonts come from the page, light or dark.

Each is drawn 360 units wide, so that its text is readable on a phone, and carries its figures in
words for people who do not see it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 360.0
LEFT, RIGHT, TOP = 42.0, 10.0, 10.0


@dataclass(frozen=True)
class Series:
    """Points of one line, or heights of one kind of bar."""

    name: str
    css: str
    """Class that the page colours: ``base``, ``head``, ``predicted``."""
    x: Sequence[float]
    y: Sequence[float]
    joined: bool = True
    """Draw a line through the points of :func:`lines`."""


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``, both ends covered."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label, as short as it can be."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.10g}"


def percent(value: float) -> str:
    return f"{value:.0%}"


def _svg(height: float, title: str, words: str, body: list[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" aria-label="{escape(title)}. '
        f'{escape(words)}">' + "".join(body) + "</svg>"
    )


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _rect(x: float, y: float, w: float, h: float, css: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(w, 0):.1f}" height="{max(h, 0):.1f}" rx="2" '
        f'class="{css}"/>'
    )


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / ((high - low) or 1) * (end - start)


def bars(
    title: str,
    groups: Sequence[str],
    series: Sequence[Series],
    label: Callable[[float], str] = percent,
    top: float = 1.0,
    height: float = 190.0,
) -> str:
    """Grouped vertical bars, each with its figure above it."""
    bottom = height - 22
    y = _scale(0, top, bottom, TOP + 8)
    body = []
    for tick in ticks(0, top):
        body += [
            _line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"),
            _text(LEFT - 6, y(tick) + 3.5, label(tick), "tick", "end"),
        ]
    room = (WIDTH - LEFT - RIGHT) / len(groups)
    wide = min(34.0, room * 0.8 / len(series))
    for g, group in enumerate(groups):
        middle = LEFT + room * (g + 0.5)
        body.append(_text(middle, height - 6, group, "tick"))
        for s, one in enumerate(series):
            if g >= len(one.y):
                continue
            x = middle + (s - len(series) / 2) * wide
            body.append(_rect(x + 1, y(one.y[g]), wide - 2, bottom - y(one.y[g]), f"bar {one.css}"))
            figure = label(one.y[g])
            if wide < 27:  # a figure with its sign is as wide; the axis has the sign
                figure = figure.removesuffix("%")
            if wide >= 17:
                body.append(_text(x + wide / 2, y(one.y[g]) - 4, figure, "value"))
    body.append(_line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis"))
    words = "; ".join(f"{s.name}: {', '.join(label(v) for v in s.y)}" for s in series)
    return _svg(height, title, words, body)


def lines(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_format: Callable[[float], str] = number,
    log_x: bool = False,
    mark: tuple[float, float, str] | None = None,
    from_zero: bool = False,
    height: float = 200.0,
) -> str:
    """Lines over a common axis; ``mark`` is a point to name: x, y, text."""
    bottom = height - 36
    at = (lambda v: math.log10(max(v, 1))) if log_x else float
    xs = [at(v) for s in series for v in s.x]
    ys = [v for s in series for v in s.y] + [0.0] * from_zero
    y_ticks = ticks(min(ys), max(ys))
    x = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y = _scale(y_ticks[0], y_ticks[-1], bottom, TOP)
    body = []
    for tick in y_ticks:
        body += [
            _line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"),
            _text(LEFT - 6, y(tick) + 3.5, y_format(tick), "tick", "end"),
        ]
    if log_x:
        lowest, highest = math.ceil(min(xs)), math.floor(max(xs))
        x_ticks = [10.0**p for p in range(lowest, highest + 1)]
    else:
        x_ticks = [t for t in ticks(min(xs), max(xs)) if min(xs) <= t <= max(xs)]
    body += [_text(x(at(t)), bottom + 14, number(t), "tick") for t in x_ticks]
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, x_label, "label"))
    body.append(_line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis"))
    for one in series:
        points = " ".join(f"{x(at(a)):.1f},{y(b):.1f}" for a, b in zip(one.x, one.y, strict=True))
        if one.joined:
            body.append(f'<polyline points="{points}" class="line {one.css}"/>')
        if len(one.x) <= 12:
            body += [
                f'<circle cx="{x(at(a)):.1f}" cy="{y(b):.1f}" r="3" class="dot {one.css}"/>'
                for a, b in zip(one.x, one.y, strict=True)
            ]
    if mark:
        mx, my = x(at(mark[0])), y(mark[1])
        # Right below: a rising curve leaves that side free.
        edge = min(mx + 8, WIDTH - RIGHT - 6.2 * len(mark[2]))
        body += [
            f'<circle cx="{mx:.1f}" cy="{my:.1f}" r="4.5" class="dot head mark"/>',
            _text(edge, my + 20, mark[2], "value", "start"),
        ]
    ends = [f"{s.name}: from {y_format(s.y[0])} to {y_format(s.y[-1])}" for s in series]
    return _svg(height, title, "; ".join(ends), body)


def intervals(title: str, rows: Sequence[tuple[str, float, float, float]]) -> str:
    """A row for each ratio with its interval (label, ratio, low, high), and a line at 1."""
    # A letter is 6.2 wide: 16 of them, or 21 of longer names, whose middles make room.
    left = 112.0 if all(len(row[0]) <= 16 for row in rows) else 142.0
    pitch = 26.0
    height = TOP + pitch * len(rows) + 24
    low = min(0.9, *(r[2] for r in rows))
    marks = ticks(low, max(1.1, *(r[3] for r in rows)), 5)
    x = _scale(marks[0], marks[-1], left, WIDTH - 44)
    bottom = height - 20
    body = []
    for tick in marks:
        body += [
            _line(x(tick), TOP, x(tick), bottom, "grid"),
            _text(x(tick), height - 6, f"{tick:.10g}×", "tick"),
        ]
    body.append(_line(x(1), TOP - 4, x(1), bottom, "one"))
    for i, (label, ratio, a, b) in enumerate(rows):
        middle = TOP + pitch * (i + 0.5)
        css = "good" if a > 1 else "bad" if b < 1 else "unsure"
        shown = label if len(label) <= 21 else f"{label[:10]}…{label[-10:]}"
        body += [
            _text(left - 10, middle + 4, shown, "label", "end"),
            _line(x(a), middle, x(b), middle, f"whisker {css}"),
            *(_line(x(v), middle - 4, x(v), middle + 4, f"cap {css}") for v in (a, b)),
            f'<circle cx="{x(ratio):.1f}" cy="{middle:.1f}" r="3.5" class="dot {css}"/>',
            _text(WIDTH - 2, middle + 4, f"{ratio:.2f}×", "value", "end"),
        ]
    words = "; ".join(
        f"{label}: {ratio:.2f} times, {low:.2f} to {high:.2f}" + (", spans 1" * (low <= 1 <= high))
        for label, ratio, low, high in rows
    )
    return _svg(height, title, words, body)


def stacks(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, str, float]]]]) -> str:
    """Horizontal stacked bars on one scale: (label, [(part, class, milliseconds)])."""
    left, pitch = 88.0, 34.0
    height = TOP + pitch * len(rows) + 22
    longest = max(sum(part[2] for part in parts) for _, parts in rows)
    marks = ticks(0, longest)
    x = _scale(0, marks[-1], left, WIDTH - 16)
    bottom = height - 20
    body = []
    for tick in marks:
        body += [
            _line(x(tick), TOP, x(tick), bottom, "grid"),
            _text(x(tick), height - 6, number(tick), "tick"),
        ]
    for i, (label, parts) in enumerate(rows):
        top, at = TOP + pitch * i + 5, 0.0
        body.append(_text(left - 10, top + 15, label, "label", "end"))
        for name, css, size in parts:
            wide = x(at + size) - x(at)
            if not size:
                continue
            body.append(_rect(x(at), top, wide - 1, 22, f"bar {css}"))
            if wide > 7 * len(name) + 6:
                body.append(_text(x(at) + wide / 2, top + 15, name, f"inside {css}"))
            at += size
    words = "; ".join(
        f"{label}: " + ", ".join(f"{name} {size:.3g} ms" for name, _, size in parts)
        for label, parts in rows
    )
    return _svg(height, title, words, body)
