"""``precision: auto``: what is faster where a study is begun, and the same wherever it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_studies import TINY, tiny

from isthmus.study import StudyError, StudyPlan, make_plan, run_study
from isthmus.training._precision import faster_precision

AUTO = TINY.replace("training: {", "training: {precision: auto, ")


def fake(monkeypatch: pytest.MonkeyPatch, *, amx: bool) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": amx})


def precisions(plan: StudyPlan) -> set[str]:
    return {u.content["training"]["precision"] for u in plan.units}


@pytest.mark.parametrize(("amx", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_matrix_unit_decides(monkeypatch: pytest.MonkeyPatch, amx: bool, expected: Any) -> None:
    fake(monkeypatch, amx=amx)
    assert faster_precision("cpu") == expected
    assert precisions(make_plan(tiny(AUTO), None)) == {expected}


def test_a_machine_that_tells_nothing_gets_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert faster_precision("cpu") == "float32"


@pytest.mark.parametrize("native", [True, False])
def test_on_a_gpu_emulated_bfloat16_does_not_count(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation
    )
    assert faster_precision("cuda") == ("bfloat16" if native else "float32")


def test_units_of_auto_are_those_of_the_value_it_stands_for() -> None:
    given = TINY.replace("training: {", "training: {precision: bfloat16, ")
    auto = make_plan(tiny(AUTO), None, precision="bfloat16")
    assert auto.units == make_plan(tiny(given), None).units
    assert precisions(make_plan(tiny(given), None, precision="float32")) == {"bfloat16"}


def test_a_study_that_moves_keeps_its_precision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, amx=True)
    assert run_study(tiny(AUTO), tmp_path).finished
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "units").iterdir()}
    fake(monkeypatch, amx=False)
    assert run_study(tiny(AUTO), tmp_path).finished
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "units").iterdir()} == before


def test_another_word_is_refused() -> None:
    with pytest.raises(
        StudyError, match=r"training.precision.*'auto', 'float32' or 'bfloat16'.*found 'fast'"
    ):
        tiny(AUTO.replace("auto", "fast"))
