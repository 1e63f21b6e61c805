"""Convolutions, pooling and resampling: channels pass or are contracted, positions stay where they are."""

from __future__ import annotations

from typing import Any

from isthmus.symmetry._axes import Expression, product_of
from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._values import Value

_KERNEL = "position in a convolution kernel"
_SPACE = "position in space"


def _convolve(
    op: Operation,
    x: Value,
    weight: Value,
    bias: Value | None,
    groups: int,
    turned: bool,
    stride: Any = 1,
    padding: Any = 0,
    **_: Any,
) -> Value:
    """Handle grouped, depthwise and transposed convolutions.

    Weights are (out, in / groups, kernel…), or (in, out / groups, kernel…) when transposed. Positions along axes on
    which the kernel has length 1 are computed one by one, so they pass.
    """
    spatial = weight.ndim - 2
    batched = x.ndim == weight.ndim
    channels = x.axes[-spatial - 1]
    alone = [
        weight.shape[2 + k] == 1 and _at(stride, k) == 1 and (padding == "same" or _at(padding, k) == 0)
        for k in range(spatial)
    ]
    for axis in weight.axes[2:]:
        op.pin(axis, _KERNEL)
    for axis, passes in zip(x.axes[-spatial:], alone, strict=True):
        if not passes:
            op.pin(axis, _SPACE)
    first, second = weight.axes[0], weight.axes[1]
    lead, space_letters = ["n"] if batched else [], [f"s{k}" for k in range(spatial)]
    kernel = [f"k{k}" for k in range(spatial)]
    joint = ["c", *(s for s, passes in zip(space_letters, alone, strict=True) if not passes), *kernel]
    if groups == 1:
        op.unify(channels, first if turned else second)
        out = second if turned else first
        op.contract(
            [(x, [*lead, "c", *space_letters]), (weight, [*("co" if turned else "oc"), *kernel])], joint
        )
    else:
        group, within = op.split_trailing(channels, channels.size // groups)
        weight_group, weight_within = op.split_trailing(first, first.size // groups)
        factored = Value(
            (*x.axes[:1], group, within, *x.axes[2:]) if batched else (group, within, *x.axes[1:])
        )
        blocks = Value((weight_group, weight_within, *weight.axes[1:]))
        out = _grouped(op, (group, within), (weight_group, weight_within), first, second, turned)
        op.contract(
            [
                (factored, [*lead, "g", "c", *space_letters]),
                (blocks, ["g", *("co" if turned else "oc"), *kernel]),
            ],
            joint,
        )
    if bias is not None:
        op.unify(out, bias.axes[0])
    sizes = zip(op.shape[-spatial:], x.axes[-spatial:], alone, strict=True)
    space = tuple(axis if passes else op.fixed(size, _SPACE) for size, axis, passes in sizes)
    return Value((*x.axes[:1], out, *space) if batched else (out, *space))


def _at(setting: Any, axis: int) -> Any:
    """Return a setting (a number, or one for each spatial axis) for one axis."""
    several = list(setting) if isinstance(setting, (tuple, list)) else [setting]
    return several[axis if len(several) > 1 else 0]


def _grouped(
    op: Operation,
    channels: tuple[Expression, Expression],
    blocks: tuple[Expression, Expression],
    first: Expression,
    second: Expression,
    turned: bool,
) -> Expression:
    """Join the channel blocks and the order inside them; return the output channels."""
    op.unify(channels[0], blocks[0])
    if turned:
        op.unify(channels[1], blocks[1])
        return product_of((channels[0], second))
    op.unify(channels[1], second)
    return first


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d")
def convolution(
    op: Operation, x: Value, weight: Value, bias: Value | None = None, groups: int = 1, **settings: Any
) -> Value:
    """Convolve."""
    return _convolve(op, x, weight, bias, groups, turned=False, **settings)


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def transposed(
    op: Operation, x: Value, weight: Value, bias: Value | None = None, groups: int = 1, **settings: Any
) -> Value:
    """Convolve with the transposed operator."""
    return _convolve(op, x, weight, bias, groups, turned=True, **settings)


@rule("aten.convolution")
def general(
    op: Operation,
    x: Value,
    weight: Value,
    bias: Value | None = None,
    transposed: bool = False,
    groups: int = 1,
    **settings: Any,
) -> Value:
    """Convolve, in the form that decompositions use."""
    return _convolve(op, x, weight, bias, groups, turned=transposed, **settings)


def _resample(op: Operation, x: Value, spatial: int) -> Value:
    op.mix(x, range(-spatial, 0))
    for axis in x.axes[-spatial:]:
        op.pin(axis, _SPACE)
    return Value((*x.axes[:-spatial], *(op.fixed(s, _SPACE) for s in op.shape[-spatial:])))


@rule("aten.grid_sampler", "aten.grid_sampler_2d", "aten.grid_sampler_3d")
def sample(op: Operation, x: Value, grid: Value, **_: Any) -> Value:
    """Read an image (n, channels, space…) at the positions of a grid (n, space…, coordinates)."""
    spatial = x.ndim - 2
    op.unify(x.axes[0], grid.axes[0])
    op.pin_all([Value(x.axes[2:]), Value(grid.axes[1:])], _SPACE)
    op.mix(x, range(2, x.ndim))
    op.mix(grid, range(1, grid.ndim))
    return Value((*x.axes[:2], *(op.fixed(n, _SPACE) for n in op.shape[-spatial:])))


@rule("aten.max_unpool2d", "aten.max_unpool3d")
def unpool(op: Operation, x: Value, indices: Value, **_: Any) -> Value:
    """Write the maxima of a pooling back to where they were found."""
    spatial = 2 if op.name.endswith("2d") else 3
    for one, two in zip(x.axes, indices.axes, strict=True):
        op.unify(one, two)
    return _resample(op, x, spatial)


@rule("aten.avg_pool1d", "aten.max_pool1d", "aten.adaptive_avg_pool1d", "aten.upsample_nearest1d")
@rule("aten.upsample_linear1d", "aten._upsample_nearest_exact1d")
def pool1d(op: Operation, x: Value, **_: Any) -> Value:
    """Pool or resample one axis."""
    return _resample(op, x, 1)


@rule("aten.avg_pool2d", "aten.max_pool2d", "aten.adaptive_avg_pool2d", "aten._adaptive_avg_pool2d")
@rule("aten.upsample_nearest2d", "aten.upsample_bilinear2d", "aten.upsample_bicubic2d")
@rule("aten._upsample_nearest_exact2d", "aten._upsample_bilinear2d_aa", "aten._upsample_bicubic2d_aa")
def pool2d(op: Operation, x: Value, **_: Any) -> Value:
    """Pool or resample two axes."""
    return _resample(op, x, 2)


@rule("aten.avg_pool3d", "aten.max_pool3d", "aten.adaptive_avg_pool3d", "aten._adaptive_avg_pool3d")
@rule("aten.upsample_nearest3d", "aten.upsample_trilinear3d", "aten._upsample_nearest_exact3d")
def pool3d(op: Operation, x: Value, **_: Any) -> Value:
    """Pool or resample three axes."""
    return _resample(op, x, 3)


def _pool_with_indices(op: Operation, x: Value, spatial: int) -> tuple[Value, Value]:
    pooled = _resample(op, x, spatial)
    return pooled, pooled


@rule("aten.max_pool1d_with_indices", "aten.adaptive_max_pool1d")
def pool1d_with_indices(op: Operation, x: Value, **_: Any) -> tuple[Value, Value]:
    """Pool one axis; indices count positions, which are fixed."""
    return _pool_with_indices(op, x, 1)


@rule("aten.max_pool2d_with_indices", "aten.adaptive_max_pool2d")
def pool2d_with_indices(op: Operation, x: Value, **_: Any) -> tuple[Value, Value]:
    """Pool two axes; indices count positions, which are fixed."""
    return _pool_with_indices(op, x, 2)


@rule("aten.max_pool3d_with_indices", "aten.adaptive_max_pool3d")
def pool3d_with_indices(op: Operation, x: Value, **_: Any) -> tuple[Value, Value]:
    """Pool three axes; indices count positions, which are fixed."""
    return _pool_with_indices(op, x, 3)
