"""What counts as a batch of data, and how it is fed to a model.

Everything that runs a model takes ``batches``: any iterable (a list, a ``DataLoader``, a generator) of

* a tensor: the single positional input;
* a pair ``(inputs, targets)``, tuple or list, where ``inputs`` is a tensor, a tuple or list of positional inputs, or
  a mapping of keyword inputs, and ``targets`` are anything that the loss reads: a tensor, numbers, or a tuple, list
  or mapping of tensors;
* ``(inputs, targets, index, ...)``: a pair followed by what a data set says *about* each example, one whole number
  or text each (an index, a path); these are left out. Other triples are refused: two inputs are ``((x1, x2), y)``;
* a mapping of keyword inputs, whose ``labels`` or ``targets`` entry, if there, holds the targets;
* a :class:`Batch`.

NumPy arrays count as tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isthmus.errors import DataError, ModelError

__all__ = [
    "Batch",
    "Batches",
    "as_batch",
    "first_batch",
    "held",
    "iterate",
    "main_output",
    "reusable",
]

Batches = Iterable[Any]

_TARGET_KEYS = ("labels", "targets", "label", "target")


@dataclass(frozen=True)
class Batch:
    """One batch: examples on axis 0.

    Attributes:
        args: positional inputs.
        kwargs: keyword inputs.
        targets: what the loss reads beside the outputs, if known; a tensor for the losses that have a name.
        target_key: the entry of the mapping that held the targets, if the batch was one.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    targets: Any = None
    target_key: str | None = None

    def __repr__(self) -> str:
        """Return one line: shapes instead of values."""

        def shape(value: Any) -> Any:
            return (
                f"<{'×'.join(map(str, value.shape))}>" if isinstance(value, Tensor) and value.ndim else value
            )

        args, kwargs, targets = (
            pytree.tree_map(shape, v) for v in (self.args, dict(self.kwargs), self.targets)
        )
        return " ".join(f"Batch(args={args}, kwargs={kwargs}, targets={targets})".split())

    @property
    def size(self) -> int:
        """Number of examples: the length of axis 0 of ``input_ids``, else of the first tensor input."""
        leaves = pytree.tree_leaves((self.kwargs.get("input_ids"), self.args, dict(self.kwargs)))
        for value in leaves:
            if isinstance(value, Tensor) and value.ndim > 0:
                return value.shape[0]
        raise DataError("A batch holds no tensor input, so its number of examples is unknown.")

    def head(self, examples: int) -> Batch:
        """Return the batch with only its first examples."""
        return self.rows(0, examples)

    def rows(self, start: int, stop: int) -> Batch:
        """Return the batch with some of its examples: tensors and lists that list the examples are cut."""
        size = self.size

        def cut(value: Any) -> Any:
            listed = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
            return value[start:stop] if listed else value

        def cut_tree(value: Any) -> Any:
            if isinstance(value, list) and len(value) == size and not _all_list(value, size):
                return value[start:stop]
            return pytree.tree_map(cut, value)

        return replace(
            self,
            args=tuple(cut_tree(a) for a in self.args),
            kwargs={k: cut_tree(v) for k, v in self.kwargs.items()},
            targets=cut_tree(self.targets),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch with tensors on ``device`` and floating inputs (not targets) in ``dtype``."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.to(device=device, dtype=dtype if value.is_floating_point() else None)

        def carry(value: Any) -> Any:
            return value.to(device=device) if isinstance(value, Tensor) else value

        return replace(
            self,
            args=pytree.tree_map(move, self.args),
            kwargs={k: pytree.tree_map(move, v) for k, v in self.kwargs.items()},
            targets=pytree.tree_map(carry, self.targets),
        )


def as_batch(item: Any) -> Batch:
    """Read one item of a data set as a :class:`Batch`.

    Raises:
        DataError: the item has none of the forms listed in the module's docstring.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, (Tensor, np.ndarray)):
        return Batch((_tensor(item),))
    if isinstance(item, Mapping):
        key = next((k for k in _TARGET_KEYS if k in item), None)
        inputs = {k: _inputs(v) for k, v in item.items() if k not in _TARGET_KEYS}
        return Batch((), inputs, None if key is None else _targets(item[key]), key)
    if isinstance(item, Sequence) and not isinstance(item, str) and len(item) > 0:
        if len(item) > 2:
            _check_extras(item)
        targets = _targets(item[1]) if len(item) > 1 else None
        inputs = _inputs(item[0])
        if isinstance(inputs, Tensor):
            return Batch((inputs,), {}, targets)
        if isinstance(inputs, Mapping):
            return Batch((), dict(inputs), targets)
        if isinstance(inputs, tuple) or (isinstance(inputs, list) and _has_tensors(inputs)):
            return Batch(tuple(inputs), {}, targets)
    raise DataError(f"Cannot read {_word(item)} as a batch. {_FORMS}{_hint(item)}")


_FORMS = "Give a tensor, an (inputs, targets) pair, a mapping of keyword inputs, or an isthmus.batches.Batch."


def _check_extras(item: Sequence[Any]) -> None:
    """Refuse entries after a pair unless they say something about each example that no network reads."""
    targets, extras = item[1], item[2:]
    size = next((len(v) for v in pytree.tree_leaves(item[0]) if isinstance(v, (Tensor, np.ndarray))), None)
    labels = not isinstance(targets, (Tensor, np.ndarray)) or not _is_floating(targets) or targets.ndim < 2
    if size is None or not labels or not all(_names_examples(e, size) for e in extras):
        raise DataError(
            f"Cannot read a batch of {len(item)} entries: after inputs and targets, expected only whole numbers or "
            "text, one for each example, such as an index, which are left out. Give several inputs as "
            "((x1, x2), targets), and what the loss needs beside the targets as (inputs, (targets, more))."
        )


def _names_examples(value: Any, size: int) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return not _is_floating(value) and tuple(value.shape) in ((size,), (size, 1))
    return (
        isinstance(value, (tuple, list))
        and len(value) == size
        and all(isinstance(v, (int, str)) for v in value)
    )


def _is_floating(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() or value.is_complex()
    return not np.issubdtype(value.dtype, np.integer) and value.dtype != np.bool_


def _tensor(value: Any) -> Any:
    """Turn NumPy arrays and numbers into tensors; leave anything else."""
    if isinstance(value, (np.ndarray, np.generic)):
        try:
            return torch.tensor(value)  # a copy: the array may be read-only
        except TypeError as error:
            raise DataError(f"Cannot read an array of {value.dtype} as a tensor. Give numbers.") from error
    return value


def _inputs(value: Any) -> Any:
    """Return inputs with arrays as tensors."""
    if isinstance(value, Mapping):
        return {k: _inputs(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_inputs(v) for v in value) if type(value) in (tuple, list) else value
    return _tensor(value)


def _targets(value: Any) -> Any:
    """Return targets: numbers as one tensor, arrays as tensors, anything else as it is."""
    found = _inputs(value)
    if isinstance(found, Number):
        return torch.as_tensor(found)
    if isinstance(found, (tuple, list)) and not _has_tensors(found):
        try:
            return torch.as_tensor(found)
        except (TypeError, ValueError, RuntimeError):  # ragged, text, or mappings
            return found
    return found


def _has_tensors(value: Any) -> bool:
    return any(isinstance(v, Tensor) for v in pytree.tree_leaves(value))


def _all_list(value: Sequence[Any], size: int) -> bool:
    """Tell whether every entry is a tensor that lists all examples itself."""
    return all(isinstance(v, Tensor) and v.ndim > 0 and v.shape[0] == size for v in value)


def _word(item: Any) -> str:
    if isinstance(item, (tuple, list)):
        return f"a {type(item).__name__} of {', '.join(type(v).__name__ for v in item[:4]) or 'nothing'}"
    return f"a {type(item).__name__}"


def _hint(item: Any) -> str:
    leaves = item if isinstance(item, (tuple, list)) else [item]
    inner = [v for leaf in leaves for v in (leaf if isinstance(leaf, (tuple, list)) else [leaf])]
    if any(type(v).__module__.startswith("PIL.") for v in inner):
        return " Pictures must be tensors first: let the data set's transform end in ToTensor()."
    if any(isinstance(v, str) for v in inner):
        return " Text must be tokens first: let the collator call the tokenizer."
    return ""


def iterate(batches: Batches, name: str = "batches") -> Iterator[Batch]:
    """Yield every batch, checked; raise :class:`DataError` when there is none or one is empty."""
    found = 0
    for item in batches:
        batch = as_batch(item)
        if batch.size == 0:
            raise DataError(f"{name}: batch {found} holds no examples. Drop empty batches.")
        targets = batch.targets
        if isinstance(targets, Tensor) and targets.ndim and len(targets) != batch.size:
            raise DataError(
                f"{name}: batch {found} has {batch.size} inputs but {len(targets)} targets. "
                "Inputs and targets must list the same examples."
            )
        found += 1
        yield batch
    if found == 0:
        raise _none_found(name, batches)


def _none_found(name: str, batches: Batches) -> DataError:
    why = (
        f"This {type(batches).__name__} can be read once only and has perhaps been read before: give a list or a "
        "DataLoader, or make it anew."
        if isinstance(batches, Iterator)
        else "Is the data set empty?"
    )
    return DataError(f"{name}: expected at least one batch, found none. {why}")


def reusable(batches: Batches) -> Batches:
    """Return something that can be iterated more than once (a one-shot iterator is read into a list).

    Raises:
        DataError: an iterator that gives nothing, such as one that has been read before.
    """
    if not isinstance(batches, Iterator):
        return batches
    found = list(batches)
    if not found:
        raise _none_found("batches", batches)
    return found


def held(batches: Batches, name: str = "batches", limit: int = 2**30) -> Batches:
    """Return the batches in memory, read once, if they take up no more than ``limit`` bytes; else as they came.

    Args:
        batches: any iterable; a one-shot iterator is held whatever it takes up.
        name: how messages call it.
        limit: bytes.
    """
    if isinstance(batches, list):
        return batches
    kept: list[Batch] = []
    size = 0
    for batch in iterate(batches, name):
        kept.append(batch)
        leaves = pytree.tree_leaves((batch.args, dict(batch.kwargs), batch.targets))
        size += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        if size > limit and not isinstance(batches, Iterator):
            return batches
    return kept


def first_batch(batches: Batches, name: str = "batches") -> Batch:
    """Return the first batch of a reusable iterable, checked."""
    return next(iterate(batches, name))


def main_output(output: Any) -> Tensor:
    """Return the tensor that is scored: the output itself, ``.logits``, ``["logits"]`` or the first entry.

    The first entry of a mapping or a dataclass is its first tensor not called ``loss``: networks that compute their
    own loss put it first.

    Raises:
        ModelError: no tensor is found there.
    """
    found = output
    if is_dataclass(found) and not isinstance(found, (type, Mapping)):
        found = {f.name: getattr(found, f.name) for f in fields(found)}
    if not isinstance(found, Tensor) and isinstance(getattr(found, "logits", None), Tensor):
        found = found.logits  # type: ignore[union-attr]
    elif isinstance(found, Mapping):
        named = (v for k, v in found.items() if k != "loss" and v is not None)
        found = found["logits"] if found.get("logits") is not None else next(named, None)
    elif isinstance(found, (tuple, list)):
        found = found[0] if found else None
    if isinstance(found, (tuple, list, Mapping)) and found is not output and found:
        return main_output(found)
    if not isinstance(found, Tensor):
        raise ModelError(
            f"Expected the model to return a tensor, a mapping with 'logits' or a tuple of tensors; "
            f"found {type(output).__name__}. Wrap the model so that it returns the tensor to be scored."
        )
    return found


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the first parameter or buffer, or the CPU for a module without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
