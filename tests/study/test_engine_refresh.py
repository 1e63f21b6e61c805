"""Lines as they are and with BatchNorm statistics recomputed, from the studies' YAML to the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dataset_files import cifar10_members, write_members
from engine_studies import TINY, tiny

from isthmus.study import InProcess, StudyConfig, read_rows, read_study, run_study
from isthmus.study import _measure as measure_module


def split_by_refresh(study: StudyConfig, folder: Path, data_dir: Path | None = None) -> list[dict[Any, Any]]:
    """Run a study; return its rows by method and split, as they are and with statistics recomputed."""
    with InProcess(1) as executor:
        status = run_study(study, folder, data_dir=data_dir, executor=executor)
    assert status.finished, status.failed
    rows = read_rows(folder)
    keys = ("unit", "method", "split")
    return [
        {tuple(r[k] for k in keys): r for r in rows if r["refresh"] == how} for how in ("none", "batchnorm")
    ]


def test_the_cifar_preset_recomputes_the_statistics_inside_the_line(tmp_path: Path) -> None:
    write_members(tmp_path / "data", cifar10_members(8))
    preset = read_study("cifar10-resnet-cpu")
    variant = preset.variants[0]
    small = variant.model_copy(
        update={
            "network": variant.network.model_copy(update={"width": 0.25}),
            "training": variant.training.model_copy(update={"epochs": 1, "batch_size": 10}),
        }
    )
    # Two of the preset's methods: the others differ before the line, not on it.
    measure = preset.measure.model_copy(update={"methods": ("none", "correlation")})
    study = preset.model_copy(update={"variants": (small,), "measure": measure})
    plain, recomputed = split_by_refresh(study, tmp_path / "run", tmp_path / "data")
    assert plain.keys() == recomputed.keys()
    assert {method for _, method, _ in plain} == {"none", "correlation"} < set(preset.measure.methods)
    for key, row in plain.items():
        other = recomputed[key]
        assert [other["loss_at"][k] for k in (0, -1)] == [row["loss_at"][k] for k in (0, -1)]
        assert other["loss_at"][1:-1] != row["loss_at"][1:-1]


def test_without_batchnorm_a_line_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs["refresh"])
        return measured(*args, **kwargs)

    measured = measure_module.line
    monkeypatch.setattr(measure_module, "line", counted)
    study = tiny(
        TINY.replace("points: 3", "points: 3, refresh: [none, batchnorm]").replace("[0.01, 0.1]", "0.1")
    )
    plain, recomputed = split_by_refresh(study, tmp_path / "run")
    assert calls == [None] * 4
    assert {k: {**r, "refresh": ""} for k, r in plain.items()} == {
        k: {**r, "refresh": ""} for k, r in recomputed.items()
    }
