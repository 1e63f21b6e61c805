"""Inputs shifted and scaled as networks were trained: right numbers, old results untouched, and clear refusals."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import dataset_files as files
import numpy as np
import pytest
import torch
from engine_studies import TINY, tiny

import isthmus
from isthmus.errors import DataError
from isthmus.study import (
    Dataset,
    InProcess,
    Normalisation,
    StudyError,
    TrainSettings,
    load_dataset,
    make_plan,
    network_for,
    read_normalise,
    read_rows,
    resolve_data,
    run_study,
    to_batches,
    train,
    train_stacked,
)
from isthmus.study._plan import address_of

DIGITS = load_dataset("digits")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("none", None),
        ("train", "train"),
        ("symmetric", Normalisation((0.5,), (0.5,))),
        ("imagenet", Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("0.1307/0.3081", Normalisation((0.1307,), (0.3081,))),
        ("0.1,0.2,0.3/1,2,3", Normalisation((0.1, 0.2, 0.3), (1, 2, 3))),
        ((0.5, 0.25), Normalisation((0.5,), (0.25,))),
        (((0.1, 0.2), (0.3, 0.4)), Normalisation((0.1, 0.2), (0.3, 0.4))),
        (Normalisation((0.5,), (0.5,)), Normalisation((0.5,), (0.5,))),
    ],
)
def test_what_can_be_given(given: Any, expected: Any) -> None:
    assert read_normalise(given) == expected
    if isinstance(expected, Normalisation):
        assert read_normalise(str(expected)) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "expected none, train, imagenet, symmetric, or MEAN/STD such as 0.1307/0.3081"),
        ("mnist", "found 'mnist'"),
        ("0.5", "found '0.5'"),
        ("0.5/0.5/0.5", "expected none, train"),
        ("a/b", "expected none, train"),
        (0.5, "found 0.5"),
        ((0.5,), "expected none, train"),
        ("0.5/0", r"expected standard deviations above 0, found \(0.0,\)"),
        ("0.5/-1", "above 0"),
        ("nan/1", "finite"),
        ("0/inf", "finite"),
        ("0.5,0.5/1", "expected as many finite means as standard deviations"),
        (((), ()), "as many finite means"),
    ],
)
def test_what_cannot(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"normalise: .*{message}"):
        load_dataset("digits", normalise=given)


def test_the_training_sets_numbers_are_exact_and_hold_for_both_splits(tmp_path: Path) -> None:
    files.write_members(tmp_path, files.cifar10_members(30))
    plain = load_dataset("cifar10", tmp_path)
    pixels = plain.values.numpy().astype(np.float64) / 255
    for split in ("train", "test"):
        data = load_dataset("cifar10", tmp_path, split=split, normalise="train")
        assert data.normalisation is not None
        np.testing.assert_allclose(data.normalisation.mean, pixels.mean((0, 2, 3)), rtol=1e-14)
        np.testing.assert_allclose(data.normalisation.std, pixels.std((0, 2, 3)), rtol=1e-12)
    inputs = load_dataset("cifar10", tmp_path, normalise="train").inputs
    assert inputs.dtype == torch.float32
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-6)


def test_inputs_by_hand_wherever_they_come_out() -> None:
    data = load_dataset("digits", normalise="0.25/0.5")
    expected = (DIGITS.inputs - 0.25) / 0.5
    torch.testing.assert_close(data.inputs, expected)
    index = torch.tensor([5, 0, 3])
    torch.testing.assert_close(data.batch(index)[0], expected[index])
    torch.testing.assert_close(data.subset(index).inputs, expected[index])
    batches = to_batches(data, 100, seed=None)
    torch.testing.assert_close(batches[1][0], expected[100:200])
    assert torch.equal(data.values, DIGITS.values)
    assert torch.equal(data.labels, DIGITS.labels)
    colours = Dataset("c", "train", torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64), ("a",))
    shifted = colours.normalised("0.1,0.2,0.3/1,2,4").inputs
    torch.testing.assert_close(shifted[:, 2], (colours.values[:, 2] - 0.3) / 4)
    table = Dataset("t", "train", torch.rand(9, 5), torch.zeros(9, dtype=torch.int64), ("a",))
    torch.testing.assert_close(table.normalised("train").inputs.mean(0), torch.zeros(5), rtol=0, atol=1e-6)
    assert torch.equal(table.normalised("symmetric").normalised(None).inputs, table.inputs)


def test_nothing_changes_where_it_is_not_asked_for() -> None:
    assert load_dataset("digits").digest == load_dataset("digits", normalise="none").digest == DIGITS.digest
    assert load_dataset("digits").inputs.max() == 1
    assert (
        len({load_dataset("digits", normalise=n).digest for n in (None, "train", "symmetric", "0.5/0.25")})
        == 4
    )
    plan = make_plan(tiny(), None)
    contents = [u.content["data"] for u in plan.units]
    assert all("normalise" not in c for c in contents)
    # Frozen before the setting was there: the addresses of old records.
    named = {"name": "digits", "train": DIGITS.digest}
    train_unit = next(u for u in plan.units if u.kind == "train")
    assert train_unit.content["data"] == named
    assert train_unit.address == address_of({**train_unit.content, "data": named})


def test_other_channels_and_splits_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"digits train: normalise: expected 1 mean, found 3\. Give as many, or train"
    ):
        load_dataset("digits", normalise="imagenet")
    colours = Dataset("c", "train", torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64), ("a",))
    with pytest.raises(DataError, match="expected 1 mean or 3, one per channel, found 2"):
        colours.normalised("0,0/1,1")
    black = Dataset("b", "train", torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64), ("a",))
    with pytest.raises(
        DataError, match="b train: normalise: channel 0 never varies, so it has no standard deviation"
    ):
        black.normalised("train")
    test = load_dataset("digits", split="test")
    with pytest.raises(
        DataError, match="digits test: normalise 'train' takes mean and deviation of the training set"
    ):
        test.normalised("train")
    assert test.normalised("train", train=DIGITS).normalisation == DIGITS.normalised("train").normalisation


def test_data_by_name_are_normalised_and_functions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = resolve_data("digits", normalise="train", batch_size=2000)
    for split in ("train", "test"):
        ((inputs, _),) = list(found[split])
        assert abs(float(inputs.mean())) < 0.02
        assert float(inputs.min()) < -0.5
    module: Any = types.ModuleType("user_data")
    module.listed = lambda: [(torch.zeros(2, 3), torch.tensor([0, 1]))]
    monkeypatch.setitem(sys.modules, "user_data", module)
    with pytest.raises(DataError, match="user_data:listed: normalise is for data sets by name"):
        resolve_data("user_data:listed", normalise="train")
    assert resolve_data("user_data:listed", normalise="none")


def test_a_network_trained_on_normalised_inputs_is_only_right_on_them() -> None:
    data = load_dataset("digits", normalise="train")
    settings = TrainSettings(learning_rate=0.05, batch_size=64, epochs=6, seed=0)
    model = train(network_for("mlp", data, width=32, depth=1), data, settings).model
    stacked = train_stacked(network_for("mlp", data, width=32, depth=1), data, [settings])[0].model
    accuracies = {}
    for name, normalise in (("right", "train"), ("wrong", None)):
        test = load_dataset("digits", split="test", normalise=normalise)
        for how, network in (("plain", model), ("stacked", stacked)):
            with torch.no_grad():
                hits = network(test.inputs).argmax(1) == test.labels
            accuracies[name, how] = float(hits.float().mean())
    assert min(accuracies["right", how] for how in ("plain", "stacked")) > 0.93
    assert accuracies["right", "plain"] == pytest.approx(accuracies["right", "stacked"], abs=0.01)
    assert accuracies["wrong", "plain"] < accuracies["right", "plain"]
    test = resolve_data("digits", normalise="train")["test"]
    assert isthmus.line(model, stacked, test, points=2).curve.loss[0] < 0.3


def test_a_study_records_how_its_inputs_are_normalised(tmp_path: Path) -> None:
    text = (
        TINY.replace("[0.01, 0.1]", "0.1")
        .replace("seeds: 4", "seeds: 2")
        .replace("[none, weights]", "[none]")
    )
    study = tiny(text.replace("train: 200}", "train: 200, normalise: [none, train]}"))
    with InProcess(1) as executor:
        assert run_study(study, tmp_path / "a", executor=executor).finished
        assert run_study(tiny(text), tmp_path / "b", executor=executor).finished
    rows = read_rows(tmp_path / "a")
    assert {row["normalise"] for row in rows} == {"none", "train"}
    plain = [{k: v for k, v in row.items() if k != "normalise"} for row in rows if row["normalise"] == "none"]
    old = read_rows(tmp_path / "b")
    assert plain == old
    assert "normalise" not in old[0]
    assert len({row["trained_loss_a"] for row in rows}) == 2


def test_a_study_names_a_setting_that_cannot_be_read() -> None:
    for bad in ("mnist", "0.5/0", "1"):
        with pytest.raises(
            StudyError, match=r"line 2: data.normalise: expected none, train|above 0|a valid string"
        ):
            tiny(TINY.replace("train: 200}", f"train: 200, normalise: {bad}}}"))
