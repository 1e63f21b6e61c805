"""Files of ``torch.save``, read without running code, with bounds on what they may claim."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import importlib
import pathlib
import pickle
import re
import types
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from isthmus.checkpoints._formats import PICKLE_HEAD, TORCH_HEADS, damaged
from isthmus.errors import CheckpointError, printable
from isthmus.files import require_file

__all__ = ["load_torch", "too_large"]

_EXPECTED = "a torch file (.pt)"
_LARGEST_RATIO = 16
"""Bytes that may come out of each byte of a file: torch does not compress, others may have, by less."""
_SLACK = 2**26
"""Bytes that may always come out of a file: small ones with expanded tensors have large ratios."""
_SHOWN = 5
"""Foreign classes named in a message."""
_DOS_FOLDER = 0x10
# The names under which Lightning pickles a dictionary that can be read through attributes.
_ATTRIBUTE_DICTIONARIES = (
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)


def load_torch(path: Path) -> Any:
    """Return what a file of ``torch.save`` holds, on the CPU, without running any code that it may name.

    Raises:
        CheckpointError: no ordinary file, a damaged one, one that claims far more than it holds, or one that cannot be
            read without executing code.
    """
    require_file(path)
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"PK"):
        _check_archive(path)
    try:
        with warnings.catch_warnings():  # of what is refused anyway, or of how an old file stored its tensors
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals(_added()):
                return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged file makes the reader fail in any way at all
        raise _refusal(path, head, error) from error


def too_large(path: Path, nbytes: int) -> CheckpointError | None:
    """Return an error if a file claims to hold many times the bytes that it has."""
    size = path.stat().st_size
    if nbytes <= _LARGEST_RATIO * size + _SLACK:
        return None
    return CheckpointError(
        f"{printable(path)}: claims {nbytes:,} bytes of tensors in a file of {size:,}, which is made to fill the "
        "memory or damaged. Save what the tensors themselves hold: tensor.contiguous()."
    )


def _check_archive(path: Path) -> None:
    """Check the sums that the archive keeps of its parts, which torch itself does not, and their sizes.

    The parts are read as torch reads them, since a damaged directory of an archive means different things to different
    readers.

    Raises:
        CheckpointError: a part is not what was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
        if (error := too_large(path, sum(p.file_size for p in parts))) is not None:
            raise error
        _check_parts(path, parts)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile has many ways to say that it is none
        raise damaged(path, b"PK", _EXPECTED, str(error) or type(error).__name__) from error


def _check_parts(path: Path, parts: list[zipfile.ZipInfo]) -> None:
    """Compare every part with its sum.

    Raises:
        ValueError: it differs, or is listed twice or as a folder, of which torch gives back whatever is in memory.
    """
    own = {part.filename.partition("/")[2]: part for part in parts}
    with path.open("rb") as file:
        reader = torch._C.PyTorchFileReader(file)
        if len(own) < len(parts) or set(reader.get_all_records()) != set(own):
            raise ValueError("its directory lists parts twice, or others than there are")
        if any(part.external_attr & _DOS_FOLDER for part in parts):
            raise ValueError("its directory calls a part a folder")
        if not any(part.CRC for part in parts):  # written without sums, which torch allows
            return
        for name, part in own.items():
            if zlib.crc32(reader.get_record(name)) != part.CRC:
                raise ValueError(f"Bad CRC-32 of the part {name}")


def _refusal(path: Path, head: bytes, error: Exception) -> CheckpointError:
    message, shown = str(error), printable(path)
    needs = re.search(r"GLOBAL ([\w.]+)", message)
    plain = head.startswith(PICKLE_HEAD) and not head.startswith(TORCH_HEADS)
    if "TorchScript" in message:
        return CheckpointError(
            f"{shown}: refused, because it is a TorchScript archive, which holds code. "
            "Save the state_dict of the scripted module instead."
        )
    if (isinstance(error, pickle.UnpicklingError) and needs) or plain:
        names = _foreign(path, needs[1]) if needs else []
        what = f"it asks to run {', '.join(names)}" if needs else "it is a plain pickle"
        return CheckpointError(
            f"{shown}: refused, because reading it needs code execution: {what}. If it is a whole module, or has "
            "settings of a trainer's own classes beside the weights, load it once where you trust it, with "
            "torch.load(file, weights_only=False). Save only tensors: torch.save(model.state_dict(), file), or use "
            ".safetensors."
        )
    if "torch.nested" in message or "torch.distributed.tensor" in message:
        kind = "nested" if "torch.nested" in message else "distributed"
        return CheckpointError(
            f"{shown}: holds {kind} tensors, which have no single array of numbers. Save ordinary ones: "
            "tensor.to_padded_tensor(0) of a nested one, tensor.full_tensor() of a distributed one."
        )
    return damaged(path, head, _EXPECTED, message)


def _foreign(path: Path, first: str) -> list[str]:
    """Return the classes and functions that a file asks for and that are not known to be harmless."""
    names = [first]
    with contextlib.suppress(Exception):  # a damaged file has no list, and the first is enough
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        known = {name for _, name in _harmless()}
        names += sorted(set(found) - known - {first})
    more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [printable(n, 100) for n in names[:_SHOWN]] + more


def _added() -> list[Any]:
    """Return what to allow beyond what torch and the caller allow already, which must stay allowed afterwards."""
    already = torch.serialization.get_safe_globals()
    return [item for item in _harmless() if item not in already]


@cache
def _harmless() -> tuple[tuple[Callable[..., Any], str], ...]:
    """Return the classes, and the names in a pickle, that trainers keep beside weights and that run no code.

    Making one of them stores what it is given and does nothing else: no file is opened, no name is looked up, no
    function of the file's choice is called. NumPy's are those that rebuild an array, or a number, from its bytes; they
    are what a metric or a random state is pickled as. Lightning's dictionary is read as an ordinary one.
    """
    numpy: list[Any] = [np.ndarray, np.dtype]
    numpy += [kind for kind in vars(np.dtypes).values() if isinstance(kind, type)]
    plain: list[Any] = [
        argparse.Namespace,
        types.SimpleNamespace,
        datetime.date,
        datetime.datetime,
        datetime.time,
        datetime.timedelta,
        datetime.timezone,
    ]
    found = [(kind, f"{kind.__module__}.{kind.__qualname__}") for kind in (*numpy, *plain)]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        real = importlib.import_module(
            "numpy._core.multiarray" if np.__version__ >= "2" else "numpy.core.multiarray"
        )
        found += [(real._reconstruct, f"{module}._reconstruct"), (real.scalar, f"{module}.scalar")]
    # Paths are only text; one of another system could not be made here.
    for module in ("pathlib", "pathlib._local"):
        for name in ("PosixPath", "PurePosixPath"):
            found.append((pathlib.PurePosixPath, f"{module}.{name}"))
        for name in ("WindowsPath", "PureWindowsPath"):
            found.append((pathlib.PureWindowsPath, f"{module}.{name}"))
    found += [(collections.OrderedDict, name) for name in _ATTRIBUTE_DICTIONARIES]
    return tuple(found)
