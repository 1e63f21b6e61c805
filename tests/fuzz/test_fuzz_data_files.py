"""Damaged files of every kind that studies read: right values or one error of ours, soon and in little memory.

Damage is bits flipped, bytes cut off, put in, left out or copied elsewhere, and heads of one format on another.
Tried so far: see ``docs/studies.md``.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.errors import CheckpointError, DataError, IsthmusError
from isthmus.study import InProcess, StudyError, load_dataset, read_rows, run_study, study_status
from isthmus.study._config import parse_study
from isthmus.study._plan import address_of

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))
import dataset_files as files

STUDY = """\
name: fuzzed
data: {name: digits, statistics: 100, train: 100, test: 100}
network: {family: mlp, width: 6, depth: 1, settings: {bias: true}}
training: &t {learning_rate: [0.05, 1.0e-1], epochs: 1, batch_size: 200}
seeds: [0, 1]
stack: 1
measure: {methods: [none], points: 2, dimension: false}
"""


def damaged(content: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """Return the content after one to three kinds of damage."""
    result = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        where = draw.randrange(len(result) + 1)
        length = draw.choice((1, 1, 2, 4, 8, 64, 1000))
        kind = draw.randrange(7)
        if kind == 0 and result:
            result[where % len(result)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del result[where:]
        elif kind == 2:
            result[where:where] = draw.randbytes(length)
        elif kind == 3:
            del result[where : where + length]
        elif kind == 4:
            result[where : where + length] = draw.choice((b"\x00", b"\xff", b"9", b"[")) * length
        elif kind == 5:
            result[where:where] = result[draw.randrange(len(result) + 1) :][:length]
        else:
            head = draw.choice(others)[: draw.choice((2, 4, 8, 16, 100))]
            result[: len(head)] = head
    return bytes(result)


class Bounds:
    """Says whether each of many readings took seconds at most, and all of them little memory."""

    def __init__(self) -> None:
        self.before, self.read, self.refused = self.most(), 0, 0

    @staticmethod
    def most() -> int:
        """Return the most memory this process has held, kB on Linux."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(
        self, read: Callable[[], Any], errors: type[IsthmusError] | tuple[type[IsthmusError], ...]
    ) -> Any:
        start = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                value = read()
            self.read += 1
        except errors:
            value = None
            self.refused += 1
        assert time.process_time() - start < 20
        return value

    def check(self, count: int) -> None:
        assert self.read + self.refused == count
        assert self.refused > 0
        if sys.platform.startswith("linux"):
            assert self.most() - self.before < 1.5 * 2**20


def samples() -> dict[str, dict[str, bytes]]:
    """Return small data sets in every form: name of the form, then files."""
    mnist = {
        "train-images-idx3-ubyte": files.idx(files.images(6, 28, 28)),
        "train-labels-idx1-ubyte": files.idx(files.labels(6).astype(np.uint8)),
    }
    pixels = files.images(2, 3, 32, 32)
    cifar = files.cifar_python(pixels, [3, 8], b"fine_labels")
    binary = files.cifar_binary(pixels, np.array([1, 2]), np.array([3, 8]))
    return {
        "mnist": mnist,
        "mnist zipped": {f"{name}.gz": gzip.compress(c, mtime=0) for name, c in mnist.items()},
        "cifar100 python": {"train": cifar},
        "cifar100 binary": {"train.bin": binary},
        "cifar100 archive": {
            "cifar-100-binary.tar.gz": files.archive({"train.bin": binary}, "cifar-100-binary")
        },
        "cifar10 parquet": {"train.parquet": parquet(pixels)},
    }


def parquet(pixels: np.ndarray) -> bytes:
    pyarrow, table = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image, buffer = pytest.importorskip("PIL.Image"), io.BytesIO()
    cells = []
    for one in pixels.transpose(0, 2, 3, 1):
        encoded = io.BytesIO()
        image.fromarray(one).save(encoded, "PNG")
        cells.append({"bytes": encoded.getvalue(), "path": None})
    table.write_table(pyarrow.table({"img": cells, "label": [3, 8]}), buffer)
    return buffer.getvalue()


def fuzz_data(tmp_path: Path, seed: int, count: int) -> None:
    draw, found, bounds = random.Random(seed), samples(), Bounds()
    heads = [content for parts in found.values() for content in parts.values()]
    for turn in range(count):
        form = draw.choice(list(found))
        folder = tmp_path / str(turn)
        folder.mkdir()
        for name, content in found[form].items():
            hit = len(found[form]) == 1 or draw.random() < 0.6
            (folder / name).write_bytes(damaged(content, draw, heads) if hit else content)
        data = bounds.run(lambda folder=folder, form=form: load_dataset(form.split()[0], folder), DataError)
        if data is not None:
            assert len(data.values) == len(data.labels) > 0
            assert data.values.shape[1:] in ((1, 28, 28), (3, 32, 32))
            assert 0 <= int(data.labels.min()) <= int(data.labels.max()) < len(data.classes)
        shutil.rmtree(folder)
    bounds.check(count)


def fuzz_yaml(seed: int, count: int) -> None:
    draw, bounds = random.Random(seed), Bounds()
    parts = [
        "*t",
        "&t ",
        "[",
        "{",
        "]",
        "}",
        ": ",
        "- ",
        "!!int ",
        "!!python/none",
        "2024-01-01",
        ".nan",
        "<<: *t",
        "\t",
    ]
    parts += [
        "9" * 25,
        "1e400",
        "yes",
        "~",
        "|\n",
        "? ",
        "%YAML 1.2\n",
        "---\n",
        "...\n",
        "'",
        '"',
        "#",
        "[1, 2, 3]",
        "\x85",
    ]
    for _ in range(count):
        text = STUDY
        for _ in range(draw.randint(1, 3)):
            if draw.random() < 0.5:
                where = draw.randrange(len(text) + 1)
                text = text[:where] + draw.choice(parts) * draw.choice((1, 1, 1, 40)) + text[where:]
            else:
                text = damaged(text.encode(), draw, [b"\xef\xbb\xbf", b"PK"]).decode("utf-8", "replace")
        study = bounds.run(lambda text=text: parse_study(text, "fuzzed.yaml"), StudyError)
        if study is not None:
            assert study.variants
            assert len(study.all_pairs) >= 1
    bounds.check(count)


def fuzz_records(tmp_path: Path, seed: int, count: int) -> None:
    """Damage a file of a finished study; reading names it or gives the same rows."""
    whole, draw, bounds = tmp_path / "whole", random.Random(seed), Bounds()
    study = parse_study(STUDY)
    with InProcess(1) as executor:
        assert run_study(study, whole, executor=executor).finished
    rows = read_rows(whole)
    places = [
        *sorted((whole / "units").iterdir()),
        *sorted((whole / "timings").iterdir()),
        whole / "plan.json",
    ]
    others = [p.read_bytes() for p in places]
    for _ in range(count):
        path = draw.choice(places)
        content = path.read_bytes()
        path.write_bytes(damaged(content, draw, others) if draw.random() < 0.8 else draw.choice(others))
        found = bounds.run(lambda: read_rows(whole), (CheckpointError, StudyError))
        bounds.run(lambda: study_status(whole), (CheckpointError, StudyError))
        if found is not None and not _failed(
            path
        ):  # a failed pair is left out of the rows, and shown as failed
            assert found == rows
        path.write_bytes(content)
    assert read_rows(whole) == rows
    bounds.check(2 * count)


def _failed(path: Path) -> bool:
    """Whether the damage made a record that says it failed."""
    try:
        return json.loads(path.read_bytes()).get("status") == "failed"
    except (ValueError, AttributeError, RecursionError):
        return False


def test_data_files(tmp_path: Path) -> None:
    fuzz_data(tmp_path, 0, 250)


def test_study_files() -> None:
    fuzz_yaml(0, 400)


def test_records(tmp_path: Path) -> None:
    fuzz_records(tmp_path, 0, 120)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_data_files(seed: int, tmp_path: Path) -> None:
    fuzz_data(tmp_path, seed, 2500)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_study_files(seed: int) -> None:
    fuzz_yaml(seed, 5000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_records(seed: int, tmp_path: Path) -> None:
    fuzz_records(tmp_path, seed, 1500)


def test_addresses_are_not_what_they_are_not() -> None:
    """The digest that the checks rest on differs for every change of one character."""
    text = json.dumps({"a": [1, 2.5, None], "b": {"c": "d"}})
    seen = {address_of(json.loads(text))}
    for old, new in (("1", "2"), ("2.5", "2.6"), ("null", "0"), ('"d"', '"e"'), ('"c"', '"C"')):
        seen.add(address_of(json.loads(text.replace(old, new, 1))))
    assert len(seen) == 6
