"""What a network returns: its tensors by unambiguous names, whatever tree of containers they come in.

A tensor is known by its path in the tree. A path is written in words, ``hidden_states.0``, as long as nothing else in
the tree is written so; otherwise as Python would reach it, ``['a']['b']`` beside ``['a.b']``. The tree itself, if it is
a single tensor, is ``output``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from isthmus.errors import DataError, ModelError, SymmetryError
from isthmus.losses import outputs_to_score

__all__ = ["NamedOutputs", "Outputs", "named_outputs", "opened", "output_reader", "returning_opened"]

Outputs = str | int | Sequence[str | int] | None
_T = TypeVar("_T")
_TreePath = tuple[Any, ...]
_ROOT = "output"
_PLAIN = (str, bytes, int, float, complex, type(None))


class NamedOutputs(Mapping[str, _T], Generic[_T]):
    """Leaves of an output tree by name, in their order.

    Args:
        leaves: the path of each leaf (keys of ``torch.utils._pytree``) and what stands there.
    """

    def __init__(self, leaves: Iterable[tuple[_TreePath, _T]]) -> None:
        found = list(leaves)
        self._nodes: dict[str, list[str]] = {}
        for path, _ in found:
            for length in range(1, len(path) + 1):
                node = _exact(path[:length])
                for text in {node, _in_words(path[:length])}:
                    known = self._nodes.setdefault(text, [])
                    known += [] if node in known else [node]
        self._leaves: dict[str, _T] = {}
        self._places: dict[str, list[str]] = {}
        for path, leaf in found:
            name = self._free(self._name(path))
            self._leaves[name] = leaf
            self._places[name] = [_exact(path[:length]) for length in range(1, len(path) + 1)]

    def _name(self, path: _TreePath) -> str:
        if not path:
            return _ROOT
        words = _in_words(path)
        return words if words and len(self._nodes[words]) == 1 else _exact(path)

    def _free(self, name: str) -> str:
        """Return a name that is not taken yet: two keys may be different and print alike."""
        number = 2
        free = name
        while free in self._leaves:
            free, number = f"{name}#{number}", number + 1
        return free

    def __getitem__(self, name: str) -> _T:
        """Return what has this very name."""
        return self._leaves[name]

    def __iter__(self) -> Iterator[str]:
        """Yield the names in the order of the tree."""
        return iter(self._leaves)

    def __len__(self) -> int:
        """Return the number of leaves."""
        return len(self._leaves)

    def select(self, wanted: Iterable[str | int] | str | int | None) -> dict[str, _T]:
        """Return the leaves chosen by name or position; a name stands for everything below it.

        Args:
            wanted: names or positions, ``None`` for all.

        Raises:
            SymmetryError: nothing has that name or position, or several parts of the tree have it.
        """
        if wanted is None:
            return dict(self._leaves)
        names = list(self._leaves)
        chosen: dict[str, _T] = {}
        for item in [wanted] if isinstance(wanted, (str, int)) else wanted:
            if isinstance(item, int):
                found = [names[item]] if -len(names) <= item < len(names) else []
            else:
                found = self._below(item)
            if not found:
                raise SymmetryError(f"outputs: no output {item!r}; the model returns {names}.")
            chosen.update({n: self._leaves[n] for n in found})
        return chosen

    def _below(self, name: str) -> list[str]:
        if name in self._leaves:
            return [name]
        nodes = self._nodes.get(name, [])
        if name in nodes:  # written as Python reaches it
            nodes = [name]
        found = [n for n, places in self._places.items() if set(nodes) & set(places)]
        if len(nodes) > 1:
            raise SymmetryError(
                f"outputs: {name!r} can mean {' or '.join(nodes)} of what the model returns. Write it in that form, "
                f"or give the position of the tensor in {found}."
            )
        return found


def _in_words(path: _TreePath) -> str:
    return ".".join(str(_value(key)) for key in path)


def _exact(path: _TreePath) -> str:
    return "".join(f".{k.name}" if isinstance(k, pytree.GetAttrKey) else f"[{_value(k)!r}]" for k in path)


def _value(key: Any) -> Any:
    return next((getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)), key)


def named_outputs(output: Any, kind: type[_T]) -> NamedOutputs[_T]:
    """Return everything of one kind (tensors, or nodes of a graph) that an output tree holds, by name."""
    leaves = _with_paths(opened(output))
    return NamedOutputs((path, leaf) for path, leaf in leaves if isinstance(leaf, kind))


def _with_paths(tree: Any) -> list[tuple[_TreePath, Any]]:
    with contextlib.suppress(ValueError):  # a container that was registered without names for its parts
        return pytree.tree_flatten_with_path(tree)[0]
    with contextlib.suppress(ValueError):  # a mapping has names nevertheless
        return pytree.tree_flatten_with_path(_as_dicts(tree))[0]
    return [((pytree.SequenceKey(k),), leaf) for k, leaf in enumerate(pytree.tree_leaves(tree))]


def _as_dicts(tree: Any) -> Any:
    """Return a tree whose mappings of every kind are dicts."""
    return pytree.tree_map(
        lambda part: {k: _as_dicts(v) for k, v in part.items()} if isinstance(part, Mapping) else part,
        tree,
        is_leaf=lambda part: isinstance(part, Mapping),
    )


def opened(output: Any) -> Any:
    """Return an output tree whose containers torch can look into: dataclasses and other mappings become dicts.

    What holds no tensor, such as a configuration, becomes ``None``.
    """
    return pytree.tree_map(_opened, output)


def _opened(leaf: Any) -> Any:
    if isinstance(leaf, (Tensor, *_PLAIN)):
        return leaf
    if isinstance(leaf, Mapping) and len(leaf):
        return {key: opened(value) for key, value in leaf.items()}
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        fields = (f.name for f in dataclasses.fields(leaf))
        return {name: opened(getattr(leaf, name)) for name in fields if hasattr(leaf, name)}
    if isinstance(leaf, tuple) and hasattr(leaf, "_fields"):
        return {name: opened(getattr(leaf, name)) for name in leaf._fields}  # type: ignore[attr-defined]
    if isinstance(leaf, (list, tuple)):
        return [opened(value) for value in leaf]
    return leaf if _holds_tensors(leaf) else None


def _holds_tensors(leaf: Any) -> bool:
    """Return whether an object that is no container holds tensors, or is something of torch that stands for one."""
    if type(leaf).__module__.partition(".")[0] == "torch":
        return True
    inside = [*vars(leaf).values()] if hasattr(leaf, "__dict__") else []
    inside += [leaf] if isinstance(leaf, (set, frozenset)) else []
    contents = [v for value in inside for v in (value if isinstance(value, (set, frozenset)) else [value])]
    return any(isinstance(t, Tensor) for t in pytree.tree_leaves(contents))


class returning_opened:
    """While active, a module returns its outputs opened; one that hides tensors is refused.

    Args:
        model: a copy of the caller's module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._remove: Callable[[], None] = lambda: None

    def __enter__(self) -> None:
        self._remove = self._model.register_forward_hook(_open).remove

    def __exit__(self, *error: object) -> None:
        self._remove()


def _open(module: nn.Module, args: Any, output: Any) -> Any:
    found = opened(output)
    for leaf in pytree.tree_leaves(found):
        if not isinstance(leaf, (Tensor, *_PLAIN)) and type(leaf).__module__.partition(".")[0] != "torch":
            raise ModelError(
                f"{type(module).__name__} returns a {type(leaf).__name__} that holds tensors which cannot be seen. "
                "Return tensors, or tuples, lists, mappings or dataclasses of them."
            )
    return found


def output_reader(outputs: Outputs, doing: str) -> Callable[[Any], Tensor] | None:
    """Return the function that picks the chosen output from all that a network returns; None where none was chosen.

    That function raises:
        DataError: several tensors have that name.
        ModelError: it holds no floating numbers.
        SymmetryError: there is no such output.

    Args:
        outputs: name or position of the output.
        doing: how messages begin, such as ``"Measuring a line"``.
    """
    if outputs is None:
        return None

    def read(output: Any) -> Tensor:
        chosen = named_outputs(output, Tensor).select(outputs)
        if len(chosen) != 1:
            raise DataError(
                f"{doing}: expected outputs= the name or position of the one output that is scored, found "
                f"{outputs!r}, which means {', '.join(map(repr, chosen))}. To compare several, pass loss= a function "
                "of (outputs, targets), which gets all of them."
            )
        (found,) = chosen.values()
        return outputs_to_score(found)

    return read
