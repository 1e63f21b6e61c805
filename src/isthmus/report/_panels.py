"""Panels: small drawings that stand alone on a phone and are tiled into one picture for a slide."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from isthmus.report._extras import load_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Look", "Panel", "Picture", "literal", "look_of", "png", "render", "tidy", "tile"]

WIDTH = 4.8  # inches: 10 pt text stays legible when a phone shows the panel 350 pixels wide
DOTS_PER_INCH = 200


@dataclass(frozen=True)
class Panel:
    """One drawing: ``draw`` fills an empty figure of the height in inches; ``alt`` says what it shows."""

    alt: str
    height: float
    draw: Callable[[Figure], None]


@dataclass(frozen=True)
class Picture:
    """A titled set of panels; ``name`` is the stem of its PNG file, ``columns`` its layout in that file."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int


@dataclass(frozen=True)
class Look:
    """How a method is drawn everywhere: colour, marker and dashes all differ, so grey prints are legible."""

    colour: str
    marker: str
    dashes: str | tuple[int, tuple[int, ...]]


# The palette of Okabe and Ito (2008) without its yellow, too pale on white.
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", (0, (1, 1)), (0, (5, 1)), "-.", (0, (3, 1, 1, 1)), (0, (7, 2)), (0, (2, 2)))


def look_of(index: int) -> Look:
    """Return the look of the method at a position of the record (the baseline ``none`` is at 0, black)."""
    shift = index // len(_COLOURS)  # a second round pairs every colour with another marker and dash
    return Look(
        _COLOURS[index % len(_COLOURS)],
        _MARKERS[(index + shift) % len(_MARKERS)],
        _DASHES[(index + 2 * shift) % len(_DASHES)],
    )


def literal(text: str) -> str:
    """Keep matplotlib from reading a name as mathematics (``$``) or as a hidden legend entry (``_``)."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def tidy(axes: Axes, title: str, x: str, y: str, *, grid: str = "y") -> None:
    """Give axes their title and labels, a pale grid and no box."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(axis=grid, color="0.9", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def render(panel: Panel) -> np.ndarray:
    """Draw a panel and return its pixels, uint8, shape ``(height, width, 4)``.

    The user's own matplotlib style is set aside while drawing and comes back after; pyplot is not used.
    """
    matplotlib = load_extra("matplotlib")
    figure_module = load_extra("matplotlib.figure")
    agg = load_extra("matplotlib.backends.backend_agg")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = figure_module.Figure(
            figsize=(WIDTH, panel.height), dpi=DOTS_PER_INCH, layout="constrained", facecolor="white"
        )
        canvas = agg.FigureCanvasAgg(figure)
        panel.draw(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba()).copy()


def tile(images: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Lay images out row by row on white, shape ``(height, width, 4)``."""
    height = max(image.shape[0] for image in images)
    width = max(image.shape[1] for image in images)
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, min(columns, len(images)) * width, 4), 255, dtype=np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * height, (i % columns) * width
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return sheet


def png(pixels: np.ndarray) -> bytes:
    """Encode pixels as PNG."""
    buffer = io.BytesIO()
    load_extra("matplotlib.image").imsave(buffer, pixels, format="png", dpi=DOTS_PER_INCH)
    return buffer.getvalue()
