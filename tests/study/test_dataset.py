"""Data sets as values, and the batches cut from them."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from isthmus.batches import iterate
from isthmus.errors import DataError
from isthmus.study import Dataset, to_batches


def example(count: int = 10, **changes: Any) -> Dataset:
    settings: dict[str, Any] = {
        "name": "toy",
        "split": "train",
        "values": torch.arange(count * 4, dtype=torch.uint8).reshape(count, 1, 2, 2),
        "labels": torch.arange(count) % 3,
        "classes": ("a", "b", "c"),
        "scale": 255.0,
    }
    return Dataset(**{**settings, **changes})


@pytest.mark.parametrize("count", [1, 2, 10])
def test_inputs_are_scaled_on_use(count: int) -> None:
    data = example(count)
    assert len(data) == count
    assert data.input_shape == (1, 2, 2)
    assert data.inputs.dtype == torch.float32
    assert torch.equal(data.inputs, data.values.double().div(255).float())
    inputs, labels = data.batch(torch.tensor([count - 1, 0]))
    assert torch.equal(inputs, data.inputs[[count - 1, 0]])
    assert labels.tolist() == [(count - 1) % 3, 0]
    assert data.examples.tolist() == list(range(count))


def test_features_that_are_already_in_range_are_used_as_they_are() -> None:
    values = torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    data = example(5, values=values, scale=1.0)
    assert torch.equal(data.inputs, values)
    assert torch.equal(data.batch(torch.tensor([3]))[0], values[3:4])


def test_data_sets_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        example().name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"values": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
            "toy train: holds no examples",
        ),
        ({"values": torch.tensor(1.0)}, "holds no examples"),
        ({"labels": torch.arange(9) % 3}, r"expected 10 int64 labels, .*found torch.int64 of shape \(9,\)"),
        ({"labels": (torch.arange(10) % 3).int()}, "found torch.int32"),
        ({"labels": torch.arange(10)}, r"must lie in 0..2; example 3 has label 3, and 7 in all"),
        ({"labels": torch.arange(10) % 3 - 1}, "example 0 has label -1, and 4 in all"),
        ({"scale": 16.0}, r"expected inputs in \[0, 1\] after scaling, found 0 to 2.4375"),
        ({"values": torch.full((10, 2), -0.5), "scale": 1.0}, "found -0.5 to -0.5"),
        ({"values": torch.full((10, 2), float("nan")), "scale": 1.0}, "found nan to nan"),
        ({"values": torch.full((10, 2), float("inf")), "scale": 1.0}, "found inf to inf"),
    ],
)
def test_bad_data_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        example(**changes)


def test_the_digest_tells_data_apart() -> None:
    data = example()
    assert data.digest == example().digest
    assert len(data.digest) == 64
    values = data.values.clone()
    values[9, 0, 1, 1] += 1
    others = [
        example(values=values),
        example(labels=data.labels.flip(0)),
        example(values=data.values.reshape(10, 4)),
        example(scale=200.0),
        example(classes=("a", "b", "c", "d")),
        data.subset(torch.arange(9)),
    ]
    assert len({data.digest, *(o.digest for o in others)}) == 7
    assert example(values=data.values.flip(0).flip(0)).digest == data.digest


def test_subsets_know_which_examples_they_hold() -> None:
    data = example(10)
    some = data.subset(torch.tensor([7, 2, 2]))
    assert some.labels.tolist() == [1, 2, 2]
    assert some.examples.tolist() == [7, 2, 2]
    again = some.subset(torch.tensor([0]))
    assert again.examples.tolist() == [7]
    assert torch.equal(again.values, data.values[7:8])


def test_shuffling_and_taking() -> None:
    data = example(50)
    shuffled = data.shuffled(3)
    assert shuffled.examples.sort().values.tolist() == list(range(50))
    assert shuffled.examples.tolist() != list(range(50))
    assert torch.equal(shuffled.values, data.values[shuffled.examples])
    assert torch.equal(shuffled.examples, data.shuffled(3).examples)
    assert not torch.equal(shuffled.examples, data.shuffled(4).examples)
    assert torch.equal(data.take(20, 3).examples, shuffled.examples[:20])
    assert len(data.take(50)) == 50
    for count in (0, 51, -1):
        with pytest.raises(DataError, match=f"toy train: cannot take {count} of 50 examples"):
            data.take(count)


@pytest.mark.gpu
def test_moving_to_a_device() -> None:
    moved = example().to("cuda")
    assert moved.values.device.type == moved.labels.device.type == "cuda"
    assert moved.digest == example().digest


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_batches_cover_every_example_once(count: int, batch_size: int) -> None:
    data = example(count)
    batches = to_batches(data, batch_size)
    assert len(batches) == -(-count // batch_size)
    for _ in range(2):
        seen = list(batches)
        assert len(seen) == len(batches)
        assert all(len(x) == len(y) for x, y in seen)
        assert [len(x) for x, _ in seen[:-1]] == [batch_size] * (len(batches) - 1)
        assert torch.equal(torch.cat([x for x, _ in seen]), data.inputs[batches.examples])
        assert torch.equal(torch.cat([y for _, y in seen]), data.labels[batches.examples])
    assert batches.examples.sort().values.tolist() == list(range(count))
    assert torch.equal(batches[-1][0], seen[-1][0])
    assert [b.size for b in iterate(batches)] == [len(x) for x, _ in seen]


def test_batches_are_shuffled_once_so_that_slices_are_fair() -> None:
    labels = torch.arange(3).repeat_interleave(100)
    data = example(300, labels=labels, values=torch.zeros(300, 2), scale=1.0)
    first = to_batches(data, 60)[0][1].bincount(minlength=3)
    assert min(first.tolist()) >= 10
    in_order = to_batches(data, 60, seed=None)[0][1]
    assert in_order.tolist() == [0] * 60
    assert torch.equal(to_batches(data, 60, seed=1).examples, to_batches(data, 7, seed=1).examples)
    assert not torch.equal(to_batches(data, seed=1).examples, to_batches(data, seed=2).examples)


def test_limits_slices_and_devices() -> None:
    data = example(20).subset(torch.arange(10, 20))
    batches = to_batches(data, 4, limit=6, device="meta")
    assert len(batches) == 2
    assert batches[0][0].device.type == batches[0][1].device.type == "meta"
    assert torch.equal(batches.examples, to_batches(data, 3).examples[:6])
    assert int(batches.examples.min()) >= 10
    rest = to_batches(data, 3)[1:3]
    assert [x.tolist() for _, x in rest] == [x.tolist() for _, x in list(to_batches(data, 3))[1:3]]
    assert len(to_batches(data, 3)[2:]) == 2
    assert len(to_batches(data, 4, limit=1000)) == 3
    with pytest.raises(IndexError):
        batches[2]
    with pytest.raises(DataError, match="without a step"):
        batches[::2]


@pytest.mark.parametrize(("batch_size", "limit"), [(0, None), (-1, None), (1, 0)])
def test_bad_batch_sizes(batch_size: int, limit: int | None) -> None:
    with pytest.raises(DataError, match=f"batch size {batch_size} and limit {limit} must be at least 1"):
        to_batches(example(), batch_size, limit=limit)
