"""What the numbers of an explanation say, in words that can be acted on."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.explanation._layers import LayerStatistics
from isthmus.explanation._prefixes import Stage
from isthmus.explanation._split import BarrierSplit

__all__ = ["HARDLY", "finding_words"]

HARDLY = 0.4
"""Correlation below which units are called hardly matched, on average over a layer: the middle of two such units has
``(1 + 0.4) / 2 = 0.7`` of their variance, the loss from which networks of Jordan et al. 2022 (arXiv:2211.08403)
collapse over a few layers. By the same measure a layer is said to lose its variance where less is left than that
correlation explains (0.7 in the middle)."""
NOISE = 2.0
"""Standard errors below which a rise is no rise."""
SCALE = 0.25
"""Part of the rise from which one factor on the logits is worth trying."""
FEW, TWICE = 0.1, 2.0
MOST = 0.5
_REPAIR = "--repair repair (--repair auto chooses)"


def finding_words(
    t: float,
    rise: float,
    split: BarrierSplit | None,
    layers: Sequence[LayerStatistics],
    stages: Sequence[Stage],
    aligned: bool,
    repaired: bool,
) -> tuple[str, ...]:
    """Return sentences, the most important first.

    Args:
        t: the position.
        rise: of the loss above the chord there.
        split: what it consists of, if that is known.
        layers: in the order in which they are run.
        stages: likewise.
        aligned: whether B was relabelled.
        repaired: whether the point was repaired.
    """
    error = 0.0 if split is None or split.error is None else split.error
    if rise <= NOISE * error or rise <= 0:
        return (
            f"The loss at t = {t:g} does not rise above the chord by more than {NOISE:g} standard errors: there is "
            "no barrier to explain here.",
        )
    found = [
        *_matched(layers, aligned),
        *_variance(t, layers, repaired),
        *_where(rise, stages),
        *([] if split is None else _carried(split, repaired)),
    ]
    return tuple(found)


def _matched(layers: Sequence[LayerStatistics], aligned: bool) -> list[str]:
    hidden = [layer for layer in layers[:-1] if layer.correlation is not None]
    low = [layer for layer in hidden if layer.correlation is not None and layer.correlation < HARDLY]
    if not low:
        return []
    some = ", ".join(f"{layer.name} ({_number(layer.correlation)})" for layer in low[:3])
    more = f" and {len(low) - 3} more" if len(low) > 3 else ""
    what = (
        "Align with a method that compares activations (activations, correlation), give it more data, or refine."
        if aligned
        else "The networks were not relabelled: align them first (isthmus align, or --method)."
    )
    return [f"Units are hardly matched in {some}{more}: correlations below {HARDLY:g}. {what}"]


def _variance(t: float, layers: Sequence[LayerStatistics], repaired: bool) -> list[str]:
    limit = (1 - t) ** 2 + t**2 + 2 * t * (1 - t) * HARDLY
    low = [k for k, layer in enumerate(layers) if layer.variance is not None and layer.variance < limit]
    if not low:
        return []
    start = low[0]
    lasting = all(k in low for k in range(start, len(layers) - 1))
    last = min((layers[k].variance or 0.0 for k in low), default=0.0)
    where = f"from {layers[start].name} on" if lasting else f"in {', '.join(layers[k].name for k in low[:3])}"
    advice = "" if repaired else f": try {_REPAIR}"
    return [
        f"Variance collapses {where}: {_number(layers[start].variance)} of the ends' there, and down to "
        f"{_number(last)}{advice}."
    ]


def _where(rise: float, stages: Sequence[Stage]) -> list[str]:
    if len(stages) < 2:
        return []
    top = max(stages, key=lambda stage: stage.added)
    share = top.added / rise
    if share < MOST:
        return []
    return [
        f"{top.name}{' to ' + top.layers[-1] if len(top.layers) > 1 else ''} adds {share:.0%} of the rise "
        f"({top.added:.3g} of {rise:.3g}): look at its matching first."
    ]


def _carried(split: BarrierSplit, repaired: bool) -> list[str]:
    found: list[str] = []
    if split.scale is not None and split.scale > SCALE:
        advice = "" if repaired else ": try --repair temperature, or +temperature behind another repair"
        found.append(f"One factor on the logits takes away {min(split.scale, 1):.0%} of the rise{advice}.")
    if split.half is not None and split.half < FEW:
        found.append(f"Half of the rise is carried by {split.half:.1%} of the labels.")
    kinds = len(split.classes)
    if kinds and split.classes[0].share > TWICE * split.classes[0].rows / split.rows:
        top = split.classes[0]
        found.append(
            f"Class {top.label} carries {top.share:.0%} of the rise, with {top.rows / split.rows:.0%} of the labels."
        )
    return found


def _number(value: float | None) -> str:
    return (
        "–" if value is None else f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"
    )
