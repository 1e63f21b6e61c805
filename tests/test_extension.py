"""What a user adds with public names alone works everywhere: in Python, on the command line and in a report."""

from __future__ import annotations

import ast
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import isthmus
from isthmus.cli import main
from isthmus.matching import METHODS, Method, Problem, SinglePass, method_named
from isthmus.study import compare, load_dataset, network_for, to_batches
from isthmus.symmetry import rule
from isthmus.testing import check_alignment_contract

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example module, importable by name; what it registers is taken back."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    before = dict(METHODS._methods)  # pyright: ignore[reportPrivateUsage]
    sys.modules.pop("own_method", None)
    yield importlib.import_module("own_method")
    sys.modules.pop("own_method", None)
    METHODS._methods = before  # pyright: ignore[reportPrivateUsage]


def lines_of_code(path: Path) -> int:
    """Count lines that are neither empty, nor comments, nor docstrings."""
    text = path.read_text(encoding="utf-8")
    docs = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    listed = enumerate(text.splitlines(), start=1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and k not in docs for k, line in listed
    )


def test_the_examples_are_short_and_use_public_names_alone() -> None:
    for name, limit in (("own_method.py", 30), ("own_operator.py", 15)):
        path = EXAMPLES / name
        assert lines_of_code(path) <= limit
        imported = [
            n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)
        ]
        modules = [n.module or "" for n in imported] + [a.name for n in imported for a in n.names]
        assert not any(part.startswith("_") for module in modules for part in module.split("."))


def networks() -> tuple[nn.Module, nn.Module]:
    digits = load_dataset("digits", split="train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        a = network_for("mlp", digits, width=12, depth=2)
        b = network_for("mlp", digits, width=12, depth=2)
    return a.eval(), b.eval()


def test_an_own_method_aligns_and_keeps_the_contract(own: ModuleType) -> None:
    a, b = networks()
    batches = to_batches(load_dataset("digits", split="train"), 200)[:2]
    for method in ("sum", "own_method:METHOD", own.METHOD):
        found = isthmus.align(a, b, batches=batches, method=method)
        assert found.method == "sum"
        assert found.verification_error is not None
        assert found.verification_error < 1e-10
    problem = Problem(a, b, batches=batches)
    check_alignment_contract(own._objective(problem, problem.generator()), own.SCHEDULE)
    check_alignment_contract(own._objective(problem, problem.generator()), SinglePass())


def test_an_own_method_stands_in_the_comparison_under_its_label(own: ModuleType) -> None:
    from isthmus.report._format import label

    a, b = networks()
    digits = load_dataset("digits", split="train")
    found = compare(
        a,
        b,
        to_batches(digits, 200)[:2],
        {"test": to_batches(digits, 200)[:1]},
        name="pair",
        settings={},
        methods=["weights", "own_method:METHOD"],
        points=3,
    )
    assert list(found.record["methods"]) == ["none", "weights", "sum"]
    assert label("sum") == "weights and correlation"


def test_an_own_method_works_on_the_command_line(
    own: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    a, b = networks()
    torch.save(a.state_dict(), "a.pt")
    torch.save(b.state_dict(), "b.pt")
    target = "isthmus.testing:mlp"
    (tmp_path / "pair_net.py").write_text(
        "from isthmus.study import load_dataset, network_for\n"
        "def net():\n    return network_for('mlp', load_dataset('digits', split='train'), width=12, depth=2)\n",
        encoding="utf-8",
    )
    target = "pair_net:net"
    arguments = [
        "isthmus",
        "align",
        "a.pt",
        "b.pt",
        "--model",
        target,
        "--data",
        "digits",
        "--out",
        "o.safetensors",
    ]
    monkeypatch.setattr(
        sys, "argv", [*arguments, "--limit", "200", "--method", "own_method:METHOD", "--json"]
    )
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out)["method"] == "sum"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("none such", "unknown method 'none such'"),
        ("own_missing:METHOD", "No module named 'own_missing'"),
        ("isthmus.matching:NOTHING", "has no attribute 'NOTHING'"),
        ("isthmus.matching:Problem", "expected an isthmus.matching.Method, found type"),
    ],
)
def test_methods_that_are_none_are_named(method: str, message: str) -> None:
    with pytest.raises(isthmus.DataError, match=message):
        method_named(method)


def test_a_second_method_of_one_name_is_refused() -> None:
    with pytest.raises(isthmus.DataError, match="'weights' is registered already"):
        METHODS.register(Method("weights", "mine", METHODS["weights"].objective))


class Squashed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.ops.own.squash(self.first(x)))


def test_an_own_operator_is_taught_in_a_few_lines() -> None:
    found = importlib.util.spec_from_file_location("own_operator", EXAMPLES / "own_operator.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    net, x = Squashed().eval(), torch.randn(4, 3)
    spec = isthmus.discover(net, x)
    assert [group.size for group in spec.groups.values()] == [8]
    assert isthmus.verify(spec, net, x).passed
    with pytest.raises(RuntimeError, match=r"two rules for own\.squash"):
        rule("own.squash")(lambda op, x: x)
