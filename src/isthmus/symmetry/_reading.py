"""Models that look at values: what they read is recorded in a real run, and given back while the model is traced.

A tracer has shapes and no values, so ``assert not x.isnan().any()``, ``if mask.all()`` or packed sequences stop it.
:class:`Recorder` runs along with the model on the example inputs and notes every value that Python asks a tensor for;
:class:`Replayer` answers the same questions in the same order during the trace, and keeps the tensors that were
asked, so that they become outputs of the graph. What is read must then be preserved like any output, so that every
relabelling takes the same way through the code.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from isthmus.errors import ModelError

__all__ = [
    "CodeLine",
    "Read",
    "Recorder",
    "Replayer",
    "TooManyReadsError",
    "line_of_error",
    "require_same_answers",
]

_MOST_READS = 512
_HERE = str(Path(__file__).parent)
_LIBRARIES = (str(Path(torch.__file__).parent), _HERE)

_TRUTH = frozenset(("__bool__", "is_nonzero"))
_COMPARISONS = frozenset(("equal", "allclose", "__contains__"))
_NUMBERS = frozenset(("__int__", "__float__", "__index__", "__complex__"))
_ARRAYS = frozenset(("numpy", "__array__"))
_SIZED = frozenset(
    ("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full")
)
_RECURRENT = frozenset(("lstm", "gru", "rnn_tanh", "rnn_relu"))
_TEXT = frozenset(("__repr__", "__format__"))


class TooManyReadsError(Exception):
    """A run read more values than can be followed (a loop, probably); never shown to users."""


@dataclass(frozen=True)
class CodeLine:
    """A line of the user's code."""

    file: str
    number: int
    text: str

    def __str__(self) -> str:
        """Return ``file:number: text``."""
        return f"{self.file}:{self.number}: {self.text}" if self.number else "an unknown line"


@dataclass(frozen=True)
class Read:
    """One question of Python to a tensor.

    Attributes:
        value: the answer.
        line: where it was asked.
        decides: whether the answer is true or false.
        ask: gives the answer for other values of the tensors that were asked.
        count: number of these tensors.
    """

    value: Any
    line: CodeLine
    decides: bool
    ask: Callable[[Sequence[Tensor]], Any]
    count: int


def require_same_answers(reads: Sequence[Read], asked: Sequence[Tensor]) -> None:
    """Check that tensors give the answers with which a graph was traced.

    Raises:
        ModelError: another answer, so the graph is not what the model would compute; the message names the line.
    """
    left = list(asked)
    for read in reads:
        tensors, left = left[: read.count], left[read.count :]
        found = read.ask(tensors)
        if not _equal(found, read.value):
            raise ModelError(
                f"The model was traced where {read.line} reads {read.value!r}, but here it reads {found!r}: its "
                "code goes another way, so the trace does not hold. Trace it again on these inputs."
            )


def _equal(one: Any, two: Any) -> bool:
    return one is two or (type(one) is type(two) and str(one) == str(two))


def _user_frames(frame: FrameType | None) -> list[FrameType]:
    """Return the frames of a stack that belong neither to PyTorch nor to this package, innermost first."""
    found: list[FrameType] = []
    while frame is not None:
        if not frame.f_code.co_filename.startswith((*_LIBRARIES, "<frozen")):
            found.append(frame)
        frame = frame.f_back
    return found


def _line_of(frame: FrameType | None, number: int | None = None) -> CodeLine:
    """Return the line at which a frame stands."""
    if frame is None:
        return CodeLine("", 0, "")
    file, at = frame.f_code.co_filename, frame.f_lineno if number is None else number
    return CodeLine(Path(file).name, at, linecache.getline(file, at).strip())


def line_of_error(error: BaseException) -> tuple[CodeLine, nn.Module | None]:
    """Return the innermost line of the user's code in a traceback, and the innermost module that was running."""
    line, running = CodeLine("", 0, ""), None
    step: TracebackType | None = error.__traceback__
    while step is not None:
        if not step.tb_frame.f_code.co_filename.startswith((*_LIBRARIES, "<frozen")):
            line = _line_of(step.tb_frame, step.tb_lineno)
            owner = step.tb_frame.f_locals.get("self")
            running = owner if isinstance(owner, nn.Module) else running
        step = step.tb_next
    return line, running


class _Reading(TorchFunctionMode):
    """Sends every question for a value to :meth:`answer`; packed sequences are answered as indexing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "item":
            return self._item(args[0])
        if name == "tolist":  # entry by entry, as tracers do
            return self._listed(args[0])
        if name in _COMPARISONS:
            found = _compared(name, *args, **kwargs)
            return isinstance(found, Tensor) and self.answer(
                [found], lambda real: bool(real[0]), decides=True
            )
        if name in _TRUTH or name in _NUMBERS or name in _ARRAYS or name in _TEXT:
            asked = [t for t in args if isinstance(t, Tensor)]
            return self.answer(
                asked, lambda real: func(*_filled(args, real), **kwargs), decides=name in _TRUTH
            )
        if name == "_pack_padded_sequence":
            lengths = self.answer([args[1]], lambda real: [int(n) for n in real[0].tolist()], decides=False)
            return _packed(args[0], lengths, *args[2:])
        if name == "_pad_packed_sequence":
            sizes = self.answer([args[1]], lambda real: [int(n) for n in real[0].tolist()], decides=False)
            return _padded(args[0], sizes, *args[2:])
        if name in _RECURRENT and isinstance(args[1], Tensor) and args[1].dtype == torch.int64:
            sizes = self.answer([args[1]], lambda real: [int(n) for n in real[0].tolist()], decides=False)
            return _recurrence(name, args[0], sizes, *args[2:])
        if name in _SIZED:
            args = tuple(self._number(a) for a in args)
        if name == "__getitem__":
            args = (args[0], self._bounds(args[1]))
        return func(*args, **kwargs)

    def answer(
        self, asked: Sequence[Tensor], read: Callable[[Sequence[Tensor]], Any], *, decides: bool
    ) -> Any:
        """Return what Python wants to know."""
        raise NotImplementedError

    def _item(self, entry: Tensor) -> Any:
        """Return a number as Python reads it; one that is not whole stays a tensor, so that its use is seen."""
        if entry.is_floating_point() or entry.is_complex():
            return entry.detach().reshape(())
        return self.answer([entry], lambda real: real[0].item(), decides=entry.dtype == torch.bool)

    def _listed(self, tensor: Tensor) -> Any:
        return self._item(tensor) if tensor.ndim == 0 else [self._listed(entry) for entry in tensor]

    def _number(self, size: Any) -> Any:
        if isinstance(size, (tuple, list)):
            return type(size)(self._number(s) for s in size)
        if isinstance(size, Tensor) and size.ndim == 0 and not size.is_floating_point():
            return self.answer([size], lambda real: int(real[0]), decides=False)
        return size

    def _bounds(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(self._bounds(i) for i in index)
        return (
            slice(*map(self._number, (index.start, index.stop, index.step)))
            if isinstance(index, slice)
            else index
        )


def _compared(name: str, one: Tensor, two: Any, *args: Any, **kwargs: Any) -> Tensor | bool:
    """Return a comparison of whole tensors as one of entries and a reduction, whose order does not matter."""
    if name == "allclose":
        return torch.isclose(one, two, *args, **kwargs).all()
    if name == "__contains__":
        return (one == two).any()
    return one.shape == two.shape and (one == two).all()


def _filled(args: Sequence[Any], real: Sequence[Tensor]) -> list[Any]:
    left = list(real)
    return [left.pop(0) if isinstance(a, Tensor) else a for a in args]


class Recorder(_Reading):
    """Notes every value that Python reads from a tensor, and where.

    Args:
        forced: by number of the read: other answers than the true ones.
    """

    def __init__(self, forced: Mapping[int, Any]) -> None:
        super().__init__()
        self.reads: list[Read] = []
        self._forced = forced

    def answer(
        self, asked: Sequence[Tensor], read: Callable[[Sequence[Tensor]], Any], *, decides: bool
    ) -> Any:
        """Return the true answer, or the forced one."""
        number = len(self.reads)
        if number >= _MOST_READS:
            raise TooManyReadsError
        value = self._forced[number] if number in self._forced else read(asked)
        frames = _user_frames(sys._getframe(2))
        line = _line_of(frames[0] if frames else None)
        self.reads.append(Read(value, line, decides, read, len(asked)))
        return value


class Replayer(_Reading):
    """Gives recorded answers while a model is traced.

    Attributes:
        asked: the tensors that were read, in order.
    """

    def __init__(self, reads: Sequence[Read]) -> None:
        super().__init__()
        self.asked: list[Tensor] = []
        self._left = list(reads)

    def answer(
        self, asked: Sequence[Tensor], read: Callable[[Sequence[Tensor]], Any], *, decides: bool
    ) -> Any:
        """Return the recorded answer, and keep the tensors."""
        if not self._left:
            raise TooManyReadsError
        self.asked += [t.detach() for t in asked]
        return self._left.pop(0).value


def _places(sizes: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return step and example of every row of a packed sequence, from the number of examples at each step."""
    steps = [t for t, n in enumerate(sizes) for _ in range(n)]
    examples = [k for n in sizes for k in range(n)]
    return torch.tensor(steps, device=device), torch.tensor(examples, device=device)


def _packed(x: Tensor, lengths: Sequence[int], batch_first: bool) -> tuple[Tensor, Tensor]:
    """Pack padded sequences whose lengths fall: the rows step by step, and the number of examples at each step."""
    if any(after > before for before, after in pairwise(lengths)) or min(lengths) < 1:
        raise RuntimeError(
            "lengths of packed sequences must be positive and must not rise (or enforce_sorted=False)"
        )
    sizes = [sum(n > step for n in lengths) for step in range(max(lengths))]
    steps, examples = _places(sizes, x.device)
    data = x[examples, steps] if batch_first else x[steps, examples]
    return data, torch.tensor(sizes)


def _padded(
    data: Tensor, sizes: Sequence[int], batch_first: bool, padding: float, length: int
) -> tuple[Tensor, Tensor]:
    """Undo :func:`_packed`."""
    steps, examples = _places(sizes, data.device)
    shape = (sizes[0], length) if batch_first else (length, sizes[0])
    padded = data.new_full((*shape, *data.shape[1:]), padding)
    places = (examples, steps) if batch_first else (steps, examples)
    lengths = [sum(n > k for n in sizes) for k in range(sizes[0])]
    return padded.index_put(places, data), torch.tensor(lengths)


_CELLS: dict[str, Callable[..., Any]] = {
    "gru": torch.gru_cell,
    "rnn_tanh": torch.rnn_tanh_cell,
    "rnn_relu": torch.rnn_relu_cell,
}


def _recurrence(
    name: str,
    data: Tensor,
    sizes: Sequence[int],
    states: Any,
    weights: Sequence[Tensor],
    _bias: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """Run a recurrent layer over a packed sequence, step by step: tracers have no operator for it."""
    given = list(states) if isinstance(states, (tuple, list)) else [states]
    directions = 2 if bidirectional else 1
    each = len(weights) // (layers * directions)
    final: list[list[Tensor]] = []
    for layer in range(layers):
        outputs: list[Tensor] = []
        for direction in range(directions):
            k = layer * directions + direction
            own = list(weights[k * each : (k + 1) * each])
            rows, last = _one_way(name, data, sizes, [s[k] for s in given], own, backwards=direction == 1)
            outputs.append(rows)
            final.append(last)
        data = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and layer < layers - 1:
            data = torch.dropout(data, dropout, train)
    return (data, *(torch.stack([last[k] for last in final]) for k in range(len(given))))


def _one_way(
    name: str, data: Tensor, sizes: Sequence[int], states: list[Tensor], own: list[Tensor], *, backwards: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run one layer in one direction; return the rows in the order of the data, and the last states."""
    steps = list(zip(data.split(list(sizes)), sizes, strict=True))
    made: list[Tensor] = []
    for x, active in reversed(steps) if backwards else steps:
        new = _step(name, x, [s[:active] for s in states], own)
        made.append(new[0])
        states = [
            torch.cat([n, s[active:]]) if active < len(s) else n for n, s in zip(new, states, strict=True)
        ]
    return torch.cat(made[::-1] if backwards else made), states


def _step(name: str, x: Tensor, states: list[Tensor], own: list[Tensor]) -> list[Tensor]:
    if name != "lstm":
        return [_CELLS[name](x, states[0], *own)]
    if len(own) in (2, 4):
        return list(torch.lstm_cell(x, states, *own))
    inputs, recurrent, *biases, projection = own
    gates = x @ inputs.T + states[0] @ recurrent.T + sum(biases)
    enter, keep, candidate, leave = gates.chunk(4, -1)
    cell = keep.sigmoid() * states[1] + enter.sigmoid() * candidate.tanh()
    return [(leave.sigmoid() * cell.tanh()) @ projection.T, cell]
