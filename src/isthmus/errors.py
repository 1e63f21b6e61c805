"""The exception family: every error a user can meet, each also a builtin where natural.

A message says what was being done and to what, what was expected, what was found, and what to do next.
Parameters are named by their path in the model.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "DataError",
    "IsthmusError",
    "IsthmusWarning",
    "MissingExtraError",
    "ModelError",
    "OutputError",
    "ShapeError",
    "SymmetryError",
    "VerificationError",
]


class IsthmusError(Exception):
    """Base class of every error raised on purpose by Isthmus."""


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
