"""Small data sets in every published form, written by hand."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def images(count: int, *shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def labels(count: int, classes: int = 10) -> NDArray[np.int64]:
    return np.arange(count, dtype=np.int64) % classes


def idx(array: NDArray[np.uint8]) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.tobytes()


def write_mnist(folder: Path, count: int = 20, *, zipped: bool = True, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, extra in (("train", 0), ("t10k", 1)):
        contents = {
            f"{prefix}-images-idx3-ubyte": idx(images(count, 28, 28, seed=seed + extra)),
            f"{prefix}-labels-idx1-ubyte": idx(labels(count).astype(np.uint8)),
        }
        for name, content in contents.items():
            if zipped:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (folder / name).write_bytes(content)


def cifar_binary(pixels: NDArray[np.uint8], *label_columns: NDArray[np.int64]) -> bytes:
    table = [column.astype(np.uint8)[:, None] for column in label_columns]
    return np.concatenate([*table, pixels.reshape(len(pixels), -1)], 1).tobytes()


def cifar_python(
    pixels: NDArray[np.uint8], numbers: Sequence[int], key: bytes = b"labels", reconstruct: bytes = b""
) -> bytes:
    """Return what Python 2 pickled: a dictionary of byte strings, an array of ``numpy.core`` and a list."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    flat = pixels.reshape(len(pixels), -1)
    maker = reconstruct or b"cnumpy.core.multiarray\n_reconstruct\n"
    array = maker + b"cnumpy\nndarray\n" + b"K\x00\x85" + short(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + short(b"|") + b"NNN" + integer(-1) + integer(-1) + b"K\x00tb"
    state = b"(K\x01" + integer(flat.shape[0]) + integer(flat.shape[1]) + b"\x86" + dtype + b"\x89"
    state += b"T" + struct.pack("<i", flat.size) + flat.tobytes() + b"tb"
    listed = b"](" + b"".join(integer(n) for n in numbers) + b"e"
    return b"\x80\x02}(" + short(b"data") + array + state + short(key) + listed + b"u."


def cifar10_members(count: int = 4, *, python: bool = False) -> dict[str, bytes]:
    """Return the files of a CIFAR-10 of ``count`` examples per batch, batch ``i`` drawn from seed ``i``."""
    members: dict[str, bytes] = {}
    for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], 1):
        pixels, numbers = images(count, 3, 32, 32, seed=i), labels(count)
        if python:
            members[name] = cifar_python(pixels, numbers.tolist())
        else:
            members[f"{name}.bin"] = cifar_binary(pixels, numbers)
    return members


def write_members(folder: Path, members: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in members.items():
        (folder / name).write_bytes(content)


def archive(members: Mapping[str, bytes], folder: str = "cifar-10-batches-bin") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
