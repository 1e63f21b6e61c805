"""What the figures of the theory share: curves, guides, legends and logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from isthmus.report._extras import load_extra
from isthmus.report._panels import look_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Account",
    "TheoryValues",
    "Drawer",
    "guide",
    "legend",
    "line",
    "log_log",
    "log_values",
    "minus",
    "show",
    "ticks",
]

TheoryValues = Mapping[str, Any]
Drawer = Callable[["Axes"], None]
Account = tuple[str, list[Drawer]]
"""One sentence on what a figure shows, and its panels."""

_TWO_DECADES = 80.0
_LONG_NAME = 36


def line(axes: Axes, x: Any, y: Any, index: int, text: str | None, **style: Any) -> None:
    """Plot a curve in the look of its index; entries that are None are gaps."""
    look = look_of(index)
    values = np.array([math.nan if v is None else v for v in y], dtype=float)
    defaults = {"markersize": 5, "markeredgecolor": "white", "markeredgewidth": 0.4, "linewidth": 1.7}
    looks = {"color": look.colour, "linestyle": look.dashes, "marker": look.marker, "label": text}
    axes.plot(np.asarray(x, dtype=float), values, **{**defaults, **looks, **style})


def guide(axes: Axes, x: Sequence[float], anchor: float, slope: float, text: str) -> None:
    """Draw a grey power law through ``(x[0], anchor)``."""
    grid = np.array([x[0], x[-1]], dtype=float)
    axes.plot(
        grid, anchor * (grid / grid[0]) ** slope, color="0.55", linestyle=":", linewidth=1.4, label=text
    )


def legend(axes: Axes, size: float = 8.5) -> None:
    """Put the legend below the axes, where it hides nothing: two columns, or one where names are long."""
    _, texts = axes.get_legend_handles_labels()
    columns = 2 if max((len(text) for text in texts), default=0) <= _LONG_NAME else 1
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.15),
        ncols=columns,
        frameon=False,
        fontsize=size,
        handlelength=3.4,
        columnspacing=1.2,
    )


def log_log(axes: Axes, x: Sequence[float]) -> None:
    """Make both axes logarithmic, with the measured positions as ticks."""
    axes.set_xscale("log", base=2)
    ticks(axes, x)
    log_values(axes, "y")


def log_values(axes: Axes, which: str) -> None:
    """Make one axis logarithmic with plain numbers as ticks, also between powers of ten where it is short."""
    ticker = load_extra("matplotlib.ticker")
    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")
    low, high = getattr(axes, f"get_{which}lim")()
    subs = (1.0, 2.0, 5.0) if high < _TWO_DECADES * low else (1.0,)
    axis.set_major_locator(ticker.LogLocator(base=10, subs=subs))
    axis.set_major_formatter(ticker.FuncFormatter(_plain_number))
    axis.set_minor_formatter(ticker.NullFormatter())


def _plain_number(value: float, _: int | None = None) -> str:
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    return f"$10^{{{round(math.log10(value))}}}$" if value > 0 else ""


def ticks(axes: Axes, x: Sequence[float]) -> None:
    """Label the measured positions of the horizontal axis, at most about seven of them."""
    shown = list(x) if len(x) <= 7 else list(x)[:: 2 if len(x) <= 14 else 4]
    axes.set_xticks(shown, [f"{v:g}" for v in shown])
    axes.set_xticks([], minor=True)


def minus(value: float | None, digits: int = 2) -> str:
    """Write a number with a true minus sign."""
    return "unknown" if value is None else f"{value:.{digits}f}".replace("-", "−")


def show(value: float | None) -> str:
    """Write a number to three digits."""
    return "unknown" if value is None else f"{value:.3g}".replace("-", "−")
