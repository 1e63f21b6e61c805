"""Every published format is read exactly, and every damage to it is noticed."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import dataset_files as files
import numpy as np
import pytest

from isthmus.errors import DataError, MissingExtraError
from isthmus.training._formats import (
    read_bytes,
    read_cifar_binary,
    read_cifar_pickle,
    read_idx,
    read_parquet,
)

# --- Plain and zipped files --------------------------------------------------------------------------------


def test_bytes_are_unzipped_whatever_the_name(tmp_path: Path) -> None:
    for name, content in (("a.gz", b"plain"), ("b", gzip.compress(b"zipped")), ("c.gz", gzip.compress(b"x"))):
        (tmp_path / name).write_bytes(content)
    assert [read_bytes(tmp_path / n) for n in ("a.gz", "b", "c.gz")] == [b"plain", b"zipped", b"x"]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_bytes(tmp_path / "missing")
    for content in (b"", gzip.compress(b"")):
        (tmp_path / "empty").write_bytes(content)
        with pytest.raises(DataError, match="is empty"):
            read_bytes(tmp_path / "empty")
    zipped = gzip.compress(os.urandom(1000))
    for length in (2, 5, 12, 500, len(zipped) - 1):
        (tmp_path / "cut").write_bytes(zipped[:length])
        with pytest.raises(DataError, match="truncated or damaged gzip"):
            read_bytes(tmp_path / "cut")
    flipped = bytearray(zipped)
    flipped[600] ^= 1
    (tmp_path / "cut").write_bytes(flipped)
    with pytest.raises(DataError, match="truncated or damaged gzip"):
        read_bytes(tmp_path / "cut")


# --- IDX ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 1, 1), (0, 28, 28)])
def test_idx_images(shape: tuple[int, int, int]) -> None:
    array = files.images(*shape)
    assert np.array_equal(read_idx(files.idx(array), "x", 3), array)


def test_idx_labels_by_hand() -> None:
    content = bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 0, 9])
    assert read_idx(content, "x", 1).tolist() == [7, 0, 9]


@pytest.mark.parametrize(
    ("content", "dimensions", "message"),
    [
        (files.idx(files.images(3)), 3, "magic number 0x00000803.*found 0x00000801.*exchanged"),
        (b"\x89PNG\r\n", 3, "found 0x89504e47"),
        (b"\x00\x00", 1, "magic number"),
        (b"", 1, "magic number"),
        (bytes([0, 0, 13, 3]) + bytes(50), 3, "found 0x00000d03"),
        (files.idx(files.images(3, 4, 5))[:10], 3, "truncated IDX header"),
        (files.idx(files.images(3, 4, 5))[:-1], 3, r"expected 60 bytes for shape \(3, 4, 5\), found 59"),
        (files.idx(files.images(3, 4, 5)) + b"x", 3, "expected 60 bytes.*found 61"),
    ],
)
def test_damaged_idx(content: bytes, dimensions: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_idx(content, "some file", dimensions)


# --- CIFAR -------------------------------------------------------------------------------------------------


def test_cifar_binary() -> None:
    pixels = files.images(3, 3, 32, 32)
    one = read_cifar_binary(files.cifar_binary(pixels, np.array([5, 0, 9])), "x", 1)
    two = read_cifar_binary(files.cifar_binary(pixels, np.array([1, 2, 3]), np.array([99, 0, 50])), "x", 2)
    assert np.array_equal(one[0], pixels)
    assert one[1].tolist() == [5, 0, 9]
    assert np.array_equal(two[0], pixels)
    assert two[1].tolist() == [99, 0, 50], "the fine label is the second"


@pytest.mark.parametrize("length", [0, 1, 3072, 3074, 2 * 3073 - 1])
def test_damaged_cifar_binary(length: int) -> None:
    with pytest.raises(DataError, match=rf"expected records of 3073 bytes, found {length}"):
        read_cifar_binary(bytes(length), "x", 1)


@pytest.mark.parametrize(
    "reconstruct", [b"", b"cnumpy._core.multiarray\n_reconstruct\n"], ids=["old numpy", "new numpy"]
)
def test_cifar_pickles_of_python_2(reconstruct: bytes) -> None:
    pixels = files.images(2, 3, 32, 32)
    content = files.cifar_python(pixels, [3, 8], b"fine_labels", reconstruct)
    read, numbers = read_cifar_pickle(content, "x", "fine_labels")
    assert np.array_equal(read, pixels)
    assert numbers.tolist() == [3, 8]


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_pickles_of_python_3(protocol: int) -> None:
    pixels = files.images(2, 3, 32, 32)
    content = pickle.dumps({b"data": pixels.reshape(2, -1), b"labels": [1, 2]}, protocol)
    assert np.array_equal(read_cifar_pickle(content, "x", "labels")[0], pixels)


class Malicious:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("should-never-exist",)


def test_cifar_pickles_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (
        pickle.dumps({b"data": Malicious(), b"labels": []}),
        files.cifar_python(files.images(1, 3, 32, 32), [1], reconstruct=b"cposix\nmkdir\n"),
        b"cbuiltins\neval\n(V1\ntR.",
        b"cnumpy\nload\n(V1\ntR.",
    ):
        with pytest.raises(DataError, match=r"refused or damaged: it asks for (posix|builtins|numpy)\."):
            read_cifar_pickle(content, "x", "labels")
    assert list(tmp_path.iterdir()) == []


def test_damaged_cifar_pickles() -> None:
    whole = files.cifar_python(files.images(2, 3, 32, 32), [3, 8])
    for length in (0, 1, 10, 100, 5000, len(whole) - 1):
        with pytest.raises(DataError, match="refused or damaged"):
            read_cifar_pickle(whole[:length], "x", "labels")


@pytest.mark.parametrize(
    "value",
    [
        [1, 2],
        {b"data": np.zeros((2, 3072), np.uint8)},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]},
        {b"data": np.zeros((2, 3071), np.uint8), b"labels": [1, 2]},
        {b"data": np.zeros((2, 3072), np.float32), b"labels": [1, 2]},
        {b"data": np.zeros((2, 3072), np.uint8), b"labels": 7},
        {b"data": np.zeros((2, 3072), np.uint8), b"coarse_labels": [1, 2]},
    ],
)
def test_pickles_of_other_things(value: Any) -> None:
    with pytest.raises(DataError, match="expected 'data' of n × 3072 bytes and n 'labels'"):
        read_cifar_pickle(pickle.dumps(value), "x", "labels")


# --- Parquet -----------------------------------------------------------------------------------------------


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def write_parquet(path: Path, **columns: Any) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(sys.modules["pyarrow"].table(columns), path)
    return path


def cells(pixels: np.ndarray, format: str = "PNG") -> list[dict[str, Any]]:
    return [{"bytes": encoded(p, format), "path": None} for p in pixels]


def test_parquet_shards_of_colour_images(tmp_path: Path) -> None:
    pixels = files.images(5, 32, 32, 3)
    shards = [
        write_parquet(tmp_path / "1.parquet", img=cells(pixels[:3]), label=[0, 1, 2]),
        write_parquet(tmp_path / "2.parquet", img=cells(pixels[3:]), label=[3, 4]),
    ]
    (read, numbers), encoding = read_parquet(shards, 3)
    assert np.array_equal(read, pixels.transpose(0, 3, 1, 2))
    assert numbers.tolist() == [0, 1, 2, 3, 4]
    assert numbers.dtype == np.int64
    assert encoding == "PNG"


def test_parquet_of_grey_images_plain_bytes_and_other_column_names(tmp_path: Path) -> None:
    pixels = files.images(2, 28, 28)
    path = write_parquet(tmp_path / "a.parquet", image=[encoded(p) for p in pixels], labels=[4, 2])
    (read, numbers), _ = read_parquet([path], 1)
    assert np.array_equal(read, pixels[:, None])
    assert numbers.tolist() == [4, 2]


def test_parquet_tells_jpeg(tmp_path: Path) -> None:
    smooth = np.full((2, 32, 32, 3), 100, np.uint8)
    path = write_parquet(tmp_path / "a.parquet", img=cells(smooth, "JPEG"), fine_label=[0, 1])
    (read, _), encoding = read_parquet([path], 3)
    assert encoding == "JPEG"
    assert np.abs(read.astype(int) - 100).max() <= 2


def test_damaged_parquet(tmp_path: Path) -> None:
    pixels = files.images(2, 32, 32, 3)
    good = write_parquet(tmp_path / "good.parquet", img=cells(pixels), label=[0, 1])
    content = good.read_bytes()
    for length in (0, 3, 100, len(content) - 1):
        (tmp_path / "cut.parquet").write_bytes(content[:length])
        with pytest.raises(DataError, match="truncated or not a parquet file"):
            read_parquet([tmp_path / "cut.parquet"], 3)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pixels": [1], "label": [1]}, r"expected a column 'img' or 'image', found \['pixels', 'label'\]"),
        ({"img": [b"x"], "class": [1]}, "expected a column 'label' or 'fine_label' or 'labels', found"),
        ({"img": [b"not an image"], "label": [1]}, "image in row 0 cannot be decoded"),
        ({"img": [{"bytes": None, "path": "a.png"}], "label": [1]}, "image in row 0 cannot be decoded"),
        ({"img": [b"x"], "label": ["cat"]}, "expected integer labels, found object"),
        ({"img": [1.5], "label": [1]}, "cannot be decoded"),
    ],
)
def test_parquet_with_other_contents(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_parquet([write_parquet(tmp_path / "a.parquet", **columns)], 3)


def test_parquet_of_unequal_or_no_images(tmp_path: Path) -> None:
    mixed = [encoded(files.images(32, 32, 3)), encoded(files.images(16, 16, 3))]
    with pytest.raises(DataError, match=r"unequal size: \(32, 32\) in row 0, \(16, 16\) in row 1"):
        read_parquet([write_parquet(tmp_path / "a.parquet", img=mixed, label=[0, 1])], 3)
    cut = encoded(files.images(32, 32, 3))[:300]
    with pytest.raises(DataError, match="image in row 0 cannot be decoded"):
        read_parquet([write_parquet(tmp_path / "b.parquet", img=[cut], label=[0])], 3)
    pyarrow = pytest.importorskip("pyarrow")
    none = write_parquet(
        tmp_path / "c.parquet",
        img=pyarrow.array([], pyarrow.binary()),
        label=pyarrow.array([], pyarrow.int64()),
    )
    with pytest.raises(DataError, match=r"c\.parquet: holds no images"):
        read_parquet([none], 3)
    with pytest.raises(DataError, match="parquet: holds no images"):
        read_parquet([], 3)


def test_without_pyarrow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[study\]"'):
        read_parquet([], 3)
