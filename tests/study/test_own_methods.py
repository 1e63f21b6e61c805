"""A method of one's own in a study: found beside its file, run anywhere, measured anew when its code changes."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest

from isthmus.cli._app import run
from isthmus.errors import StudyError
from isthmus.matching import METHODS
from isthmus.study import InProcess, StudyStatus, read_study, run_study
from isthmus.study._own_methods import require_own_method
from isthmus.study._runner import make_plan

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method.py"
STUDY = """\
name: own
data: {name: digits, statistics: 200, train: 200}
network: {family: mlp, width: 12, depth: 1}
training: {epochs: 1, batch_size: 200, warmup_steps: 1}
seeds: 2
measure: {methods: [none, weights, "own_method:METHOD"], points: 3, dimension: DIMENSION}
"""
SCALED = """
from isthmus.matching import Method, weight_objective
from scale import SCALE
METHOD = Method("scaled", "scaled", lambda problem, generator: weight_objective(problem.pair))
"""


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study's file in a folder of its own with the example's module; the current folder is another one."""
    folder, elsewhere = tmp_path / "mine", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    shutil.copy(EXAMPLE, folder)
    (folder / "study.yaml").write_text(STUDY.replace("DIMENSION", "false"), encoding="utf-8")
    return folder / "study.yaml"


def events(out: Path) -> list[str]:
    lines = (out / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["unit"].split()[0] for line in lines]


def finished(file: Path, out: Path) -> StudyStatus:
    with InProcess(1) as executor:
        status = run_study(read_study(file), out, executor=executor)
    assert status.failed == {}
    assert status.finished
    return status


def test_from_the_file_to_figures(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, known = tmp_path / "out", tuple(METHODS)
    command = ["study", "run", str(study), "--out", str(out)]
    assert run([*command, "--executor", "processes", "--workers", "1", "--threads", "1"]) == 0
    assert "own_method:METHOD" in capsys.readouterr().out  # the table of barriers
    assert tuple(METHODS) == known
    assert not list(study.parent.glob("__pycache__"))
    done = events(out)
    assert run(command) == 0
    assert events(out) == done
    assert run(["study", "export", str(out)]) == 0
    with (out / "records.csv").open(encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if r["split"] == "test"]
    assert [r["method"] for r in rows] == ["none", "weights", "own_method:METHOD"]
    assert float(rows[2]["barrier"]) != float(rows[0]["barrier"])
    assert run(["study", "figures", str(out)]) == 0
    assert any("own_method:METHOD" in p.read_text(encoding="utf-8") for p in out.glob("figures/*.svg"))
    # the folder stands alone: its own file goes on where the first one is gone
    shutil.rmtree(study.parent)
    assert (out / "own_method.py").read_bytes() == EXAMPLE.read_bytes()
    assert run(["study", "run", str(out / "study.yaml"), "--out", str(out)]) == 0
    assert events(out) == done


def test_what_a_method_measured_is_made_anew_when_its_code_changes(study: Path, tmp_path: Path) -> None:
    out, module, part = tmp_path / "out", study.parent / "own_method.py", study.parent / "scale.py"
    module.write_text(SCALED, encoding="utf-8")
    part.write_text("SCALE = 1.0\n", encoding="utf-8")
    finished(study, out)
    assert events(out) == ["train", "measure"]
    (study.parent / "unused.py").write_text("SCALE = 3.0\n", encoding="utf-8")
    finished(study, out)
    assert events(out) == ["train", "measure"]
    part.write_text("SCALE = 2.0\n", encoding="utf-8")  # as long as before, within the same second
    finished(study, out)
    assert events(out) == ["train", "measure", "measure"]
    assert (out / "scale.py").read_text(encoding="utf-8") == "SCALE = 2.0\n"


def test_two_studies_have_modules_of_one_name(study: Path, tmp_path: Path) -> None:
    known, loaded = tuple(METHODS), {"own_method", "scale"} & set(sys.modules)
    finished(study, tmp_path / "first")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(study, other)
    (other / "own_method.py").write_text(SCALED.replace("from scale import SCALE\n", ""), encoding="utf-8")
    finished(other / "study.yaml", tmp_path / "second")
    digests = []
    for name in ("first", "second"):
        plan = json.loads((tmp_path / name / "plan.json").read_text(encoding="utf-8"))
        digests += [u["content"]["own_methods"] for u in plan["units"] if u["kind"] == "measure"]
    assert digests[0].keys() == digests[1].keys() == {"own_method:METHOD"}
    assert digests[0] != digests[1]
    assert tuple(METHODS) == known
    assert {"own_method", "scale"} & set(sys.modules) == loaded
    assert str(study.parent) not in sys.path


def test_dimensions_and_studies_without_own_methods_are_as_before(study: Path) -> None:
    study.write_text(STUDY.replace("DIMENSION", "true"), encoding="utf-8")
    plain = study.with_name("plain.yaml")
    plain.write_text(study.read_text("utf-8").replace(', "own_method:METHOD"', ""), encoding="utf-8")
    with_own, without = ({u.address: u for u in make_plan(read_study(f), None).units} for f in (study, plain))
    assert {u.kind for a, u in with_own.items() if a in without} == {"train", "dimension"}
    assert not any("own_methods" in u.content for u in without.values())


def test_code_that_changes_while_the_study_runs_is_not_used(study: Path) -> None:
    with pytest.raises(
        StudyError, match=r"expected the code with which the study was started .*Run the study again"
    ):
        require_own_method("own_method:METHOD", str(study.parent), "0" * 64)


@pytest.mark.parametrize(
    ("code", "method", "message"),
    [
        (None, "own_method:METHOD", r"No module named 'own_method'.*looked for in .*mine first"),
        ("", "own_method:METHOD", r"has no attribute 'METHOD'"),
        ("METHOD = 3", "own_method:METHOD", r"expected an isthmus\.matching\.Method, found int"),
        ("1 / 0", "own_method:METHOD", r"raises ZeroDivisionError.*Mend the module, or take the method out"),
        ("def", "own_method:METHOD", r"raises SyntaxError"),
        ("import own_missing", "own_method:METHOD", r"No module named 'own_missing'"),
        ("", "own_method.py:METHOD", r"Write 'own_method:METHOD'"),
        (
            "",
            "own method:METHOD",
            r"line 6: measure\.methods: expected .*or your own as module:METHOD, found",
        ),
        (
            "",
            "telepathy",
            r"line 6: measure\.methods: expected one of none, .*, or your own as module:METHOD",
        ),
    ],
)
def test_what_cannot_be_used_is_told_before_anything_is_trained(
    study: Path, tmp_path: Path, code: str | None, method: str, message: str
) -> None:
    module = study.parent / "own_method.py"
    module.unlink() if code is None else module.write_text(code, encoding="utf-8")
    text = STUDY.replace("DIMENSION", "false").replace("own_method:METHOD", method)
    study.write_text(text, encoding="utf-8")
    with pytest.raises(StudyError, match=f"(?s){message}"):
        run_study(read_study(study), tmp_path / "out")
    assert not (tmp_path / "out").exists()
