"""Layers of a traced network: their tensors, the matrices they act as, and the normalisation that folds into them."""

from isthmus.layers._batch_norm import BATCH_NORMS, BatchNorm, following_norm
from isthmus.layers._convolution import Convolution, input_rows, per_axis
from isthmus.layers._operands import CONVOLUTIONS, Operands, operands_of
from isthmus.layers._sites import Site, affine_layer, find_sites, matrix_of, tensor_of, tensors_met

__all__ = [
    "BATCH_NORMS",
    "CONVOLUTIONS",
    "BatchNorm",
    "Convolution",
    "Operands",
    "Site",
    "affine_layer",
    "find_sites",
    "following_norm",
    "input_rows",
    "matrix_of",
    "operands_of",
    "per_axis",
    "tensor_of",
    "tensors_met",
]
