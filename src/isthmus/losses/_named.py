"""Losses by name, and torch's own losses: all as losses of one tensor."""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import DataError
from isthmus.losses._tensors import (
    CrossEntropy,
    Elementwise,
    TensorLoss,
    binary_cross_entropy,
    check_reduction,
    squared_error,
)

__all__ = ["parsed_call", "tensor_loss"]

_NAMES: Mapping[str, Callable[..., TensorLoss]] = {
    "cross_entropy": CrossEntropy,
    "mse": lambda: Elementwise("mse", squared_error, measured_in="squared error", title="squared error"),
    "bce": lambda: Elementwise("bce", binary_cross_entropy, measured_in="nats", threshold=0.0),
}
_OPTIONS = {"cross_entropy": ("ignore_index", "label_smoothing", "weight")}

# Losses of outputs and targets alone whose value with reduction="none" is that of each example, or of parts of it:
# their documentation in torch gives it as a formula for one example.
_BY_EXAMPLE = (
    nn.MSELoss,
    nn.L1Loss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.KLDivLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.HingeEmbeddingLoss,
    nn.MultiLabelSoftMarginLoss,
    nn.MultiLabelMarginLoss,
    nn.MultiMarginLoss,
)
_FUNCTIONS: Mapping[Any, str] = {
    F.mse_loss: "MSELoss",
    F.l1_loss: "L1Loss",
    F.smooth_l1_loss: "SmoothL1Loss",
    F.huber_loss: "HuberLoss",
    F.binary_cross_entropy: "BCELoss",
    F.binary_cross_entropy_with_logits: "BCEWithLogitsLoss",
    F.kl_div: "KLDivLoss",
    F.poisson_nll_loss: "PoissonNLLLoss",
    F.soft_margin_loss: "SoftMarginLoss",
    F.hinge_embedding_loss: "HingeEmbeddingLoss",
    F.multilabel_soft_margin_loss: "MultiLabelSoftMarginLoss",
    F.multilabel_margin_loss: "MultiLabelMarginLoss",
    F.multi_margin_loss: "MultiMarginLoss",
}
_UNITS = {
    "MSELoss": "squared error",
    "L1Loss": "absolute error",
    "BCELoss": "nats",
    "BCEWithLogitsLoss": "nats",
    "KLDivLoss": "nats",
}
_THRESHOLDS = {"BCELoss": 0.5, "BCEWithLogitsLoss": 0.0}
_LABELS = ("MultiMarginLoss", "MultiLabelMarginLoss")


def tensor_loss(loss: Any) -> TensorLoss | None:
    """Return the loss that a name, a loss of :mod:`torch.nn` or a function of ``torch.nn.functional`` stands for.

    ``functools.partial`` of such a function is looked into. The mean over a batch, which they return, is no value
    for each example, so they are made anew without it; their other options are kept.

    Returns:
        The loss, or None for anything else that can be called.

    Raises:
        DataError: an unknown name or option, or a loss of torch that needs more than outputs and targets.
    """
    if isinstance(loss, str):
        return _by_name(loss)
    function, keywords = loss, dict[str, Any]()
    while isinstance(function, functools.partial) and not function.args:
        function, keywords = function.func, {**function.keywords, **keywords}
    if function is F.cross_entropy or function is F.nll_loss:
        kind = nn.CrossEntropyLoss if function is F.cross_entropy else nn.NLLLoss
        return _of_classes(_made(kind, keywords))
    if isinstance(function, Callable) and _hashable(function) and function in _FUNCTIONS:
        return _of_elements(_made(getattr(nn, _FUNCTIONS[function]), keywords))
    if type(loss) in (nn.CrossEntropyLoss, nn.NLLLoss):
        return _of_classes(loss)
    if type(loss) in _BY_EXAMPLE:
        return _of_elements(loss)
    if type(loss).__module__ == nn.CrossEntropyLoss.__module__:
        raise DataError(
            f"The loss torch.nn.{type(loss).__name__} needs more than outputs and targets, or compares examples. Pass "
            "a function of (outputs, targets) that calls it and returns one value per example."
        )
    return None


def parsed_call(text: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of ``name`` or ``name(option=literal, ...)``.

    Raises:
        DataError: the text is neither.
    """
    if "(" not in text:
        return text.strip(), {}
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise ValueError("not a call with named options")
        return call.func.id, {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(
            f"Cannot read the loss {text[:80]!r}: expected a name, or a name with options such as "
            "cross_entropy(ignore_index=255)."
        ) from error


def _by_name(text: str) -> TensorLoss:
    name, options = parsed_call(text)
    if name not in _NAMES:
        raise DataError(
            f'Unknown loss {text!r}: expected "cross_entropy", "mse", "bce", "model" or a function.'
        )
    unknown = sorted(set(options) - set(_OPTIONS.get(name, ())))
    if unknown:
        known = ", ".join(_OPTIONS.get(name, ())) or "none"
        raise DataError(f"The loss {text!r} has no option {unknown[0]!r}. Known options: {known}.")
    try:
        if "weight" in options:
            options["weight"] = torch.tensor(options["weight"], dtype=torch.float64)
        return _NAMES[name](**options, **({"name": text} if options else {}))
    except DataError:
        raise
    except (TypeError, ValueError) as error:
        raise DataError(f"The loss {text!r}: an option has a value of the wrong kind ({error}).") from error


def _made(kind: type[nn.Module], keywords: Mapping[str, Any]) -> nn.Module:
    try:
        return kind(**keywords)
    except TypeError as error:
        raise DataError(
            f"The loss {kind.__name__}: {error}. Pass a function of (outputs, targets) that returns one value per "
            "example."
        ) from error


def _of_classes(loss: Any) -> CrossEntropy:
    return CrossEntropy(
        ignore_index=loss.ignore_index,
        label_smoothing=getattr(loss, "label_smoothing", 0.0),
        weight=None if loss.weight is None else loss.weight.detach().clone(),
        reduction=loss.reduction,
        class_axis_first=True,
        log_probabilities=type(loss) is nn.NLLLoss,
        name=type(loss).__name__,
    )


def _of_elements(loss: Any) -> Elementwise:
    name = type(loss).__name__
    each = copy.deepcopy(loss)
    each.reduction = "none"

    def values(outputs: Tensor, targets: Tensor) -> Tensor:
        return each.to(device=outputs.device, dtype=outputs.dtype)(outputs, targets)

    if loss.reduction != "batchmean":
        check_reduction(loss.reduction, name)
    # The mean over a batch of sums of each example is a sum in our words.
    summed = loss.reduction in ("sum", "batchmean")
    return Elementwise(
        name,
        values,
        reduction="sum" if summed else "mean",
        measured_in=_UNITS.get(name, name),
        threshold=_THRESHOLDS.get(name),
        labels=name in _LABELS,
    )


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
