"""Rules: how labels pass through each operator, one module per family. Importing registers them."""

from isthmus.symmetry._rules import (
    contraction,
    convolution,
    creation,
    indexing,
    normalisation,
    pointwise,
    quantisation,
    recurrent,
    reduction,
    scattering,
    shape,
    spectral,
)

__all__ = [
    "contraction",
    "convolution",
    "creation",
    "indexing",
    "normalisation",
    "pointwise",
    "quantisation",
    "recurrent",
    "reduction",
    "scattering",
    "shape",
    "spectral",
]
