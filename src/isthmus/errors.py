"""The exception family: every error a user can meet, each also a builtin where natural.

A message says what was being done and to what, what was expected, what was found, and what to do next.
Parameters are named by their path in the model.
"""

from __future__ import annotations

import unicodedata

__all__ = [
    "CheckpointError",
    "DataError",
    "IsthmusError",
    "IsthmusWarning",
    "MissingExtraError",
    "ModelError",
    "OutputError",
    "ShapeError",
    "StudyError",
    "SymmetryError",
    "VerificationError",
    "printable",
]

_LONGEST_TEXT = 400
"""Characters of a name or a path that are shown."""
_LONGEST_MESSAGE = 20_000
"""Characters of a whole message that are shown."""
# What may be shown as it is: letters, marks, numbers, punctuation, symbols and the space. All else (control characters,
# escape codes, marks of direction, surrogates, private and unassigned characters, other separators) is not.
_SHOWN = ("L", "M", "N", "P", "S")


def printable(text: object, limit: int = _LONGEST_TEXT, *, lines: bool = False) -> str:
    r"""Return text from a file, a name or a path as something that is safe to show in a terminal.

    Only letters, marks, numbers, punctuation, symbols and spaces stay; every other character (control characters,
    the codes that move a cursor, marks that turn the direction of writing, lone surrogates) becomes a visible
    escape such as ``\x1b`` or ``\u202e``. Markup of a page or of a console library is that library's to escape.

    Args:
        text: anything; ``str`` of it is taken.
        limit: characters that are shown; the middle of a longer text is left out.
        lines: whether line breaks stay.

    Example:
        >>> printable("layer\x1b[31m.weight")
        'layer\\x1b[31m.weight'
    """
    given = str(text)
    if len(given) > limit:  # before the escapes, so that the work is bounded as well
        kept = max(limit // 2, 1)
        given = f"{given[:kept]} … {len(given) - 2 * kept} characters … {given[-kept:]}"
    if given.isascii() and given.isprintable():
        return given
    return "".join(_visible(c, lines) for c in given)


def _visible(character: str, lines: bool) -> str:
    if character == " " or (lines and character == "\n"):
        return character
    if unicodedata.category(character)[0] in _SHOWN:
        return character
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


class IsthmusError(Exception):
    """Base class of every error raised on purpose by Isthmus; its text never holds a control character."""

    def __str__(self) -> str:
        """Return the message, made safe to show (see :func:`printable`)."""
        return printable(super().__str__(), _LONGEST_MESSAGE, lines=True)


class ShapeError(IsthmusError, ValueError):
    """Tensors, states or grids whose sizes do not fit together."""


class SymmetryError(IsthmusError, ValueError):
    """A symmetry spec that is malformed, or does not describe the state it is used on."""


class VerificationError(SymmetryError):
    """A symmetry spec was run and found to change the function of the network."""


class ModelError(IsthmusError, ValueError):
    """A model that cannot be traced, is random in evaluation, or is in the wrong mode."""


class CheckpointError(IsthmusError, ValueError):
    """A checkpoint or stored result that cannot be read, or holds unusable values."""


class DataError(IsthmusError, ValueError):
    """Data that is empty, malformed, missing or outside its declared range."""


class OutputError(IsthmusError, OSError):
    """A folder or file that cannot be written; nothing half-written is left."""


class MissingExtraError(IsthmusError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class IsthmusWarning(UserWarning):
    """A result that is not wrong but easily misread; the message says why and what to do."""


class StudyError(IsthmusError, ValueError):
    """Settings of a study or a training run that make no sense, or a training run that diverged."""
