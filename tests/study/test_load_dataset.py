"""Data sets by name, from folders in every layout, from archives, and downloaded."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dataset_files as files
import numpy as np
import pytest
import torch

from isthmus.errors import DataError, MissingExtraError
from isthmus.study import DATASETS, load_dataset
from isthmus.training._catalogue import SOURCES

FIRST_DIGITS = [1457, 1074, 1038, 1402, 952]
DIGEST_DIGITS = "b25d7715a3b30aa665a7eafadf2dbcf4b99e71e8b57243901bf10fd1c874697c"

# --- Digits ------------------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all() -> None:
    train, test = load_dataset("digits"), load_dataset("digits", split="test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.input_shape == (1, 8, 8)
    together = torch.cat([train.examples, test.examples])
    assert torch.equal(together.sort().values, torch.arange(1797))
    # Frozen when the split was made: a change here changes every result on digits.
    assert train.examples[:5].tolist() == FIRST_DIGITS
    assert train.digest == DIGEST_DIGITS
    assert train.digest != test.digest
    assert train.inputs.dtype == torch.float32
    assert (float(train.inputs.min()), float(train.inputs.max())) == (0.0, 1.0)
    assert min(train.labels.bincount()) > 100


def test_digits_are_the_images_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    bunch = datasets.load_digits()
    test = load_dataset("digits", split="test")
    assert np.array_equal(test.inputs.numpy()[:, 0] * 16, bunch.images[test.examples.numpy()])
    assert np.array_equal(test.labels.numpy(), bunch.target[test.examples.numpy()])


def test_without_scikit_learn_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtraError, match=r'digits .* pip install "isthmus\[study\]"'):
        load_dataset("digits")


# --- Folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["mnist", "MNIST/raw", ""])
@pytest.mark.parametrize("zipped", [True, False])
def test_mnist_layouts(tmp_path: Path, layout: str, zipped: bool) -> None:
    files.write_mnist(tmp_path / layout, zipped=zipped)
    for split, seed in (("train", 0), ("test", 1)):
        data = load_dataset("mnist", str(tmp_path), split=split)
        assert torch.equal(data.values, torch.tensor(files.images(20, 28, 28, seed=seed))[:, None])
        assert data.labels.tolist() == files.labels(20).tolist()
        assert data.note == "not the published files: their checksums differ"
        assert (data.name, data.split, data.scale) == ("mnist", split, 255.0)


def test_the_named_folder_wins_over_the_folder_itself(tmp_path: Path) -> None:
    files.write_mnist(tmp_path, seed=5)
    files.write_mnist(tmp_path / "fashion-mnist", seed=7)
    assert (
        load_dataset("mnist", tmp_path).values[0, 0].tolist() == files.images(20, 28, 28, seed=5)[0].tolist()
    )
    fashion = load_dataset("fashion-mnist", tmp_path)
    assert fashion.values[0, 0].tolist() == files.images(20, 28, 28, seed=7)[0].tolist()
    assert fashion.classes[9] == "Ankle boot"
    assert fashion.note == ""


def test_the_published_mnist_is_known_and_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write_mnist(tmp_path, zipped=False)
    md5 = {p.name.removesuffix("-ubyte"): hashlib.md5(p.read_bytes()).hexdigest() for p in tmp_path.iterdir()}
    monkeypatch.setitem(SOURCES, "mnist", replace(SOURCES["mnist"], plain_md5=md5))
    assert load_dataset("mnist", tmp_path).note == ""
    with pytest.raises(DataError, match="these are the files of mnist, not of fashion-mnist"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize("inside", ["cifar10", "cifar-10-batches-bin", "cifar10/cifar-10-batches-bin", ""])
def test_cifar10_in_binary_form(tmp_path: Path, inside: str) -> None:
    files.write_members(tmp_path / inside, files.cifar10_members())
    train, test = (load_dataset("cifar10", tmp_path, split=s) for s in ("train", "test"))
    expected = np.concatenate([files.images(4, 3, 32, 32, seed=i) for i in range(1, 6)])
    assert torch.equal(train.values, torch.tensor(expected))
    assert torch.equal(test.values, torch.tensor(files.images(4, 3, 32, 32, seed=6)))
    assert train.classes[test.labels[3]] == "cat"


@pytest.mark.parametrize("inside", ["CIFAR10/cifar-10-batches-py", "cifar-10-batches-py"])
def test_cifar10_in_python_form_is_the_same(tmp_path: Path, inside: str) -> None:
    files.write_members(tmp_path / "a" / inside, files.cifar10_members(python=True))
    files.write_members(tmp_path / "b" / "cifar10", files.cifar10_members())
    digests = {load_dataset("cifar10", tmp_path / folder).digest for folder in "ab"}
    assert len(digests) == 1


@pytest.mark.parametrize("python", [False, True])
def test_cifar10_straight_from_the_archive(tmp_path: Path, python: bool) -> None:
    name = f"cifar-10-{'python' if python else 'binary'}.tar.gz"
    members = files.cifar10_members(python=python)
    (tmp_path / name).write_bytes(files.archive({"batches.meta.txt": b"airplane\n", **members}))
    files.write_members(tmp_path / "b" / "cifar10", files.cifar10_members())
    for split in ("train", "test"):
        found = load_dataset("cifar10", tmp_path, split=split)
        assert found.digest == load_dataset("cifar10", tmp_path / "b", split=split).digest
    assert not list(tmp_path.glob("cifar-10-batches*"))


def test_cifar100_uses_the_fine_labels(tmp_path: Path) -> None:
    pixels = files.images(6, 3, 32, 32)
    coarse, fine = files.labels(6, 3), np.array([99, 0, 1, 50, 98, 2])
    batch = files.cifar_binary(pixels, coarse, fine)
    files.write_members(tmp_path / "cifar-100-binary", {"train.bin": batch, "test.bin": batch})
    python = files.cifar_python(pixels, fine.tolist(), b"fine_labels")
    files.write_members(tmp_path / "py" / "cifar-100-python", {"train": python, "test": python})
    for folder in (tmp_path, tmp_path / "py"):
        data = load_dataset("cifar100", folder)
        assert data.labels.tolist() == fine.tolist()
        assert [data.classes[i] for i in (0, 50, 99)] == ["apple", "mouse", "worm"]
    assert len(set(SOURCES["cifar100"].classes)) == 100
    assert list(SOURCES["cifar100"].classes) == sorted(SOURCES["cifar100"].classes)


@pytest.mark.parametrize(
    "name",
    ["cifar10/train.parquet", "train-00000-of-00001.parquet", "cifar10/plain_text/train-0-of-1.parquet"],
)
def test_parquet_layouts(tmp_path: Path, name: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    pixels, cells = files.images(3, 32, 32, 3), []
    for i, array in enumerate(pixels):
        image.fromarray(array).save(tmp_path / f"{i}.png")
        cells.append({"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None})
    parquet.write_table(pyarrow.table({"img": cells, "label": [0, 9, 4]}), tmp_path / name)
    data = load_dataset("cifar10", tmp_path)
    assert torch.equal(data.values, torch.tensor(pixels.transpose(0, 3, 1, 2)))
    assert data.labels.tolist() == [0, 9, 4]
    assert data.note == ""
    with pytest.raises(DataError, match=r"expected images of \(1, 28, 28\).*found \(1, 32, 32\)"):
        load_dataset("mnist", tmp_path / Path(name).parent)


def test_lossy_images_are_noted(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    image.fromarray(files.images(32, 32, 3)).save(tmp_path / "a.jpg")
    table = pyarrow.table({"img": [(tmp_path / "a.jpg").read_bytes()], "label": [1]})
    parquet.write_table(table, tmp_path / "train.parquet")
    assert load_dataset("cifar10", tmp_path).note == "images from JPEG copies: slightly lossy"


# --- Bad folders -------------------------------------------------------------------------------------------


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Unknown data set 'imagenet'. Choose one of digits, mnist"):
        load_dataset("imagenet")
    with pytest.raises(DataError, match="Unknown split 'valid'"):
        load_dataset("digits", split="valid")
    with pytest.raises(DataError, match=r"no such folder. Give the folder that holds the files of mnist"):
        load_dataset("mnist", tmp_path / "nowhere")


@pytest.mark.parametrize("name", [n for n in DATASETS if n != "digits"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_empty_folders_say_what_to_put_there(tmp_path: Path, name: str, split: str) -> None:
    with pytest.raises(DataError, match=rf"No files of {name} \({split}\) in .*Put there .*\.gz"):
        load_dataset(name, tmp_path, split=split)


def test_incomplete_folders(tmp_path: Path) -> None:
    files.write_mnist(tmp_path / "mnist")
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"has train-images-idx3-ubyte.gz but not its labels"):
        load_dataset("mnist", tmp_path)
    members = files.cifar10_members()
    del members["data_batch_3.bin"], members["data_batch_5.bin"]
    files.write_members(tmp_path / "cifar10", members)
    with pytest.raises(DataError, match=r"has data_batch_1.bin but not data_batch_3.bin, data_batch_5.bin"):
        load_dataset("cifar10", tmp_path)


def test_unequal_numbers_and_labels_out_of_range(tmp_path: Path) -> None:
    files.write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(files.idx(files.labels(19).astype(np.uint8)))
    with pytest.raises(DataError, match="20 images but 19 labels"):
        load_dataset("mnist", tmp_path)
    wrong = np.array([0, 9, 10, 3] * 5, np.uint8)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(files.idx(wrong))
    with pytest.raises(DataError, match=r"labels must lie in 0..9; example 2 has label 10, and 5 in all"):
        load_dataset("mnist", tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(files.idx(files.images(0, 28, 28)))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(files.idx(files.images(0)))
    with pytest.raises(DataError, match="mnist test: holds no examples"):
        load_dataset("mnist", tmp_path, split="test")


def test_damaged_archives(tmp_path: Path) -> None:
    content = files.archive(files.cifar10_members())
    for length in (1, 300, len(content) // 2):
        (tmp_path / "cifar-10-binary.tar.gz").write_bytes(content[:length])
        with pytest.raises(DataError, match="truncated or damaged archive"):
            load_dataset("cifar10", tmp_path)
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(files.archive({"readme.html": b"x"}))
    with pytest.raises(DataError, match=r"does not hold the batches of cifar10 \(train\)"):
        load_dataset("cifar10", tmp_path)


# --- Downloads ---------------------------------------------------------------------------------------------


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serve the folder ``served``, keep the cache inside ``tmp_path`` and forget the real mirrors."""
    pytest.importorskip("pooch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("isthmus.training._fetch.time.sleep", lambda _: None)
    monkeypatch.setattr("isthmus.training._datasets._cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "served").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path / "served")))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()
    thread.join()


def serve(monkeypatch: pytest.MonkeyPatch, name: str, served: Path) -> None:
    """Make the checksums of a source those of the files served, and its mirrors none."""
    source = SOURCES[name]
    remote = {
        split: tuple(
            tuple(
                replace(
                    file,
                    mirrors=("http://127.0.0.1:1/",),
                    md5=hashlib.md5((served / file.name).read_bytes()).hexdigest()
                    if (served / file.name).exists()
                    else file.md5,
                )
                for file in alternative
            )
            for alternative in alternatives
        )
        for split, alternatives in source.remote.items()
    }
    monkeypatch.setitem(SOURCES, name, replace(source, remote=remote))


def test_mnist_is_downloaded_once(tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write_mnist(tmp_path / "served")
    serve(monkeypatch, "mnist", tmp_path / "served")
    seen: list[str] = []
    data = load_dataset("mnist", mirrors=[mirror], on_progress=lambda name, *_: seen.append(name))
    assert data.digest == load_dataset("mnist", tmp_path / "served").digest
    assert set(seen) == {"train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"}
    # Now without any mirror: only the cache can answer.
    assert load_dataset("mnist").digest == data.digest
    assert not (tmp_path / "cache" / "mnist" / "t10k-images-idx3-ubyte.gz").exists()


def test_cifar_falls_back_on_the_other_archive(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = files.cifar10_members(python=True)
    (tmp_path / "served" / "cifar-10-python.tar.gz").write_bytes(files.archive(members))
    serve(monkeypatch, "cifar10", tmp_path / "served")
    data = load_dataset("cifar10", mirrors=[mirror], split="test")
    assert torch.equal(data.values, torch.tensor(files.images(4, 3, 32, 32, seed=6)))


def test_when_nothing_can_be_had_every_way_is_explained(
    tmp_path: Path, mirror: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, "cifar100", tmp_path / "served")
    with pytest.raises(DataError, match="404") as raised:
        load_dataset("cifar100", mirrors=[mirror])
    for part in ("cifar-100-binary.tar.gz", "cifar-100-python.tar.gz", str(tmp_path / "cache" / "cifar100")):
        assert part in str(raised.value)


def test_downloads_go_to_the_cache_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pooch")
    from isthmus.training._datasets import _cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if sys.platform == "linux":
        assert _cache_folder() == tmp_path / "isthmus"
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(MissingExtraError, match=r"pooch: pip install"):
        _cache_folder()
    with pytest.raises(MissingExtraError, match=r"or give a data folder"):
        load_dataset("mnist")


def test_the_published_checksums_are_well_formed_and_complete() -> None:
    for source in SOURCES.values():
        for split in ("train", "test"):
            for alternative in source.remote[split]:
                for file in alternative:
                    assert len(bytes.fromhex(file.md5)) == 16
                    assert file.mirrors
                    assert all(m.startswith("http") and m.endswith("/") for m in file.mirrors)


@pytest.mark.network
@pytest.mark.parametrize("name", [n for n in DATASETS if n != "digits"])
def test_the_real_mirrors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("isthmus.training._datasets._cache_folder", lambda: tmp_path)
    assert len(load_dataset(name, split="test")) == 10_000
