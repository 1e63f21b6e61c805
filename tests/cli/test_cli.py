"""The command line as a user meets it: results, JSON, exit codes, and nothing half-written on bad input."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus import Alignment
from isthmus import __version__ as version
from isthmus.checkpoints import load_state, save_state
from isthmus.cli._target import load_target
from isthmus.errors import ModelError
from isthmus.symmetry import SymmetrySpec
from isthmus.testing import mlp

Cli = Callable[..., Any]


def test_help_lists_the_commands(isthmus: Cli) -> None:
    result = isthmus("--help")
    assert result.code == 0
    for command in ("demo", "symmetry", "fold", "align", "line", "explain", "merge"):
        assert command in result.out


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["demo", "--points", "one"], ["align", "a"], ["demo", "--no-such-option"]]
)
def test_bad_use_exits_with_2(isthmus: Cli, arguments: list[str]) -> None:
    result = isthmus(*arguments)
    assert result.code == 2
    assert result.err


def test_symmetry_prints_groups_pins_and_error(isthmus: Cli, project: Path) -> None:
    result = isthmus("symmetry", "mynet:with_inputs")
    assert result.code == 0
    assert "layers.0" in result.out
    assert "the model's output" in result.out
    assert "function preserved" in result.out
    heads = r"group +units +acts +role +moves\n *layers.0 +\d+ +positive scales +holds +layers.0.weight\[0\]"
    assert re.search(heads, result.out)
    assert re.search(r"reads +layers.1.weight\[1\]", result.out)


def test_symmetry_as_json_and_saved(isthmus: Cli, project: Path) -> None:
    result = isthmus("symmetry", "mynet:build(width=5)", "--shape", "3,64", "--json", "--save", "spec.json")
    assert result.code == 0
    assert [g["size"] for g in result.json["groups"]] == [5, 5]
    assert [slot["role"] for slot in result.json["groups"][0]["slots"]] == ["holds", "holds", "reads"]
    assert result.json["verification"]["passed"]
    assert SymmetrySpec.from_json((project / "spec.json").read_text()).groups.keys() == {
        "layers.0",
        "layers.1",
    }


def test_symmetry_needs_inputs(isthmus: Cli, project: Path) -> None:
    result = isthmus("symmetry", "mynet:build")
    assert result.code == 2
    assert "No example inputs" in result.err
    assert "--data where the command takes it" in " ".join(result.err.split())  # this one takes none
    assert isthmus("symmetry", "mynet:build", "--shape", "3,x").code == 2


def test_a_random_model_is_refused(isthmus: Cli, project: Path) -> None:
    result = isthmus("symmetry", "mynet:noisy")
    assert result.code == 2
    assert "random in evaluation mode" in result.err


def test_a_failed_check_exits_with_1(isthmus: Cli, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import isthmus.symmetry as symmetry

    found = symmetry.discover(*load_target_pair("mynet:with_inputs"))
    group = found.groups["layers.0"]
    wrong = found.without_slot("layers.0", group.slots[0])
    monkeypatch.setattr(symmetry, "discover", lambda *_, **__: wrong)
    result = isthmus("symmetry", "mynet:with_inputs")
    assert result.code == 1
    assert "layers.0" in result.err


def load_target_pair(text: str) -> tuple[torch.nn.Module, tuple[object, ...]]:
    target = load_target(text)
    assert target.example is not None
    return target.model, target.example.args


def test_align_line_and_merge(isthmus: Cli, project: Path) -> None:
    pair = ("a.safetensors", "b.pt", "--model", "mynet:build")
    data = ("--data", "mynet:batches")
    aligned = isthmus("align", *pair, *data, "--method", "covariance", "--out", "ab.safetensors", "--json")
    assert aligned.code == 0, aligned.err
    assert aligned.json["verification_error"] < 1e-10
    assert set(Alignment.load("ab.safetensors").permutations) == {"layers.0", "layers.1"}

    measured = isthmus(
        "line", *pair, *data, "--alignment", "ab.safetensors", "--points", "5", "--out", "line", "--json"
    )
    assert measured.code == 0, measured.err
    assert measured.json == json.loads((project / "line" / "line.json").read_text())
    assert len(measured.json["curves"]["data"]["loss"]) == 5
    assert (project / "line" / "line.png").read_bytes().startswith(b"\x89PNG")

    merged = isthmus("merge", *pair, "--method", "weights", "--shape-free", "--out", "m.safetensors")
    assert merged.code == 2  # an unknown option, and nothing is written
    assert not (project / "m.safetensors").exists()
    merged = isthmus("merge", *pair, *data, "--method", "weights", "--out", "m.safetensors", "--json")
    assert merged.code == 0, merged.err
    expected = Alignment.load("ab.safetensors").spec
    assert set(load_state("m.safetensors")) == set(expected.shapes)


def test_align_by_what_the_network_allows(isthmus: Cli, project: Path) -> None:
    command = ("align", "a.safetensors", "b.pt", "--model", "mynet:with_inputs", "--method", "weights")
    result = isthmus(*command, "--symmetry", "all", "--out", "all.safetensors", "--json")
    assert result.code == 0, result.err
    assert set(result.json["kinds"]) == {"Monomial"}
    assert result.json["symmetry"] == "all"
    assert {g["kind"] for g in result.json["groups"].values()} == {"scales"}
    assert all(g["similarity"][0] < g["similarity"][1] for g in result.json["groups"].values())
    assert result.json["verification_error"] < 1e-10
    assert Alignment.load("all.safetensors").kinds == result.json["kinds"]
    printed = isthmus(*command, "--symmetry", "positive,signed", "--out", "some.safetensors", "--verbose")
    assert printed.code == 0, printed.err
    assert "2 by scales" in printed.out
    assert re.search(
        r"layers\.0  12 units: scales and permutation, factors .*; similarity .* → .*, matched", printed.out
    )
    plain = isthmus(*command, "--out", "plain.safetensors")
    assert plain.out.endswith(
        "Of 2 groups this network allows more than permutations: positive scales in 2; --symmetry all uses them.\n"
    )
    assert "--symmetry" not in isthmus(*command, "--symmetry", "all", "--out", "all.safetensors").out
    unknown = isthmus(*command, "--symmetry", "mirrors", "--out", "none.safetensors")
    assert unknown.code == 2
    assert "mirrors" in unknown.err
    assert not (project / "none.safetensors").exists()


def test_line_and_merge_match_by_what_the_network_allows(isthmus: Cli, project: Path) -> None:
    pair = ("a.safetensors", "b.pt", "--model", "mynet:with_inputs")
    by = ("--method", "weights", "--symmetry", "all")
    line = isthmus("line", *pair, *by, "--data", "mynet:batches", "--points", "2", "--out", "line", "--json")
    assert line.code == 0, line.err
    assert line.json == json.loads((project / "line" / "line.json").read_text())
    assert line.json["symmetry"] == "all"
    assert {group["kind"] for group in line.json["groups"].values()} == {"scales"}
    merged = isthmus("merge", *pair, *by, "--out", "m.safetensors")
    assert "after aligning by weights, all; written to m.safetensors" in merged.out
    assert merged.out.count("units: scales and permutation, factors") == 2
    isthmus("align", *pair, *by, "--out", "all.safetensors")
    again = isthmus("merge", *pair, "--alignment", "all.safetensors", "--out", "n.safetensors", "--json")
    assert again.json["groups"] == line.json["groups"]
    for name, tensor in load_state("m.safetensors").items():
        assert torch.equal(tensor, load_state("n.safetensors")[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--symmetry", "all"), "--symmetry all says by what --method matches: give --method as well."),
        (
            ("--symmetry", "all", "--alignment", "x.safetensors"),
            "give --method as well, or --alignment alone, whose file says what acts on the units.",
        ),
        (
            ("--symmetry", "mirrors", "--method", "weights"),
            "unknown symmetry 'mirrors': expected 'permutations'",
        ),
    ],
)
def test_a_symmetry_needs_a_method_and_a_name_that_is_known(
    isthmus: Cli, project: Path, options: tuple[str, ...], message: str
) -> None:
    for command in ("merge", "line"):
        data = ("--data", "mynet:batches") if command == "line" else ()
        result = isthmus(
            command, "a.safetensors", "b.pt", "--model", "mynet:build", *options, *data, "--out", "o"
        )
        assert result.code == 2
        assert message in result.err
    assert not (project / "o").exists()


def test_folded_checkpoints_allow_what_their_gains_of_one_allow(isthmus: Cli, project: Path) -> None:
    (project / "normed_pair.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    return nn.Sequential(nn.Linear(3, 6), "
        "nn.LayerNorm(6), nn.Linear(6, 2)), torch.zeros(2, 3)\n"
    )
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        net = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 2))
        torch.nn.init.uniform_(net[1].weight, 0.5, 2)
        torch.nn.init.normal_(net[1].bias)
        save_state(project / f"{name}.safetensors", net.state_dict())
        assert (
            isthmus(
                "fold", f"{name}.safetensors", "--model", "normed_pair:build", "--out", f"f{name}.safetensors"
            ).code
            == 0
        )
    command = (
        "--model",
        "normed_pair:build",
        "--method",
        "weights",
        "--symmetry",
        "all",
        "--out",
        "ab.safetensors",
    )
    plain = isthmus("align", "a.safetensors", "b.safetensors", *command)
    assert "rotation" not in plain.out
    folded = isthmus("align", "fa.safetensors", "fb.safetensors", *command)
    assert re.search(r"rotation, 6 dimensions; similarity -?0\.\d\d → 0\.\d\d", folded.out)
    assert "1 gains and biases are one in both networks and 1 are zero, as folding leaves them" in folded.out
    assert Alignment.load("ab.safetensors").spec.ones == ("1.weight",)


def test_align_writes_b_relabelled(isthmus: Cli, project: Path) -> None:
    result = isthmus(
        "align",
        "a.safetensors",
        "b.pt",
        "--model",
        "mynet:with_inputs",
        "--out",
        "w.safetensors",
        "--apply",
        "b2.pt",
    )
    assert result.code == 0, result.err
    assert "18 of 24 units moved" in result.out
    assert "Less than 1 % of 1,066 entries are pinned" in result.out
    assert "distance per unit in this metric: 1.156 before, 0.8497 after" in result.out
    alignment, before, after = Alignment.load("w.safetensors"), load_state("b.pt"), load_state("b2.pt")
    moved = alignment.apply(before)
    assert all(torch.equal(moved[k], after[k]) for k in after)
    inputs = torch.randn(7, 64)
    one, two = mlp(64, 12, 2, 10), mlp(64, 12, 2, 10)
    one.load_state_dict(before)
    two.load_state_dict(after)
    torch.testing.assert_close(one(inputs), two(inputs))


def test_merge_without_alignment_is_the_average(isthmus: Cli, project: Path) -> None:
    result = isthmus(
        "merge",
        "a.safetensors",
        "b.pt",
        "--model",
        "mynet:build",
        "--weight",
        "0.25",
        "--out",
        "m.safetensors",
    )
    assert result.code == 0, result.err
    a, b, m = (load_state(name) for name in ("a.safetensors", "b.pt", "m.safetensors"))
    for key in m:
        torch.testing.assert_close(m[key], 0.75 * a[key] + 0.25 * b[key])


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch executed",))


def damage(project: Path, kind: str) -> None:
    path = project / "b.pt"
    state = load_state(path)
    if kind == "missing":
        path.unlink()
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "not a checkpoint":
        path.write_bytes(b"hello, world")
    elif kind == "code":
        path.write_bytes(pickle.dumps(Evil()))
    elif kind == "nan":
        state["layers.0.weight"][0, 0] = float("nan")
        save_state(path, state)
    elif kind == "missing key":
        del state["layers.0.bias"]
        save_state(path, state)
    elif kind == "extra key":
        save_state(path, {**state, "layers.9.bias": torch.zeros(1)})
    elif kind == "other width":
        save_state(path, mlp(64, 13, 2, 10).state_dict())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "b.pt"),
        ("truncated", "b.pt"),
        ("not a checkpoint", "b.pt"),
        ("code", "b.pt"),
        ("nan", "NaN"),
        ("missing key", "layers.0.bias"),
        ("extra key", "layers.9.bias"),
        ("other width", "shape"),
    ],
)
def test_a_bad_checkpoint_is_one_clear_error(isthmus: Cli, project: Path, kind: str, words: str) -> None:
    damage(project, kind)
    result = isthmus("merge", "a.safetensors", "b.pt", "--model", "mynet:build", "--out", "m.safetensors")
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err
    assert not (project / "m.safetensors").exists()
    assert not (project / "executed").exists()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("mynet:no_batches", "at least one batch"),
        ("mynet:wild_labels", "Labels run from 0 to 10"),
        ("mynet:missing", "missing"),
        ("nonsense", "Unknown data"),
        ("mnist", "mnist"),
    ],
)
def test_bad_data_is_one_clear_error(isthmus: Cli, project: Path, data: str, words: str) -> None:
    (project / "empty").mkdir()
    result = isthmus(
        "line",
        "a.safetensors",
        "b.pt",
        "--model",
        "mynet:build",
        "--data",
        data,
        "--data-dir",
        "empty",
        "--out",
        "o",
    )
    assert result.code == 2
    assert words in result.err
    assert not (project / "o" / "line.json").exists()


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("mynet", "package.module:factory"),
        ("no.such.module:f", "no"),
        ("mynet:absent", "absent"),
        ("mynet:broken", "no such weights"),
        ("mynet:no_module", "expected a torch.nn.Module"),
        ("mynet:build(1+x)", "literals"),
        ("mynet:build(", "literals"),
        (
            "mynet.py:build",
            r"found a file's name\. Write mynet:build, from the folder in which mynet\.py lies",
        ),
        ("nets/own.py:build(3)", r"Write own:build\(3\), from the folder"),
    ],
)
def test_a_bad_target_is_one_clear_error(project: Path, target: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_target(target)


def test_target_forms(project: Path) -> None:
    assert load_target("mynet:build(7)").model.layers[0].weight.shape == (7, 64)
    assert not load_target("mynet:build").model.training
    example = load_target("mynet:with_inputs").example
    assert example is not None
    assert example.args[0].shape == (2, 64)


def test_an_output_path_that_is_a_file_is_refused_before_any_work(isthmus: Cli, project: Path) -> None:
    (project / "taken").write_text("mine")
    result = isthmus("demo", "--out", "taken/inside")
    assert result.code == 2
    assert "Cannot write to the output folder" in result.err
    assert (project / "taken").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "m.bin"), "an alignment is written as .safetensors"),
        (("--out", "ab.safetensors", "--apply", "b2.bin"), "unknown checkpoint format '.bin'"),
        (("--out", "taken/ab.safetensors"), "Cannot write to the output folder taken"),
        (("--out", "ab.safetensors", "--shape", "2,-1"), "numbers of at least 1"),
        (("--out", "ab.safetensors", "--shape", "2,65"), "Cannot trace"),
        (("--out", "ab.safetensors", "--method", "covariance", "--shape", "2,64"), "batches"),
    ],
)
def test_a_bad_align_writes_nothing(
    isthmus: Cli, project: Path, options: tuple[str, ...], words: str
) -> None:
    (project / "taken").write_text("mine")
    before = sorted(p.name for p in project.iterdir())
    result = isthmus("align", "a.safetensors", "b.pt", "--model", "mynet:build", *options)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err
    assert sorted(p.name for p in project.iterdir()) == before


def test_checkpoints_are_written_together_into_new_folders(isthmus: Cli, project: Path) -> None:
    command = ("align", "a.safetensors", "b.pt", "--model", "mynet:build", "--shape", "2,64")
    result = isthmus(*command, "--out", "new/ab.safetensors", "--apply", "other/b2.pt")
    assert result.code == 0, result.err
    assert [p.name for p in (project / "new").iterdir()] == ["ab.safetensors"]
    assert [p.name for p in (project / "other").iterdir()] == ["b2.pt"]
    merged = isthmus("merge", *command[1:], "--method", "weights", "--out", "merged/m.pt")
    assert merged.code == 0, merged.err
    assert [p.name for p in (project / "merged").iterdir()] == ["m.pt"]


def test_data_that_do_not_fit_the_network(isthmus: Cli, project: Path) -> None:
    pair = ("a.safetensors", "b.pt", "--model", "mynet:build")
    result = isthmus("line", *pair, "--data", "mynet:too_wide", "--out", "line")
    assert result.code == 2
    assert "inputs (3, 65) failed" in result.err
    assert not (project / "line").exists()


def test_the_version(isthmus: Cli) -> None:
    result = isthmus("--version")
    assert result.code == 0
    assert result.out == f"isthmus {version}\n"
    assert "Start with" in isthmus("--help").out


def test_torch_does_not_talk_over_the_error(project: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "isthmus", "symmetry", "mynet:build", "--shape", "2,65"],
        capture_output=True,
        text=True,
        check=False,
        cwd=project,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("Error: Cannot trace "), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_align_refines_on_the_path(isthmus: Cli, project: Path) -> None:
    command = ("align", "a.safetensors", "b.pt", "--model", "mynet:with_inputs", "--data", "mynet:batches")
    result = isthmus(*command, "--refine", "--refine-steps", "20", "--out", "refined.safetensors", "--json")
    assert result.code == 0, result.err
    assert set(result.json["kinds"]) == {"Monomial"}
    assert result.json["method"] == "covariance, refined"
    assert result.json["verification_error"] < 1e-10
    assert Alignment.load("refined.safetensors").settings["refinement"]["taken"] == 20
    told = isthmus(*command, "--refine", "--refine-steps", "1", "--out", "told.safetensors")
    assert "scales and permutation" in told.out
    assert "--symmetry all uses them" not in told.out
    for options, reason in (
        (("--refine-steps", "20"), "belong to --refine, which was not given"),
        (("--loss", "mse"), "belong to --refine, which was not given"),
    ):
        refused = isthmus(*command, *options, "--out", "none.safetensors")
        assert refused.code == 2
        assert reason in refused.err
    without = isthmus(*command[:5], "--refine", "--out", "none.safetensors")
    assert without.code == 2
    assert "--refine learns on training data: give --data" in without.err
    assert not (project / "none.safetensors").exists()
