"""Reading a pickle of plain values and byte arrays without running anything.

A pickle is a program. This reader knows a list of its instructions, the four names that an array is pickled with, and
gives each of these names a function of ours that only keeps what it is told: no class is made, no attribute set, no
memory taken that is not in the file. Whatever else a pickle asks for ends the reading.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

__all__ = ["PlainReader", "StoredArray"]

_PLAIN = (
    "PROTO FRAME STOP MARK POP "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 "
    "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET "
    "GLOBAL STACK_GLOBAL REDUCE BUILD"
)
"""Instructions that are followed. The others make objects of classes (INST, OBJ, NEWOBJ, EXT), ask the caller for
objects (PERSID), copy without need (DUP), or take memory before the bytes for it are seen (LONG4, BYTEARRAY8)."""


@dataclass
class _NumpyDtype:
    """Stands for a NumPy dtype."""

    code: str = ""

    def __setstate__(self, state: Any) -> None:
        """Take byte order and fields, which a dtype of single bytes has not."""


@dataclass
class StoredArray:
    """Stands for a NumPy array.

    Attributes:
        shape: of the array.
        kind: code of its dtype, such as ``"u1"``.
        fortran: whether the first index runs fastest.
        content: its bytes.
    """

    shape: tuple[int, ...] = ()
    kind: str = ""
    fortran: bool = False
    content: bytes = b""

    def __setstate__(self, state: Any) -> None:
        """Take what ``ndarray.__reduce__`` gave: version, shape, dtype, order, bytes."""
        _, shape, kind, fortran, content = state
        if not (isinstance(kind, _NumpyDtype) and isinstance(content, bytes) and isinstance(shape, tuple)):
            raise pickle.UnpicklingError("its array is not one of bytes")
        self.shape, self.kind, self.fortran, self.content = shape, kind.code, bool(fortran), content


def _array_class(*_: Any) -> None:
    raise pickle.UnpicklingError("it makes an array by calling its class")


def _empty(owner: Any, *_: Any) -> StoredArray:
    if owner is not _array_class:
        raise pickle.UnpicklingError("it asks for an array of another class")
    return StoredArray()


def _kind(code: Any, *_: Any) -> _NumpyDtype:
    text = code.decode("ascii", "replace") if isinstance(code, bytes) else code
    if not isinstance(text, str):
        raise pickle.UnpicklingError("its dtype has no code")
    return _NumpyDtype(text)


def _bytes(text: Any, encoding: Any) -> bytes:
    """Undo how Python 3 pickles bytes for Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


_GIVEN = {
    ("numpy", "ndarray"): _array_class,
    ("numpy", "dtype"): _kind,
    ("numpy.core.multiarray", "_reconstruct"): _empty,  # as old versions of NumPy call it
    ("numpy._core.multiarray", "_reconstruct"): _empty,
    ("_codecs", "encode"): _bytes,
}


# The reader of the standard library that is written in Python: its instructions are a table that can be cut down, and
# its memory of objects is a dictionary, whereas the one in C makes a list as long as the largest number in the file.
# Type checkers know it only as the one in C.
_Unpickler: Any = getattr(pickle, "_Unpickler")  # noqa: B009


class PlainReader(_Unpickler):
    """Reads a pickle of plain values and arrays of bytes (see the module).

    Args:
        content: the pickle; strings of Python 2 come out as bytes.
    """

    dispatch: ClassVar[dict[int, Any]] = {
        code: step
        for code, step in _Unpickler.dispatch.items()
        if code in {getattr(pickle, name)[0] for name in _PLAIN.split()}
    }

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")
        self._encoded, self._room = 0, len(content)

    def load(self) -> Any:
        """Return the value.

        Raises:
            pickle.UnpicklingError: it is no pickle of plain values.
        """
        try:
            return super().load()
        except KeyError as error:
            raise pickle.UnpicklingError(
                f"it holds the instruction or name {error}, which is not allowed"
            ) from error

    def find_class(self, module: str, name: str) -> Any:
        """Return our own function for a name of the list."""
        if (module, name) not in _GIVEN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _GIVEN[module, name]

    def load_reduce(self) -> None:
        """Call one of our own functions; encoded text is counted, for one text may be asked for many times."""
        arguments, function = self.stack.pop(), self.stack[-1]
        if not any(function is given for given in _GIVEN.values()):
            raise pickle.UnpicklingError("it calls something that is no function of the list")
        made = self.stack[-1] = function(*arguments)
        if isinstance(made, bytes):
            self._encoded += len(made)
            if self._encoded > self._room:
                raise pickle.UnpicklingError("it holds more text than the file is long")

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self) -> None:
        """Fill one of our stand-ins, and nothing else."""
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, (StoredArray, _NumpyDtype)):
            raise pickle.UnpicklingError("it sets attributes of something that is no array")
        target.__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self) -> None:
        """Add an entry whose key is text: to look up a key means to hash it, and a deep tuple ends the process."""
        value, key = self.stack.pop(), self.stack.pop()
        self._add([key, value])

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        """Add entries whose keys are text."""
        self._add(self.pop_mark())

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        """Make a dictionary whose keys are text."""
        entries = self.pop_mark()
        self.stack.append({})
        self._add(entries)

    dispatch[pickle.DICT[0]] = load_dict

    def _add(self, entries: list[Any]) -> None:
        target = self.stack[-1]
        if (
            not isinstance(target, dict)
            or len(entries) % 2
            or not all(isinstance(k, (str, bytes)) for k in entries[::2])
        ):
            raise pickle.UnpicklingError("it has a dictionary whose keys are not text")
        target.update(zip(entries[::2], entries[1::2], strict=True))
