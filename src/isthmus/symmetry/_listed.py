"""The operators of which is known what they do with the units of a network, by name; all others say nothing."""

from __future__ import annotations

from types import MappingProxyType

from isthmus.symmetry._origins import Word

__all__ = [
    "CONVOLUTIONS",
    "COPIES",
    "DROPOUTS",
    "NORMS",
    "NORM_WORDS",
    "RECURRENT",
    "REDUCTIONS",
    "RESHAPES",
    "SAME_AXES",
    "SAME_ENTRIES",
    "SUMS",
    "VIEWS",
]

RESHAPES = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten"})
VIEWS = frozenset(
    [
        *(
            "t",
            "transpose",
            "permute",
            "numpy_T",
            "mT",
            "movedim",
            "unsqueeze",
            "squeeze",
            "expand",
            "expand_as",
        ),
        *("select", "slice", "narrow", "unbind", "split", "split_with_sizes", "chunk"),
    ]
)
SAME_ENTRIES = frozenset(
    [
        *("contiguous", "clone", "detach", "alias", "to", "_to_copy", "type_as"),
        *("lift_fresh", "lift_fresh_copy"),
    ]
)
"""Every entry stays where and what it is; another floating dtype may hold it."""
DROPOUTS = frozenset({"dropout", "feature_dropout", "alpha_dropout"})
"""In evaluation they hand their operand on."""
COPIES = SAME_ENTRIES | {"neg", "dropout"}
"""Linear, and all entries alike."""
SAME_AXES = frozenset(
    [
        *("softmax", "_softmax", "log_softmax", "_log_softmax", "feature_dropout", "alpha_dropout"),
        *("constant_pad_nd", "pad", "masked_fill", "flip", "roll"),
        *(f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg") for n in (1, 2, 3)),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d"),
    ]
)
"""Of data: units sit on the axes of the result where they sat on those of the first operand."""
REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm"})
NORMS = frozenset(
    [
        *("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "native_layer_norm"),
        *("_native_batch_norm_legit_no_training", "native_group_norm", "_fused_rms_norm"),
    ]
)
NORM_WORDS: dict[str, Word] = {
    "weight": "scales",
    "bias": "holds",
    "running_mean": "holds",
    "running_var": "scales",
}
RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})
CONVOLUTIONS = frozenset(
    {"convolution", *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3))}
)
SUMS = MappingProxyType(
    {
        "mm": ("self", "mat2"),
        "bmm": ("self", "mat2"),
        "matmul": ("self", "other"),
        "mv": ("self", "vec"),
        "dot": ("self", "tensor"),
        "addmm": ("mat1", "mat2"),
        "baddbmm": ("batch1", "batch2"),
    }
)
"""Products of two matrices, with the names of the factors."""
