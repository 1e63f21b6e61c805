"""Draw the lattice of classes: which classes of couplings contain which (``python docs/make_classes.py``)."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

from isthmus.symmetry import Acts

TARGET = Path(__file__).parent / "images" / "classes.svg"

PLACES = {
    Acts.GENERAL: (0.0, 4.0),
    Acts.ORTHOGONAL: (-1.3, 3.0),
    Acts.MONOMIAL: (1.3, 3.0),
    Acts.MEAN_FIXING: (-2.2, 1.6),
    Acts.SIGNED: (0.0, 1.6),
    Acts.POSITIVE: (2.2, 1.6),
    Acts.PERMUTATION: (0.0, 0.4),
}
EXAMPLES = {
    Acts.GENERAL: "value and output of a head;\ntwo linear layers in a row",
    Acts.ORTHOGONAL: "streams between RMS norms,\ngains folded",
    Acts.MONOMIAL: "what a gate multiplies\n(SwiGLU)",
    Acts.MEAN_FIXING: "streams between layer norms,\ngains and biases folded",
    Acts.SIGNED: "tanh, hardtanh;\ncells of an LSTM",
    Acts.POSITIVE: "ReLU, max pooling;\ngains of BatchNorm before them",
    Acts.PERMUTATION: "GELU, SiLU, sigmoid; heads",
}
BLUE, SAND = "#0072B2", "#E69F00"


def covers() -> list[tuple[Acts, Acts]]:
    """Return the pairs of classes of which the first contains the second, with none in between."""
    contained = [(a, b) for a in Acts for b in Acts if a is not b and a.contains(b)]
    return [
        (a, b) for a, b in contained if not any((a, c) in contained and (c, b) in contained for c in Acts)
    ]


def main() -> None:
    """Draw the classes, an example below each, and a line from each to those that it contains."""
    mpl.rcParams["svg.hashsalt"] = "classes"
    figure, axes = plt.subplots(figsize=(8.2, 5.6), layout="constrained")
    for above, below in covers():
        (x, y), (u, v) = PLACES[above], PLACES[below]
        axes.plot([x, u], [y, v], color="0.6", zorder=1)
    for acts, (x, y) in PLACES.items():
        axes.text(
            x,
            y,
            f"$\\bf{{{acts.words.replace(' ', '~')}}}$\n{EXAMPLES[acts]}",
            ha="center",
            va="center",
            fontsize=9,
            bbox={
                "boxstyle": "round,pad=0.5",
                "facecolor": "white",
                "edgecolor": BLUE if acts.mixes else SAND,
                "linewidth": 1.6,
            },
        )
    axes.set(xlim=(-3.4, 3.4), ylim=(-0.1, 4.5))
    axes.set_axis_off()
    figure.savefig(TARGET, metadata={"Date": None})


if __name__ == "__main__":
    main()
