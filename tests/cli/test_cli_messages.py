"""What reaches the terminal: names as they are, few lines, one message a fault; nothing is written onto an input."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isthmus.checkpoints import load_state, save_state
from isthmus.cli import _console as console
from isthmus.cli import _options as options
from isthmus.cli._app import run
from isthmus.cli._target import load_target
from isthmus.cli._texts import alignment_text, spec_text
from isthmus.errors import DataError, IsthmusWarning, ModelError, OutputError
from isthmus.matching import Alignment
from isthmus.symmetry import AxisGroup, IndexMap, PinnedAxis, Slot, SymmetrySpec
from isthmus.testing import mlp

Cli = Callable[..., Any]
PAIR = ("a.safetensors", "b.pt", "--model", "mynet:build")


def group(name: str, size: int) -> tuple[AxisGroup, tuple[int, ...]]:
    return AxisGroup(name, size, (Slot(f"{name}.w", 0, IndexMap(size, size)),)), (size,)


def test_the_operator_of_a_pinned_axis_is_printed(isthmus: Cli, project: Path) -> None:
    (project / "pinned.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.f = torch.nn.Linear(3, 4)\n"
        "    def forward(self, x):\n"
        "        return torch.cumsum(self.f(x), 1).sum(1)\n"
        "def build():\n"
        "    return Net(), torch.zeros(2, 3)\n"
    )
    result = isthmus("symmetry", "pinned:build")
    assert result.code == 0, result.err
    assert "[aten.cumsum" in result.out


@pytest.mark.parametrize("word", ["[/nope]", "[bold red]x", ":smile:", "a[0]"])
def test_words_in_brackets_are_words(isthmus: Cli, project: Path, word: str) -> None:
    for arguments in (
        ("symmetry", word),
        (word,),
        ("align", *PAIR, "--out", "o.safetensors", "--data", word),
    ):
        result = isthmus(*arguments)
        assert result.code == 2
        assert word in result.err
        assert "Traceback" not in result.err


def test_tables_and_progress_take_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    console.out().print("[/nope] :smile:")
    assert capsys.readouterr().out == "[/nope] :smile:\n"


def test_a_stream_of_another_encoding_still_gets_every_message(project: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        [sys.executable, "-m", "isthmus", "symmetry", "nö:x"],
        capture_output=True,
        text=True,
        check=False,
        cwd=project,
        env=environment,
    )
    assert done.returncode == 2
    assert "n\\xf6" in done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit(4)", "importing faulty failed with SystemExit: 4"),
        (
            "import no_such_module",
            "importing faulty failed with ModuleNotFoundError: No module named 'no_such",
        ),
        ("raise ValueError('why')", "importing faulty failed with ValueError: why"),
        ("x = (", "importing faulty failed with SyntaxError"),
        ("build = 3", "expected a function or class that builds the network, found int"),
        ("def build(): raise SystemExit('enough')", "calling it failed with SystemExit: enough"),
    ],
)
def test_a_target_that_fails_is_one_message(project: Path, code: str, words: str) -> None:
    (project / "faulty.py").write_text(code)
    sys.modules.pop("faulty", None)
    with pytest.raises(ModelError, match=words):
        load_target("faulty:build")


def test_modules_in_the_current_folder_are_found_by_the_installed_command(project: Path) -> None:
    script = Path(sys.executable).with_name("isthmus")
    if not script.exists():
        pytest.skip("the package is not installed as a command")
    data = ("--data", "mynet:batches")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    arguments = ("merge", *PAIR, *data, "--method", "covariance", "--out", "m.pt")
    done = subprocess.run(
        [script, *arguments], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("align", *PAIR, "--out", "b.pt"), "Cannot write b.pt: it is the input"),
        (("align", *PAIR, "--out", "y.pt"), "--out y.pt: an alignment is written as .safetensors"),
        (("align", *PAIR, "--out", "y"), "--out y: an alignment is written as .safetensors"),
        (
            ("line", *PAIR, "--out", "l", "--data", "mynet.py:batches"),
            "found a file's name. Write mynet:batches",
        ),
        (
            ("line", *PAIR, "--out", "l", "--data", "mynet:batches", "--method", "x/own.py:M"),
            "Write 'own:M', from",
        ),
        (
            ("align", *PAIR, "--out", "ab.pt", "--apply", "./a.safetensors"),
            "Cannot write a.safetensors: it is the input",
        ),
        (
            ("align", *PAIR, "--out", "ab.pt", "--apply", "sub/../ab.pt"),
            "--apply and --out name the same path",
        ),
        (("merge", *PAIR, "--out", "a.safetensors"), "Cannot write a.safetensors: it is the input"),
        (("merge", *PAIR, "--out", "link.pt"), "Cannot write link.pt: it is the input"),
        (("merge", *PAIR, "--out", "hard.pt"), "Cannot write hard.pt: it is the input"),
    ],
)
def test_nothing_is_written_onto_an_input(
    isthmus: Cli, project: Path, arguments: tuple[str, ...], words: str
) -> None:
    (project / "sub").mkdir()
    (project / "link.pt").symlink_to("b.pt")
    os.link(project / "b.pt", project / "hard.pt")
    before = {p.name: p.read_bytes() for p in project.iterdir() if p.is_file()}
    result = isthmus(*arguments, "--shape", "2,64")
    assert result.code == 2
    assert words in " ".join(result.err.split())
    assert {p.name: p.read_bytes() for p in project.iterdir() if p.is_file()} == before


def test_an_output_inside_an_input_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(OutputError, match=r"Cannot write .*merged: it is inside the input .*model"):
        console.refuse_inputs({"--out": tmp_path / "model" / "merged", "--apply": None}, [tmp_path / "model"])
    console.refuse_inputs({"--out": tmp_path / "model-2"}, [tmp_path / "model"])


def test_an_unexpected_error_is_named_and_not_shown_as_a_traceback(
    isthmus: Cli, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise AttributeError("'NoneType' object has no attribute 'x'")

    monkeypatch.setattr("isthmus.cli._symmetry._found", broken)
    result = isthmus("symmetry", "mynet:with_inputs")
    assert result.code == console.INTERNAL == 3
    assert result.err.startswith("Internal error: AttributeError: 'NoneType' object has no attribute 'x'.")
    assert "Traceback" not in result.err
    monkeypatch.setenv("ISTHMUS_TRACEBACK", "1")
    assert "Traceback" in isthmus("symmetry", "mynet:with_inputs").err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "Error: out of memory. Use a smaller --batch-size"),
        (OSError(28, "No space left on device", "out/x"), "Error: out/x: No space left on device."),
    ],
)
def test_a_machine_at_its_end_is_no_fault_of_the_program(
    isthmus: Cli, project: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("isthmus.cli._symmetry._found", broken)
    result = isthmus("symmetry", "mynet:with_inputs")
    assert result.code == 2
    assert words in result.err


def test_a_reader_that_has_gone_ends_the_command_quietly(project: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "isthmus",
        "symmetry",
        "isthmus.testing:mlp(8, 9, 2, 3)",
        "--shape",
        "2,8",
    ]
    with subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_warnings_of_results_are_lines_and_each_comes_once(
    isthmus: Cli, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import warnings

    def noisy(*_: Any, **__: Any) -> None:
        for _ in range(2):
            warnings.warn("easily misread", IsthmusWarning, stacklevel=2)
        raise DataError("the end")

    monkeypatch.setattr("isthmus.cli._symmetry._found", noisy)
    assert isthmus("symmetry", "mynet:with_inputs").err == "Warning: easily misread\nError: the end\n"


def test_what_a_result_says_is_not_said_again(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    with console.warnings_as_lines():
        for text in ("near chance", "left behind"):
            warnings.warn(text, IsthmusWarning, stacklevel=1)
        console.emit({}, False, "a result\nNote: near chance")
    captured = capsys.readouterr()
    assert captured.out == "a result\nNote: near chance\n"
    assert captured.err == "Warning: left behind\n"


def test_alike_groups_are_one_line_unless_all_are_asked_for() -> None:
    made = [group(f"blocks.{k}.mlp", 8) for k in range(30)] + [group("head", 5)]
    pinned = tuple(PinnedAxis(f"blocks.{k}.mlp.w", 1, 3, "why", "aten.op") for k in range(30))
    spec = SymmetrySpec({g.name: g for g, _ in made}, pinned, {g.slots[0].tensor: (*s, 3) for g, s in made})
    short = spec_text(spec)
    assert "  blocks.*.mlp  30 groups of 8 units\n  head          5 units" in short
    assert "30 axes: why [aten.op]" in short
    assert short.count("\n") < 12
    assert spec_text(spec, verbose=True) == str(spec)
    few = spec.restrict(["head"])
    few = SymmetrySpec(few.groups, (), few.shapes)
    assert spec_text(few) == str(few)


def test_an_alignment_is_a_few_lines_unless_every_group_is_asked_for() -> None:
    made = [group(f"layers.{k}", 4) for k in range(40)]
    spec = SymmetrySpec({g.name: g for g, _ in made}, (), {g.slots[0].tensor: s for g, s in made})
    order = torch.tensor([1, 2, 0, 3])
    alignment = Alignment(
        couplings=dict.fromkeys(spec.groups, order),
        spec=spec,
        method="weights",
        costs=dict.fromkeys(spec.groups, (3.0, 1.0)),
        notes=tuple(f"note {k}" for k in range(5)),
    )
    short = alignment_text(alignment)
    assert "120 of 160 units moved" in short
    assert "3 before, 1 after" in short
    assert "Note: note 2\n2 more notes with --verbose." in short
    assert short.count("\n") < 8
    whole = alignment_text(alignment, verbose=True)
    assert whole.count("4 units: permutation, 3 moved, matched cost 3 → 1") == 40
    assert "Note: note 4" in whole


@pytest.mark.parametrize("points", ["1", "x", "-3", "2.5", ""])
def test_points_are_a_number_or_adaptive(isthmus: Cli, project: Path, points: str) -> None:
    result = isthmus("line", *PAIR, "--data", "mynet:batches", "--out", "line", "--points", points)
    assert result.code == 2
    assert f"--points {points}: expected a whole number, 2 or more, or adaptive." in result.err


def test_the_line_offers_what_the_library_does(isthmus: Cli, project: Path) -> None:
    how = ("--points", "adaptive", "--tolerance", "0.01", "--precision", "bfloat16", "--bootstrap", "0")
    where = ("--refresh-data", "data", "--refresh", "batchnorm")
    result = isthmus(
        "line",
        *PAIR,
        "--data",
        "mynet:batches",
        "--method",
        "correlation",
        *how,
        *where,
        "--out",
        "line",
        "--json",
    )
    assert result.code == 0, result.err
    settings = result.json["settings"]
    assert settings["points"].startswith("adaptive")
    assert (settings["precision"], settings["bootstrap"], settings["alignment"]) == (
        "bfloat16",
        0,
        "correlation",
    )
    assert settings["refresh"] == "batchnorm"


@pytest.mark.parametrize(
    ("options_given", "words"),
    [
        (("--refresh-data", "train"), "--refresh-data train: the data have the parts data."),
        (("--refresh", "always"), "--refresh always: expected auto, batchnorm or none."),
        (("--method", "weights", "--alignment", "x.pt"), "not both"),
        (("--outputs", ""), "--outputs '': expected the name or the position"),
    ],
)
def test_bad_options_of_the_line(
    isthmus: Cli, project: Path, options_given: tuple[str, ...], words: str
) -> None:
    result = isthmus("line", *PAIR, "--data", "mynet:batches", "--out", "line", *options_given)
    assert result.code == 2
    assert words in result.err
    assert not (project / "line").exists()


LATE = """
class Late:
    def __init__(self, when):
        self.when, self.passes = when, 0
    def __iter__(self):
        import torch
        self.passes += 1
        yield torch.zeros(4, 64), torch.arange(4)
        if self.passes >= self.when:
            raise RuntimeError("disk gone")
def once():
    yield from Late(1)
def again():
    return Late(1)
"""


@pytest.mark.parametrize("function", ["once", "again"])
@pytest.mark.parametrize("command", ["align", "line"])
def test_data_that_fail_while_they_are_read_are_named(
    isthmus: Cli, project: Path, function: str, command: str
) -> None:
    (project / "late.py").write_text(LATE)
    sys.modules.pop("late", None)
    result = isthmus(command, *PAIR, "--data", f"late:{function}", "--out", "o.safetensors")
    assert result.code == 2
    assert "reading batch 1 failed with RuntimeError: disk gone." in result.err
    assert not (project / "o.safetensors").exists()


def test_warnings_are_in_the_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    import json
    import warnings

    with console.warnings_as_lines():
        for text in ("say 'why'", "known"):
            warnings.warn(text, IsthmusWarning, stacklevel=1)
        console.emit({"notes": ["known"]}, True, "")
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"notes": ["known"], "warnings": ["say 'why'"]}
    assert captured.err == "Warning: say 'why'\nWarning: known\n"


def test_outputs_are_chosen_by_name_or_position() -> None:
    assert options.output_names(None) is None
    assert options.output_names(["logits", "0", "-1"]) == ["logits", 0, -1]


def test_outputs_free_what_only_another_output_held(isthmus: Cli, project: Path) -> None:
    (project / "two.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.f = torch.nn.Linear(64, 9)\n"
        "        self.g = torch.nn.Linear(9, 10)\n"
        "    def forward(self, x):\n"
        "        h = self.f(x).relu()\n"
        "        return h, self.g(h)\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return Net()\n"
    )
    sys.modules.pop("two", None)
    for seed, name in enumerate(("a.pt", "c.pt")):
        torch.manual_seed(seed)
        save_state(
            name,
            {
                "f.weight": torch.randn(9, 64),
                "f.bias": torch.randn(9),
                "g.weight": torch.randn(10, 9),
                "g.bias": torch.randn(10),
            },
        )
    pair = ("a.pt", "c.pt", "--model", "two:build", "--data", "mynet:batches")
    held = isthmus("align", *pair, "--out", "held.safetensors", "--json")
    freed = isthmus("align", *pair, "--out", "freed.safetensors", "--outputs", "1", "--json")
    assert held.code == freed.code == 0, held.err + freed.err
    assert held.json["moved"] == {}
    assert list(freed.json["moved"]) == ["f"]
    for command in (("merge", *pair, "--out", "m.pt"), ("line", *pair, "--out", "line")):
        result = isthmus(*command, "--method", "weights", "--outputs", "1")
        assert result.code == 0, result.err
    scored = isthmus("line", *pair, "--out", "line", "--points", "2", "--outputs", "1", "--json")
    assert scored.json["settings"]["outputs"] == 1
    other = isthmus("line", *pair, "--out", "line", "--alignment", "freed.safetensors")
    assert other.code == 1, other.err
    assert "preserves '1' alone of the network's outputs, and '0' is scored" in " ".join(other.err.split())


def test_merge_takes_an_alignment_file(isthmus: Cli, project: Path) -> None:
    assert isthmus("align", *PAIR, "--shape", "2,64", "--out", "ab.safetensors").code == 0
    result = isthmus("merge", *PAIR, "--alignment", "ab.safetensors", "--out", "m.pt")
    assert result.code == 0, result.err
    moved = Alignment.load("ab.safetensors").apply(load_state("b.pt"))
    a, merged = load_state("a.safetensors"), load_state("m.pt")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (a[name] + moved[name]) / 2)


def test_the_method_is_chosen_by_what_there_is(isthmus: Cli, project: Path) -> None:
    for extra, method in ((("--data", "mynet:batches"), "covariance"), (("--shape", "2,64"), "weights")):
        result = isthmus("align", *PAIR, *extra, "--out", "ab.safetensors", "--json")
        assert result.code == 0, result.err
        assert result.json["method"] == method


def test_a_bar_moves_with_every_batch() -> None:
    with console.progress() as bar:
        data = console.tracked({"train": [1, 2, 3]}, bar)
        for _ in range(2):
            assert list(data["train"]) == [1, 2, 3]
            (task,) = bar.tasks
            assert (task.completed, task.total) == (3, 3)


def test_an_interrupt_says_so(project: Path, monkeypatch: pytest.MonkeyPatch, isthmus: Cli) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("isthmus.cli._symmetry._found", stopped)
    result = isthmus("symmetry", "mynet:with_inputs")
    assert result.code == 130
    assert result.err == "Interrupted; nothing was written.\n"


def test_paths_of_modules_are_as_before_a_command(project: Path) -> None:
    before = list(sys.path)
    run(["--version"])
    assert sys.path == before
    assert mlp(2, 2, 1, 2) is not None


def test_code_that_ends_the_program_is_an_error(isthmus: Cli, project: Path) -> None:
    (project / "leaving.py").write_text(
        "import torch\n"
        "class Rows:\n"
        "    def __iter__(self):\n"
        "        raise SystemExit(0)\n"
        "        yield\n"
        "def rows():\n"
        "    return Rows()\n"
    )
    result = isthmus("align", *PAIR, "--out", "o.safetensors", "--data", "leaving:rows")
    assert result.code == 2
    assert "failed with SystemExit: 0" in result.err
    assert not (project / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("someone/some-model", "it looks like the name of a model on the hub"),
        ("some-model", "no such file or folder"),
        ("weights.pt", "weights.pt: a checkpoint, which names no network."),
    ],
)
def test_a_target_that_is_none_says_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, found: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save_state("weights.pt", {"weight": torch.zeros(2)})
    with pytest.raises(ModelError, match=r"expected package\.module:factory") as error:
        load_target(target)
    assert found in str(error.value)
