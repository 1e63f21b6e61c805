"""Figures of the theory: rates, widths, certificates, mean field, dropout, dimensions. Plain data in, images out."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.errors import DataError
from isthmus.report._extras import load_extra
from isthmus.report._theory_axes import Account, Drawer, TheoryValues
from isthmus.report._theory_clouds import (
    approximate_dimension_panels,
    dimension_panels,
    rate_panels,
    rates_panels,
    two_regimes_panels,
    width_panels,
)
from isthmus.report._theory_networks import (
    bounds_panels,
    certificate_cost_panels,
    certificate_panels,
    certificate_ratio_panels,
    chord_panels,
    dropout_panels,
    independence_panels,
    mean_field_panels,
)

__all__ = ["THEORY_PICTURES", "TheoryPicture", "draw_theory"]

_WIDTH, _HEIGHT, _DOTS = 4.8, 4.5, 100

_PANELS: Mapping[str, Callable[[TheoryValues], Account]] = {
    "width": width_panels,
    "rate": rate_panels,
    "rates": rates_panels,
    "two_regimes": two_regimes_panels,
    "dimension": dimension_panels,
    "certificate": certificate_panels,
    "certificate_ratio": certificate_ratio_panels,
    "certificate_cost": certificate_cost_panels,
    "meanfield": mean_field_panels,
    "dropout": dropout_panels,
    "approximate_dimension": approximate_dimension_panels,
    "independence": independence_panels,
    "bounds": bounds_panels,
    "lines": chord_panels,
}

THEORY_PICTURES: tuple[str, ...] = tuple(_PANELS)
"""The kinds of figures that :func:`draw_theory` knows."""


@dataclass(frozen=True)
class TheoryPicture:
    """A finished figure: ``png`` and ``svg`` as bytes, and ``alt``, one sentence on what it shows."""

    png: bytes
    svg: bytes
    alt: str


def draw_theory(kind: str, data: TheoryValues) -> TheoryPicture:
    """Draw one of the figures of the theory.

    Args:
        kind: one of :data:`THEORY_PICTURES`.
        data: the record of that kind: what ``isthmus theory … --json`` prints, the functions
            ``isthmus.theory.*_record`` return, and the docstrings of the drawers describe.

    Returns:
        The same figure as PNG and as SVG (text stays text). Colour, marker and dashes of every curve differ, so a
        grey print is legible.

    Raises:
        DataError: an unknown kind, or a record without the fields of its kind.
        MissingExtraError: matplotlib is not installed.
    """
    if kind not in THEORY_PICTURES:
        raise DataError(f"draw_theory: expected a kind among {', '.join(THEORY_PICTURES)}, found {kind!r}.")
    try:
        alt, panels = _PANELS[kind](data)
        return _picture(alt, panels)
    except (KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"draw_theory: the record is no {kind!r} record ({type(error).__name__}: {error}). "
            f"Make it with isthmus.theory or `isthmus theory … --json`."
        ) from error


def _picture(alt: str, panels: Sequence[Drawer]) -> TheoryPicture:
    matplotlib = load_extra("matplotlib")
    figure_module = load_extra("matplotlib.figure")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {"svg.fonttype": "none", "svg.hashsalt": "isthmus", "legend.fontsize": 8.5}
        )
        size = (_WIDTH * len(panels), _HEIGHT)
        figure = figure_module.Figure(figsize=size, dpi=_DOTS, layout="constrained", facecolor="white")
        for axes, draw in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
            draw(axes)
        images = []
        for name, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=name, metadata=metadata)
            images.append(buffer.getvalue())
    return TheoryPicture(images[0], images[1], alt)
