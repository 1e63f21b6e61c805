"""Data files that mean harm or were damaged: one error that names the file, soon, in little memory, and nothing run."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import resource
import struct
import sys
import tarfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dataset_files as files
import numpy as np
import pytest

from isthmus.errors import DataError
from isthmus.study import load_dataset
from isthmus.training._formats import read_bytes, read_cifar_pickle, read_idx, read_parquet

PIXELS = files.images(2, 3, 32, 32)
FLAT = PIXELS.reshape(2, -1)


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Every one within seconds, and without more than a GiB beside what is there (Linux counts in kB)."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < 10
    if sys.platform.startswith("linux"):
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


# --- IDX and gzip ------------------------------------------------------------------------------------------


def header(*lengths: int) -> bytes:
    return struct.pack(f">BBBB{len(lengths)}I", 0, 0, 8, len(lengths), *lengths)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # The product is a multiple of 2**64, so that a product in 64 bits is 0.
        (header(2**31, 2**31, 4), f"expected {2**64} bytes for shape .*, found 0"),
        (
            header(2**32 - 1, 2**32 - 1, 2**32 - 1),
            "expected 79228162458924105385300197375 bytes for shape .*, found 0. The file is truncated",
        ),
        (header(2**32 - 1, 28, 28) + bytes(100), "expected 3367254359280 bytes .* found 100"),
        (header(0, 2**32 - 1, 2**32 - 1), None),
        (header(5, 0, 0), r"expected images of at least one pixel, found shape \(5, 0, 0\)"),
        (header(5, 0, 28), "expected images of at least one pixel"),
    ],
)
def test_headers_that_promise_too_much(content: bytes, message: str | None, tmp_path: Path) -> None:
    if message is not None:
        with pytest.raises(DataError, match=f"images: {message}"):
            read_idx(content, "images", 3)
        return
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(header(0))
    with pytest.raises(DataError, match="train-images-idx3-ubyte"):
        load_dataset("mnist", tmp_path)


def zeros(size: int) -> bytes:
    """Return a gzip file of zeros without ever holding them."""
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(bytes(2**20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


def test_files_that_unzip_to_very_much_are_not_read_to_their_end(tmp_path: Path) -> None:
    bomb = zeros(64 << 20)
    assert len(bomb) < 2**17
    (tmp_path / "bomb").write_bytes(bomb)
    with pytest.raises(DataError, match="bomb: expected at most 1,048,576 bytes, unzipped, found more"):
        read_bytes(tmp_path / "bomb", 2**20)
    (tmp_path / "plain").write_bytes(bytes(2**20 + 1))
    with pytest.raises(DataError, match="plain: expected at most 1,048,576 bytes, found more"):
        read_bytes(tmp_path / "plain", 2**20)
    (tmp_path / "plain").write_bytes(bytes(2**20))
    assert len(read_bytes(tmp_path / "plain", 2**20)) == 2**20
    # Two members that follow each other are one file, as gzip says.
    (tmp_path / "two").write_bytes(gzip.compress(b"a") + gzip.compress(b"b"))
    assert read_bytes(tmp_path / "two") == b"ab"


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    """A pipe would be waited for without end, a folder cannot be read."""
    os.mkfifo(tmp_path / "train-images-idx3-ubyte")
    (tmp_path / "train.parquet").mkdir()
    os.mkfifo(tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match="No files of mnist"):
        load_dataset("mnist", tmp_path)


def test_errors_name_the_file_besides_the_data_set(tmp_path: Path) -> None:
    files.write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(files.idx(np.full(20, 11, np.uint8)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: mnist train: labels must lie in 0..9"):
        load_dataset("mnist", tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(files.idx(np.zeros(3, np.uint8)))
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: .*20 images but 3 labels"):
        load_dataset("mnist", tmp_path)


# --- Pickles -----------------------------------------------------------------------------------------------


def call(function: bytes, arguments: bytes) -> bytes:
    return b"c" + function + arguments + b"R."


def deep(opening: bytes, count: int, closing: bytes) -> bytes:
    return opening + closing * count + b"."


def batch(data: Any, labels: Any = (0, 1), key: bytes = b"labels", protocol: int = 2) -> bytes:
    return pickle.dumps({b"data": data, key: list(labels) if isinstance(labels, tuple) else labels}, protocol)


EVIL = {
    "exec": b"cbuiltins\nexec\n(S'x'\ntR.",
    "getattr": b"cbuiltins\ngetattr\n(S'x'\nS'y'\ntR.",
    "numpy load": b"cnumpy\nload\n(S'x'\ntR.",
    "numpy scalar": b"cnumpy.core.multiarray\nscalar\n(S'x'\ntR.",
    "a name with dots": b"\x80\x04\x8c\x05numpy\x8c\x0bos.system__\x93.",
    "a large array": call(b"numpy\nndarray\n", b"(J\xff\xff\xff\x7ftt"),
    "an array of another class": call(
        b"numpy.core.multiarray\n_reconstruct\n", b"(cnumpy\ndtype\n(K\x00tC\x01btt"
    )[:-1]
    + b".",
    "instance": b"(inumpy\nndarray\n.",
    "object": b"(cnumpy\nndarray\no.",
    "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "persistent": b"Pname\n.",
    "extension": b"\x82\x01.",
    "next buffer": b"\x80\x05\x97.",
    "frozen set": b"\x80\x04(\x91.",
    "attributes of a function": b"c_codecs\nencode\n}S'x'\nI1\nsb.",
    "attributes of a function by slots": b"c_codecs\nencode\n(N}S'__defaults__'\nI1\nstb.",
    "call of a stored value": b"S'x'\n(tR.",
    "dictionary called": b"}(tR.",
    "long memory index": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "long int": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "text longer than the file": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x00a.",
    "bytes longer than the file": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\x00\x00a.",
    "byte array longer than the file": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\x00\x00a.",
    "frame longer than the file": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\x00\x00N.",
    "odd encoding": call(b"_codecs\nencode\n", b"(V" + b"a" * 1000 + b"\nVpunycode\nt"),
    "deep lists": deep(b"]", 200_000, b"\x85"),
    "deep tuple as a key": b"}N" + b"\x85" * 200_000 + b"Ns.",
    "unhashable key": b"}]Ns.",
    "no stop": b"N",
    "mark missing": b"t.",
    "memory that is not there": b"h\x07.",
    "recursive": b"\x80\x02]q\x00h\x00a.",
    "an int of many digits": b"L" + b"9" * 100_000 + b"L\n.",
    "unknown": b"\xff.",
}


@pytest.mark.parametrize("content", EVIL.values(), ids=EVIL.keys())
def test_pickles_that_ask_for_more_than_arrays_are_refused(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=r"^some file: (not a CIFAR batch, refused|expected 'data' of n)"
    ) as caught:
        read_cifar_pickle(content, "some file", "labels")
    assert len(str(caught.value)) < 1000
    assert list(tmp_path.iterdir()) == []


def test_the_same_text_cannot_be_encoded_without_end() -> None:
    text = b"X" + struct.pack("<I", 2**20) + b"a" * 2**20 + b"q\x01"
    again = b"(c_codecs\nencode\nq\x02h\x01X\x06\x00\x00\x00latin1q\x03\x86R"
    content = b"\x80\x02" + text + again + b"h\x02h\x01h\x03\x86R" * 2000 + b"l."
    with pytest.raises(DataError, match="it holds more text than the file is long"):
        read_cifar_pickle(content, "some file", "labels")


def test_a_dtype_of_the_process_is_not_touched() -> None:
    before = np.dtype("u1").__reduce__()
    content = b"cnumpy\ndtype\n(S'u1'\nI0\nI0\ntR(I3\nS'>'\nNNNI-1\nI-1\nI0\ntb."
    with pytest.raises(DataError, match="expected 'data'"):
        read_cifar_pickle(content, "some file", "labels")
    assert np.dtype("u1").__reduce__() == before


def nested(depth: int, width: int = 10) -> list[Any]:
    value: list[Any] = [0]
    for _ in range(depth):
        value = [value] * width
    return value


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (nested(30), "expected 'data' of n × 3072 bytes and n 'labels'"),
        ([nested(30), 1], "expected 'labels' to be numbers from 0, found others"),
        ([-1, 0], "numbers from 0"),
        ([2**70, 0], "numbers from 0"),
        ([0.0, 1.0], "numbers from 0"),
        ([True, False], "numbers from 0"),
        (["a", "b"], "numbers from 0"),
        ([None, None], "numbers from 0"),
        ((0,), "expected 'data' of n"),
    ],
)
def test_labels_that_are_none(labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_cifar_pickle(batch(FLAT, labels), "some file", "labels")


def test_arrays_are_read_in_either_order_and_only_of_bytes() -> None:
    for data in (FLAT, np.asfortranarray(FLAT)):
        for protocol in (2, 3, 4):
            pixels, numbers = read_cifar_pickle(batch(data, (3, 8), protocol=protocol), "x", "labels")
            assert np.array_equal(pixels, PIXELS)
            assert numbers.tolist() == [3, 8]
    for other in (
        FLAT.astype(np.int64),
        FLAT.astype("S1"),
        FLAT.astype(object),
        FLAT[:, :10],
        FLAT.ravel(),
        [1, 2],
    ):
        with pytest.raises(DataError, match=r"not a CIFAR batch, refused|expected 'data' of n"):
            read_cifar_pickle(batch(other), "x", "labels")


def test_arrays_whose_bytes_are_fewer_than_their_shape() -> None:
    whole = batch(FLAT, protocol=4)
    short = whole.replace(FLAT.tobytes(), FLAT.tobytes()[:-1]).replace(
        struct.pack("<I", FLAT.size), struct.pack("<I", FLAT.size - 1)
    )
    assert short != whole
    with pytest.raises(DataError, match=r"refused or damaged|expected 'data'"):
        read_cifar_pickle(short, "x", "labels")


# --- Archives ----------------------------------------------------------------------------------------------


def member(name: str, content: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, content


def tarred(*members: tuple[tarfile.TarInfo, bytes], zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    for info, content in members:
        buffer.write(info.tobuf(tarfile.PAX_FORMAT))
        buffer.write(content + bytes(-len(content) % 512))
    buffer.write(bytes(1024))
    return gzip.compress(buffer.getvalue(), 1) if zipped else buffer.getvalue()


WHOLE = files.cifar10_members()
GOOD = [member(f"cifar-10-batches-bin/{name}", content) for name, content in WHOLE.items()]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (
            member("a/data_batch_1.bin", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
            "found 'a/data_batch_1.bin', a symb",
        ),
        (member("a/data_batch_1.bin", type=tarfile.LNKTYPE, linkname="../../x"), "a hard link"),
        (member("a/data_batch_1.bin", type=tarfile.CHRTYPE), "a device"),
        (member("a/data_batch_1.bin", type=tarfile.FIFOTYPE), "a device"),
        (member("a/data_batch_1.bin", type=tarfile.DIRTYPE), "a folder"),
        (member("../data_batch_1.bin", WHOLE["data_batch_1.bin"]), "a file outside its folder"),
        (member("/tmp/data_batch_1.bin", WHOLE["data_batch_1.bin"]), "a file outside its folder"),
        (member("b/data_batch_1.bin", WHOLE["data_batch_1.bin"]), "holds data_batch_1.bin twice"),
        (member("a/readme", size=2**60), "found a member that ends at|truncated or damaged archive"),
        (member("a/data_batch_1.bin", size=2**33), "found a member that ends at"),
        (member("a/data_batch_1.bin", b"short"), "holds data_batch_1.bin twice"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_members_that_are_no_ordinary_files(
    tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes], message: str, zipped: bool
) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(tarred(bad, *GOOD, zipped=zipped))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("cifar10", tmp_path)
    assert "cifar-10-binary.tar.gz" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["cifar-10-binary.tar.gz"]


def test_the_same_archive_without_them_is_read(tmp_path: Path) -> None:
    extra = member("a/link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    for zipped in (True, False):
        (tmp_path / "cifar-10-binary.tar.gz").write_bytes(tarred(extra, *GOOD, zipped=zipped))
        assert len(load_dataset("cifar10", tmp_path)) == 20


def test_archives_that_unzip_to_very_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.training._archive.MOST_BYTES", 2**22)
    path = tmp_path / "cifar-10-binary.tar.gz"
    info, _ = member("a/readme", size=64 << 20)
    path.write_bytes(gzip.compress(info.tobuf()) + zeros(64 << 20))
    with pytest.raises(
        DataError, match="expected at most 4,194,304 bytes, unzipped, found a member that ends"
    ):
        load_dataset("cifar10", tmp_path)
    many = b"".join(member(f"a/{i}")[0].tobuf() for i in range(1001))
    path.write_bytes(gzip.compress(many + bytes(1024)))
    with pytest.raises(DataError, match="expected at most 1000 members, found more"):
        load_dataset("cifar10", tmp_path)
    # A header of a header that claims gigabytes must not be read into memory.
    claims = tarfile.TarInfo("x")
    claims.type, claims.size = tarfile.XHDTYPE, 7 << 30
    path.write_bytes(gzip.compress(claims.tobuf() + bytes(1024)))
    with pytest.raises(DataError, match="found a member that ends at"):
        load_dataset("cifar10", tmp_path)


# --- Parquet -----------------------------------------------------------------------------------------------


def encoded(pixels: np.ndarray, kind: str = "PNG", mode: str | None = None) -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    opened = image.fromarray(pixels)
    (opened if mode is None else opened.convert(mode)).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(path: Path, **columns: Any) -> Path:
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(sys.modules["pyarrow"].table(columns), path)
    return path


def png_of(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size, with next to nothing behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


SMALL = files.images(32, 32, 3)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (POSTSCRIPT, "it is neither PNG nor JPEG"),
        (lambda: encoded(SMALL, "BMP"), "it is neither PNG nor JPEG"),
        (lambda: encoded(SMALL, "GIF"), "it is neither PNG nor JPEG"),
        (lambda: encoded(SMALL, "TIFF"), "it is neither PNG nor JPEG"),
        (lambda: encoded(SMALL, "PPM"), "it is neither PNG nor JPEG"),
        (lambda: encoded(SMALL, "WEBP"), "it is neither PNG nor JPEG"),
        (png_of(2000, 2000), "at most 1,048,576 pixels of eight bits, found 2,000 × 2,000 of mode RGB"),
        (png_of(12_000, 12_000), "cannot be decoded"),
        (png_of(60_000, 60_000), "cannot be decoded"),
        (png_of(2**31 - 1, 2**31 - 1), "cannot be decoded"),
        (png_of(32, 32), "cannot be decoded"),
        (png_of(0, 0), "cannot be decoded"),
        (b"", "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "cannot be decoded"),
        (b"\xff\xd8\xff", "cannot be decoded"),
        (lambda: encoded(np.full((32, 32), 40_000, np.uint16)), "of eight bits, found 32 × 32 of mode I;16"),
        (lambda: encoded(SMALL, "JPEG", "CMYK"), "of mode CMYK"),
    ],
)
def test_images_that_are_none_of_these(
    tmp_path: Path, image: bytes | Callable[[], bytes], message: str
) -> None:
    content = image if isinstance(image, bytes) else image()
    cells = [{"bytes": encoded(SMALL), "path": None}, {"bytes": content, "path": "a.png"}]
    path = write_parquet(tmp_path / "train.parquet", img=cells, label=[1, 2])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with pytest.raises(
            DataError, match=rf"train\.parquet: the image in row 1 cannot be decoded.*{message}|{message}"
        ):
            read_parquet([path], 3)
    assert told == []


def test_structs_without_bytes_and_other_types(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    good = encoded(SMALL)
    null = pyarrow.StructArray.from_arrays(
        [pyarrow.array([good, good]), pyarrow.array(["a", "b"])],
        ["bytes", "path"],
        mask=pyarrow.array([False, True]),
    )
    cases: list[tuple[Any, Any, str]] = [
        ([{"path": "a.png"}], [1], r"expected images as a struct with 'bytes', found the fields \['path'\]"),
        ([{"bytes": "text", "path": "a"}], [1], "expected encoded images as bytes, found string"),
        ([{"bytes": 3}], [1], "expected encoded images as bytes, found int64"),
        ([[1, 2, 3]], [1], "expected encoded images as bytes, found list"),
        (["text"], [1], "expected encoded images as bytes, found string"),
        ([None], [1], "the image in row 0 cannot be decoded: it is missing"),
        ([{"bytes": None, "path": "a"}], [1], "the image in row 0 cannot be decoded: it is missing"),
        (null, [1, 2], "the image in row 1 cannot be decoded: it is missing"),
        ([good, None], [1, 2], "the image in row 1 cannot be decoded: it is missing"),
        ([good], [None], "expected integer labels"),
        ([good, good], [1, None], "expected integer labels, found .* with 1 missing"),
        ([good], [1.0], "expected integer labels, found float64"),
        ([good], [True], "expected integer labels, found (bool|object)"),
        ([good], [[1]], "expected integer labels"),
        ([good], [b"1"], "expected integer labels"),
    ]
    for images, labels, message in cases:
        path = write_parquet(tmp_path / "a.parquet", img=images, label=labels)
        with pytest.raises(DataError, match=rf"a\.parquet: {message}"):
            read_parquet([path], 3)
    twice = pyarrow.Table.from_arrays(
        [pyarrow.array([good]), pyarrow.array([good]), pyarrow.array([1])], ["img", "img", "label"]
    )
    sys.modules["pyarrow.parquet"].write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"expected a column 'img' or 'image', found \['img', 'img', 'label'\]"
    ):
        read_parquet([tmp_path / "a.parquet"], 3)


def test_few_bytes_that_are_very_many_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    rows = 1_000_001
    same = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int32)), pyarrow.array([b"x"]))
    path = write_parquet(tmp_path / "a.parquet", img=same, label=pyarrow.array(np.zeros(rows, np.int64)))
    assert path.stat().st_size < 2**18
    with pytest.raises(
        DataError, match="expected at most 1,000,000 rows and 536,870,912 bytes, found 1,000,001 rows"
    ):
        read_parquet([path], 3)


def test_pixels_that_would_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [{"bytes": encoded(SMALL), "path": None}] * 4
    path = write_parquet(tmp_path / "a.parquet", img=cells, label=[0, 1, 2, 3])
    assert len(read_parquet([path], 3)[0][1]) == 4
    monkeypatch.setattr("isthmus.training._parquet.MOST_BYTES", 10_000)
    with pytest.raises(
        DataError, match=r"expected at most 10,000 bytes of pixels, found more by row 3|10,000 bytes, found"
    ):
        read_parquet([path], 3)


def test_a_shard_that_is_missing_is_noticed(tmp_path: Path) -> None:
    cells = [{"bytes": encoded(SMALL), "path": None}]
    for number in (0, 2):
        write_parquet(tmp_path / f"train-0000{number}-of-00003.parquet", img=cells, label=[number])
    with pytest.raises(
        DataError, match=r"train-00000-of-00003\.parquet: expected 3 shards beside each other, found 2"
    ):
        load_dataset("cifar10", tmp_path)
    write_parquet(tmp_path / "train-00001-of-00003.parquet", img=cells, label=[1])
    assert load_dataset("cifar10", tmp_path).labels.tolist() == [0, 1, 2]


def test_jpeg_is_noted_wherever_it_stands(tmp_path: Path) -> None:
    cells = [{"bytes": encoded(SMALL, kind), "path": None} for kind in ("PNG", "JPEG")]
    assert read_parquet([write_parquet(tmp_path / "a.parquet", img=cells, label=[0, 1])], 3)[1] == "JPEG"


def test_kinds_of_pixel_of_eight_bits_are_read(tmp_path: Path) -> None:
    grey = np.full((32, 32, 3), 77, np.uint8)
    for mode in ("L", "RGB", "RGBA", "LA"):
        path = write_parquet(tmp_path / "a.parquet", img=[encoded(grey, "PNG", mode)], label=[0])
        assert read_parquet([path], 1)[0][0].max() == read_parquet([path], 3)[0][0].min() == 77
