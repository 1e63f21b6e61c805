"""Complex numbers as pairs, Fourier transforms, and patches: some axes are read in their order, the others pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from isthmus.symmetry._axes import Expression, product_of
from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._values import Value

_PARTS = "real and imaginary part"
_FREQUENCIES = "frequencies of a Fourier transform"
_PATCH = "position in a patch"


@rule("aten.view_as_complex", "aten.view_as_complex_copy")
def view_as_complex(op: Operation, x: Value) -> Value:
    """Read pairs along the last axis as complex numbers."""
    op.pin(x.axes[-1], _PARTS)
    op.mix(x, [-1])
    return Value(x.axes[:-1])


@rule("aten.view_as_real", "aten.view_as_real_copy", kind="local")
def view_as_real(op: Operation, x: Value) -> Value:
    """Write complex numbers as pairs along a new last axis."""
    return Value((*x.axes, op.fixed(2, _PARTS)))


_ONE = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
_TWO = ("fft2", "ifft2", "rfft2", "irfft2")
_SEVERAL = ("fftn", "ifftn", "rfftn", "irfftn")


@rule(*(f"aten.fft_{name}" for name in (*_ONE, *_TWO, *_SEVERAL)))
def fourier(
    op: Operation, x: Value, dim: int | Sequence[int] | None = None, s: Sequence[int] | None = None, **_: Any
) -> Value:
    """Transform along some axes, whose positions become frequencies; all others pass."""
    if dim is None:
        count = x.ndim if s is None else len(s)
        dim = range(-count, 0)
    dims = [d % x.ndim for d in ([dim] if isinstance(dim, int) else dim)]
    op.mix(x, dims)
    axes: list[Expression] = list(x.axes)
    for d in dims:
        op.pin(axes[d], _FREQUENCIES)
        axes[d] = op.fixed(op.shape[d], _FREQUENCIES)
    return Value(tuple(axes))


@rule("aten.fft_fftshift", "aten.fft_ifftshift")
def shifted(op: Operation, x: Value, dim: int | Sequence[int] | None = None, **_: Any) -> Value:
    """Exchange the halves of axes."""
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    op.mix(x, dims)
    for d in dims:
        op.pin(x.axes[d], _FREQUENCIES)
    return x


@rule("aten.unfold")
def unfold(op: Operation, x: Value, dimension: int, size: int, **_: Any) -> Value:
    """Cut an axis into windows, which may overlap; the places in a window become a new last axis."""
    dim = dimension % max(x.ndim, 1)
    op.mix(x, [dim])
    op.pin(x.axes[dim], _PATCH)
    windows = op.fixed(op.shape[dim], _PATCH)
    return Value((*x.axes[:dim], windows, *x.axes[dim + 1 :], op.fixed(size, _PATCH)))


@rule("aten.im2col")
def im2col(op: Operation, x: Value, kernel_size: Sequence[int], **_: Any) -> Value:
    """Cut an image (…, channels, height, width) into patches (…, channels × kernel, patches)."""
    op.mix(x, [-2, -1])
    op.pin_all([Value(x.axes[-2:])], _PATCH)
    kernel = op.fixed(math.prod(kernel_size), _PATCH)
    return Value((*x.axes[:-3], product_of((x.axes[-3], kernel)), op.fixed(op.shape[-1], _PATCH)))


@rule("aten.col2im")
def col2im(op: Operation, x: Value, kernel_size: Sequence[int], **_: Any) -> Value:
    """Add patches (…, channels × kernel, patches) up to an image (…, channels, height, width)."""
    channels, kernel = op.split_trailing(x.axes[-2], math.prod(kernel_size))
    op.mix(Value((*x.axes[:-2], channels, kernel, x.axes[-1])), [-2, -1])
    op.pin_all([Value((kernel, x.axes[-1]))], _PATCH)
    return Value((*x.axes[:-2], channels, *(op.fixed(n, _PATCH) for n in op.shape[-2:])))
