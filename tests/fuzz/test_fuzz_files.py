"""Checkpoints, indexes and configurations with random damage: one clear error or the right values, at once.

What is right: the values that were saved, where the format keeps sums (files of torch); else what the bytes say, read
by a reader of a few lines that shares nothing with ours.
"""

from __future__ import annotations

import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from isthmus.checkpoints import load_metadata, load_state, read_checkpoint, save_state
from isthmus.errors import IsthmusError
from isthmus.pretrained import LazyState, check_inputs, open_model

SECONDS = 5.0
"""Processor time that one damaged file may take."""
MEBIBYTES = 600
"""Memory that all of them together may add."""
PLAIN = {
    "F32": np.float32,
    "F64": np.float64,
    "F16": np.float16,
    "I64": np.int64,
    "I32": np.int32,
    "U8": np.uint8,
    "I8": np.int8,
    "I16": np.int16,
    "BOOL": np.bool_,
}


def state() -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(0)
    return {
        "layer.weight": torch.randn(7, 5, generator=drawn),
        "layer.bias": torch.randn(7, generator=drawn),
        "module.half": torch.randn(3, 2, generator=drawn).half(),
        "steps": torch.tensor(7),
        "double": torch.randn(2, 3, generator=drawn, dtype=torch.float64),
    }


# --- Damage ------------------------------------------------------------------------------------------------


def flip(data: bytearray, draw: random.Random) -> None:
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def overwrite(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    value = draw.choice((b"\0", b"\xff", b"[", b'"', b"{", bytes([draw.randrange(256)])))
    length = draw.choice((1, 4, 8, 64))
    data[start : start + length] = (value * length)[: len(data) - start]


def cut(data: bytearray, draw: random.Random) -> None:
    del data[draw.randrange(1, len(data)) :]


def remove(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    del data[start : start + draw.choice((1, 2, 8, 100))]


def insert(data: bytearray, draw: random.Random) -> None:
    start = draw.randrange(len(data))
    more = draw.choice((b"\0" * 9, b"[" * 500, b'{"a":' * 200, b"9" * 50, b"e999", draw.randbytes(16)))
    data[start:start] = more


def repeat(data: bytearray, draw: random.Random) -> None:
    start, stop = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    data[stop:stop] = data[start:stop]


def exchange(data: bytearray, draw: random.Random) -> None:
    a, b, length = draw.randrange(len(data)), draw.randrange(len(data)), draw.choice((1, 8, 40))
    data[a : a + length], data[b : b + length] = data[b : b + length], data[a : a + length]


def number(data: bytearray, draw: random.Random) -> None:
    """Put another number where there is one, as text."""
    digits = [k for k, c in enumerate(data) if 48 <= c <= 57]
    if digits:
        start = draw.choice(digits)
        data[start : start + 1] = str(draw.choice((-1, 0, 1, 10**9, 10**18, 2**63, 10**30))).encode()


DAMAGE = (flip, flip, overwrite, cut, remove, insert, repeat, exchange, number)


def damaged(content: bytes, seed: int) -> bytes:
    draw = random.Random(seed)
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 3))):
        if len(data) > 1:
            draw.choice(DAMAGE)(data, draw)
    return bytes(data)


# --- What is right -----------------------------------------------------------------------------------------


def as_saved(found: Any, content: bytes) -> None:
    expected = state()
    assert list(found) == list(expected)
    assert all(torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in expected)


def as_the_bytes_say(found: Any, content: bytes) -> None:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    assert set(found) == set(header)
    for name, entry in header.items():
        if entry["dtype"] in PLAIN:
            start, stop = (8 + length + x for x in entry["data_offsets"])
            expected = np.frombuffer(content[start:stop], PLAIN[entry["dtype"]]).reshape(entry["shape"])
            assert found[name].numpy().tobytes() == expected.tobytes()
            assert tuple(found[name].shape) == expected.shape


def of_any_values(found: Any, content: bytes) -> None:
    """The old format of torch keeps no sums, so a changed number is a number."""
    assert found
    assert all(isinstance(v, Tensor) and v.layout is torch.strided for v in found.values())
    assert sum(v.nbytes for v in found.values()) < 2**27


Read = Callable[[Path], Any]
Right = Callable[[Any, bytes], None]


def tried(path: Path, count: int, first: int, read: Read, right: Right) -> Counter[str]:
    """Damage a file ``count`` times, read it, and count what came out."""
    content = path.read_bytes()
    outcomes: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(first, first + count):
        harmed = damaged(content, seed)
        path.write_bytes(harmed)
        started = time.process_time()
        try:
            found = read(path)
        except IsthmusError as error:
            text = str(error)
            assert text.replace("\n", "").isprintable(), seed
            assert "Traceback" not in text, seed
            assert len(text) < 3000, seed
            outcomes["refused"] += 1
        else:
            right(found, harmed)
            outcomes["read"] += 1
        assert time.process_time() - started < SECONDS, seed
    path.write_bytes(content)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEBIBYTES, grown
    assert outcomes["refused"] > count / 10
    print(f"{path.name}: {dict(outcomes)}")  # noqa: T201 (shown with -s: the counts in the documentation)
    return outcomes


def saved(folder: Path, kind: str) -> Path:
    if kind == "safetensors":
        save_state(folder / "x.safetensors", state(), {"seed": "3"})
        return folder / "x.safetensors"
    path = folder / "x.pt"
    if kind == "wrapped":
        torch.save({"epoch": 3, "net": state(), "lr": np.float64(0.1)}, path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=kind == "zip")
    return path


KINDS: dict[str, tuple[Read, Right]] = {
    "safetensors": (load_state, as_the_bytes_say),
    "zip": (load_state, as_saved),
    "wrapped": (lambda path: read_checkpoint(path, key="net").state, as_saved),
    "old": (load_state, of_any_values),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_checkpoints(tmp_path: Path, kind: str) -> None:
    assert tried(saved(tmp_path, kind), 250, 0, *KINDS[kind])["read"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_checkpoints(tmp_path: Path, kind: str) -> None:
    tried(saved(tmp_path, kind), 10_000, 1_000, *KINDS[kind])


def whole(path: Path) -> Any:
    lazy = LazyState.open(path)
    assert load_metadata(path) == lazy.metadata
    return {name: lazy[name] for name in lazy}


@pytest.mark.parametrize(("count", "first"), [(250, 0), pytest.param(10_000, 1_000, marks=pytest.mark.slow)])
def test_damaged_files_read_tensor_by_tensor(tmp_path: Path, count: int, first: int) -> None:
    tried(saved(tmp_path, "safetensors"), count, first, whole, as_the_bytes_say)


@pytest.mark.parametrize(("count", "first"), [(300, 0), pytest.param(5_000, 1_000, marks=pytest.mark.slow)])
def test_damaged_indexes(tmp_path: Path, count: int, first: int) -> None:
    parts = [dict(list(state().items())[:2]), dict(list(state().items())[2:])]
    for k, part in enumerate(parts):
        save_state(tmp_path / f"model-{k}.safetensors", part)
    index = tmp_path / "model.safetensors.index.json"
    places = {name: f"model-{k}.safetensors" for k, part in enumerate(parts) for name in part}
    index.write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": places}, indent=1))

    def right(found: Any, content: bytes) -> None:
        assert set(found) <= set(state())
        assert all(torch.equal(v, state()[k]) for k, v in found.items())
        assert set(json.loads(content)["weight_map"]) <= set(found)

    def read(path: Path) -> Any:
        lazy = LazyState.open(path.parent)
        return {name: lazy[name] for name in lazy}

    assert tried(index, count, first, read, right)["read"]


@pytest.mark.parametrize(("count", "first"), [(40, 0), pytest.param(300, 1_000, marks=pytest.mark.slow)])
def test_damaged_configurations(tmp_path: Path, count: int, first: int) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    small = {"hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.BertConfig(vocab_size=23, max_position_embeddings=16, num_labels=3, **small)
    model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(tmp_path)
    expected = model.state_dict()

    def right(found: Any, content: bytes) -> None:
        assert all(torch.equal(found.state[name], expected[name]) for name in found.state)

    assert tried(tmp_path / "config.json", count, first, lambda path: open_model(path.parent), right)["read"]


@pytest.mark.parametrize(("count", "first"), [(150, 0), pytest.param(2_000, 1_000, marks=pytest.mark.slow)])
def test_what_damaged_inputs_are_said_to_be(tmp_path: Path, count: int, first: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/name"}))

    def read(path: Path) -> Any:
        return check_inputs([path.parent], network=True)

    tried(tmp_path / "adapter_config.json", count, first, read, lambda found, content: None)
