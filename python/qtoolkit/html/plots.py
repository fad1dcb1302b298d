"""Plots as inline SVG; their colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _HEIGHT = 960, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 20, 26


def _step(extent: float, count: int = 5) -> float:
    """A round number of which about ``count`` make up the extent."""
    step = 10.0 ** math.floor(math.log10(extent / count))
    return next(step * m for m in (1, 2, 5, 10) if extent / (step * m) <= count)


def _frame(values: Sequence[float], unit: str, parts: list[str], order: str) -> tuple[float, float]:
    """Adds axes to ``parts``; returns the range of the vertical one."""
    low, high = min([0.0, *values]), max([0.0, *values])
    if low == high:
        high = low + 1.0
    step = _step(high - low)
    first, last = math.floor(low / step), math.ceil(high / step)
    low, high = first * step, last * step
    for i in range(first, last + 1):
        y = _place(i * step, low, high)
        parts.append(f'<path class="axis" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{i * step:g}</text>')
    parts.append(f'<text x="4" y="12">{escape(unit)}</text>')
    place = f'x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 6}" text-anchor="end"'
    parts.append(f"<text {place}>{escape(order)}</text>")
    return low, high


def _place(value: float, low: float, high: float) -> float:
    """The vertical place of a value."""
    return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)


def _svg(parts: list[str], label: str, width: int = _WIDTH, height: int = _HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(label)}">' + "".join(parts) + "</svg>"
    )


def _columns(count: int) -> float:
    return (_WIDTH - _LEFT - _RIGHT) / max(count, 1)


def points(names: Sequence[str], values: Sequence[float], unit: str, label: str) -> str:
    """Values in the order of the network, joined by a line; those that are not finite are left out.

    Args:
        names: of each value, shown where the pointer rests.
        values: as many.
        unit: of the vertical axis.
        label: what the plot shows, for readers that do not see it.
    """
    parts: list[str] = []
    finite = [value for value in values if math.isfinite(value)]
    low, high = _frame(finite, unit, parts, "layers, from input to output")
    step = _columns(len(values))
    dots: list[str] = []
    path: list[str] = []
    for i, (name, value) in enumerate(zip(names, values)):
        if math.isfinite(value):
            x, y = _LEFT + (i + 0.5) * step, _place(value, low, high)
            path.append(f"{'L' if path else 'M'}{x:.1f} {y:.1f}")
            title = f"<title>{escape(name)}: {value:.4g} {escape(unit)}</title>"
            dots.append(
                f'<circle class="series hit" cx="{x:.1f}" cy="{y:.1f}" r="4">{title}</circle>'
            )
    return _svg([*parts, f'<path class="path" d="{"".join(path)}"/>', *dots], label)


def bars(
    names: Sequence[str],
    values: Sequence[float],
    unit: str,
    label: str,
    order: str = "layers, from input to output",
) -> str:
    """A bar for each value; arguments as for ``points``, and what their order is."""
    parts: list[str] = []
    low, high = _frame([v for v in values if math.isfinite(v)], unit, parts, order)
    step = _columns(len(values))
    for i, (name, value) in enumerate(zip(names, values)):
        if math.isfinite(value):
            top, bottom = sorted((_place(value, low, high), _place(0.0, low, high)))
            width = max(min(step - 1, 28), 1)
            x = _LEFT + (i + 0.5) * step - width / 2
            parts.append(
                f'<rect class="series hit" x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" '
                f'height="{max(bottom - top, 0.5):.1f}"><title>{escape(name)}: {value:.4g} '
                f"{escape(unit)}</title></rect>"
            )
    return _svg(parts, label)


def histogram(
    counts: Sequence[float],
    low: float,
    high: float,
    chosen: tuple[float, float] | None,
    label: str,
) -> str:
    """A small histogram, its counts on a logarithmic scale, with the range that codes cover.

    Args:
        counts: of bins of equal width.
        low: where the first bin begins.
        high: where the last one ends.
        chosen: the range that codes cover; None for float.
        label: what it shows, for readers that do not see it.
    """
    width, height, floor = 260, 64, 50
    left, right = (low, high) if chosen is None else (min(low, chosen[0]), max(high, chosen[1]))
    if left == right:
        right = left + 1.0
    at = [2 + (width - 4) * (edge - left) / (right - left) for edge in (low, high)]
    tallest = math.log1p(max(counts, default=0.0)) or 1.0
    parts = []
    if chosen is not None:
        edges = [2 + (width - 4) * (edge - left) / (right - left) for edge in chosen]
        parts.append(
            f'<rect class="chosen" x="{edges[0]:.1f}" y="2" width="{edges[1] - edges[0]:.1f}" '
            f'height="{floor - 2}"/>'
        )
    bin_width = (at[1] - at[0]) / max(len(counts), 1)
    outline = [f"M{at[0]:.1f} {floor}"]
    for i, count in enumerate(counts):
        y = floor - (floor - 4) * math.log1p(count) / tallest
        outline.append(f"V{y:.1f}H{at[0] + (i + 1) * bin_width:.1f}")
    parts.append(f'<path class="series" d="{"".join(outline)}V{floor}Z"/>')
    if chosen is not None:
        parts += [f'<path class="edge" d="M{x:.1f} 2V{floor}"/>' for x in edges]
    parts.append(f'<text x="2" y="{height - 2}">{left:.3g}</text>')
    parts.append(f'<text x="{width - 2}" y="{height - 2}" text-anchor="end">{right:.3g}</text>')
    return _svg([f"<title>{escape(label)}</title>", *parts], label, width, height)
