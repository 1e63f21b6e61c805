from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

import isthmus
from isthmus.batches import Batch, as_batch, iterate, main_output, reusable
from isthmus.errors import DataError, ModelError

X, Y = torch.arange(8.0).reshape(4, 2), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("kind", [tuple, list])
def test_pairs_as_collators_give_them(kind: type) -> None:
    found = as_batch(kind((X, Y)))
    assert torch.equal(found.args[0], X)
    assert torch.equal(found.targets, Y)
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    assert [b.targets.tolist() for b in iterate(loader)] == [[0, 1], [2, 0]]


def test_several_inputs_come_as_a_list_from_collators() -> None:
    item = default_collate([((x, 2 * x), y) for x, y in zip(X, Y, strict=True)])
    assert isinstance(item[0], list)
    found = as_batch(item)
    assert [torch.equal(a, b) for a, b in zip(found.args, (X, 2 * X), strict=True)] == [True, True]
    assert found.size == 4


@pytest.mark.parametrize(
    "extra", [torch.arange(4), torch.arange(4)[:, None], ["a", "b", "c", "d"], [3, 1, 2, 0], np.arange(4)]
)
def test_an_index_after_the_pair_is_left_out(extra: Any) -> None:
    for item in ((X, Y, extra), [X, Y, extra, extra], (X, X[:, 0], extra)):
        found = as_batch(item)
        assert found.args == (X,)
        assert found.kwargs == {}
        assert found.targets is item[1]


@pytest.mark.parametrize(
    "item",
    [(X, X, Y), (X, Y, X), (X, Y, torch.rand(4)), (X, Y, torch.arange(3)), (X, Y, [1.5] * 4), (X, Y, "abcd")],
)
def test_other_triples_are_refused(item: Any) -> None:
    with pytest.raises(
        DataError, match=r"a batch of 3 entries.*Give several inputs as \(\(x1, x2\), targets\)"
    ):
        as_batch(item)


@pytest.mark.parametrize(
    "targets",
    [{"a": Y, "b": [Y, X]}, (Y, X), [Y, X], [{"boxes": X}] * 4, ["one", "two", "three", "four"], None],
    ids=str,
)
def test_targets_of_any_form_are_kept(targets: Any) -> None:
    found = as_batch((X, targets)).to("cpu")
    assert str(found.targets) == str(targets)
    assert as_batch({"x": X, "labels": targets}).target_key == "labels"


def test_numbers_and_arrays_are_tensors() -> None:
    array = np.arange(8.0).reshape(4, 2)
    array.setflags(write=False)
    found = as_batch((array, np.array([0, 1, 2, 0])))
    assert torch.equal(found.args[0], X.double())
    assert found.targets.tolist() == [0, 1, 2, 0]
    assert as_batch((X, [1, 2, 3, 4])).targets.tolist() == [1, 2, 3, 4]
    assert as_batch({"x": array, "y": [array]}).kwargs["y"][0].dtype == torch.float64
    with pytest.raises(DataError, match="Cannot read an array of object as a tensor"):
        as_batch(np.array([None, "a"], dtype=object))


def test_pictures_and_text_are_named() -> None:
    image = pytest.importorskip("PIL.Image").new("RGB", (2, 2))
    with pytest.raises(DataError, match=r"Cannot read a list of Image, int.*must be tensors first"):
        as_batch([image, 1])
    with pytest.raises(DataError, match="must be tensors first"):
        as_batch(([image, image], Y))
    with pytest.raises(DataError, match=r"Cannot read a tuple of list, Tensor.*Text must be tokens first"):
        as_batch((["some", "words"], Y))
    with pytest.raises(DataError, match="Cannot read a list of nothing"):
        as_batch([])


def test_examples_are_cut_wherever_they_are_listed() -> None:
    batch = Batch((X, {"more": [X]}), {"mask": Y, "flag": torch.tensor(1)}, {"a": Y, "b": (Y, 3)}, "labels")
    head = batch.head(3)
    assert [
        len(v) for v in (head.args[0], head.args[1]["more"][0], head.kwargs["mask"], head.targets["a"])
    ] == [3] * 4
    assert head.targets["b"][1] == 3
    assert head.target_key == "labels"
    assert Batch((X,), {}, [{"boxes": X}] * 4).head(1).targets == [{"boxes": X}]
    assert len(Batch((X,), {}, [Y, Y, Y, Y]).head(1).targets) == 4
    assert [len(v) for v in Batch((X,), {}, [Y, Y]).head(1).targets] == [1, 1]
    assert batch.rows(1, 3).args[0].tolist() == X[1:3].tolist()


def test_targets_move_but_keep_their_type() -> None:
    moved = Batch((X, [X]), {}, {"a": X}).to("cpu", torch.float64)
    assert moved.args[1][0].dtype == torch.float64
    assert moved.targets["a"].dtype == torch.float32


def test_the_number_of_examples_is_that_of_the_text() -> None:
    assert Batch((), {"pixel_values": torch.zeros(7, 3), "input_ids": torch.zeros(2, 5)}).size == 2


def test_a_generator_that_was_read_is_named() -> None:
    generator = ((X, Y) for _ in range(2))
    assert len(list(iterate(generator))) == 2
    with pytest.raises(DataError, match=r"test: .*found none\. This generator can be read once only"):
        list(iterate(generator, "test"))
    with pytest.raises(DataError, match=r"This map can be read once only"):
        list(iterate(map(tuple, [])))
    with pytest.raises(DataError, match=r"found none\. Is the data set empty\?"):
        list(iterate([]))


@dataclass
class Sample:
    loss: Tensor
    sample: Tensor


def test_the_main_output() -> None:
    loss = torch.tensor(0.5)
    assert main_output(X) is X
    assert main_output({"loss": loss, "a": X, "b": Y}) is X
    assert main_output({"loss": loss, "logits": X}) is X
    assert main_output((X, Y)) is X
    assert main_output(({"logits": X}, Y)) is X
    assert main_output(Sample(loss, X)) is X
    assert main_output(type("Output", (), {"logits": X})()) is X
    for nothing in ((), {}, {"loss": loss}, 3, ((),), Sample):
        with pytest.raises(ModelError, match="Expected the model to return a tensor"):
            main_output(nothing)


def test_a_read_up_iterator_is_named_where_data_are_read_more_than_once() -> None:
    given = iter([(X, Y)])
    assert len(list(reusable(given))) == 1
    with pytest.raises(DataError, match=r"batches: .*found none\. This list_iterator can be read once only"):
        reusable(given)
    net = torch.nn.Linear(2, 3)
    for use in (
        lambda: isthmus.align(net, net, batches=given, method="covariance"),
        lambda: isthmus.dimension(net, given),
        lambda: isthmus.merge([net, net], model=torch.nn.BatchNorm1d(2), batches=given),
    ):
        with pytest.raises(DataError, match=r"can be read once only"):
            use()


def test_results_are_one_line_when_shown() -> None:
    batch = as_batch({"x": torch.ones(3, 2), "labels": torch.zeros(3)})
    assert repr(batch) == "Batch(args=(), kwargs={'x': '<3×2>'}, targets=<3>)"
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
    curve = isthmus.line(net, net, [(X, Y)], points=3).curves["data"]
    assert repr(curve) == "Curve(4 examples, 3 points, barrier 0)"
    assert repr(isthmus.dimension(net, args=X)).startswith(
        "DimensionTable(groups=1, methods=['weights-incoming'"
    )
