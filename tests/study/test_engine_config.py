"""Study files: lists are swept, and every fault is named with its line, field and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_studies import TINY, tiny

from isthmus.study import StudyError, make_plan, preset_names, read_study
from isthmus.study._config import parse_study
from isthmus.study._plan import NetworkFacts, address_of, plan_study


def fault(text: str) -> str:
    with pytest.raises(StudyError) as caught:
        tiny(text)
    return str(caught.value)


def test_lists_are_swept_in_every_combination() -> None:
    study = tiny(TINY.replace("width: 12", "width: [4, 8, 16]"))
    assert [(v.network.width, v.training.learning_rate) for v in study.variants] == [
        (w, r) for w in (4, 8, 16) for r in (0.01, 0.1)
    ]
    assert study.all_pairs == ((0, 1), (2, 3))
    assert tiny(TINY + "pairs: all\n").all_pairs == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    assert tiny(TINY.replace("seeds: 4", "seeds: [7, 5]")).all_pairs == ((7, 5),)


def test_numbers_without_a_dot_before_the_exponent_are_numbers() -> None:
    assert tiny(TINY.replace("[0.01, 0.1]", "1e-3")).variants[0].training.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("digits", "digist", "tiny.yaml, line 2: data.name: expected one of digits, mnist.*found 'digist'"),
        ("family: mlp", "family: mpl", "line 3: network.family: expected one of mlp, .*found 'mpl'"),
        ("[0.01, 0.1]", "[0.01, -1]", "line 4: training.learning_rate: expected greater than 0, found -1"),
        ("epochs: 2", "epoch: 2", r"line 4: training.epoch: unknown field. Known are optimiser, learning"),
        ("epochs: 2", "optimiser: sdg", "line 4: training.optimiser: expected 'sgd' or 'adam', found 'sdg'"),
        ("seeds: 4", "seeds: 3", "line 5: seeds: disjoint pairs need an even number of seeds, found 3"),
        ("seeds: 4", "seeds: [1, 1]", "line 5: seeds: expected at least two different seeds"),
        ("stack: 3", "stack: 0", "line 6: stack: expected greater than or equal to 1, found 0"),
        ("stack: 3", "stock: 3", "line 6: stock: unknown field. Known are name, .*training"),
        ("[none, weights]", "[none, wheights]", "line 7: measure.methods: expected one of none, weights"),
        ("name: tiny", "nome: tiny", "name: is missing"),
        ("data: {name: digits, statistics: 200, train: 200}", "pairs: all", "data: is missing"),
        ("stack: 3", "seeds: 2", "line 6: 'seeds' occurs twice"),
        ("[none, weights]", "[none, weights]]", "not valid YAML"),
    ],
)
def test_faults_name_line_field_and_what_is_allowed(old: str, new: str, expected: str) -> None:
    assert old in TINY
    with pytest.raises(StudyError, match=expected):
        tiny(TINY.replace(old, new))


def test_all_faults_are_listed_at_once_and_only_once() -> None:
    text = fault(TINY.replace("epochs: 2", "epoch: 2").replace("width: 12", "width: -1"))
    assert len(text.splitlines()) == 2


def test_what_is_no_mapping() -> None:
    assert "expected fields such as name" in fault("- 1\n")
    assert "expected fields such as name" in fault("")


def test_files_and_presets(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(TINY, encoding="utf-8")
    assert read_study(path).name == "tiny"
    assert read_study(path).text == TINY
    with pytest.raises(StudyError, match=r"no such study file, nor a preset.*paper-mnist"):
        read_study("papermnist")


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_can_be_planned(name: str) -> None:
    study = read_study(name)
    assert study.name == name
    assert study.description
    facts = NetworkFacts(stackable=True, operations=1e6, refreshable=True)
    plan = plan_study(study, lambda data, split: f"{data} {split}", lambda variant: facts, "float32")
    assert {u.kind for u in plan.units} >= {"train", "measure"}


def test_addresses_depend_on_the_content_alone() -> None:
    assert address_of({"a": 1, "b": [2.5]}) == address_of({"b": [2.5], "a": 1})
    assert address_of({"a": 1}) != address_of({"a": 2})
    assert address_of({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_a_plan_has_what_a_unit_needs_before_it_and_stacks_within_one_architecture() -> None:
    study = tiny(TINY.replace("width: 12", "width: [4, 8]").replace("dimension: false", "dimension: true"))
    plan = make_plan(study, None)
    seen: set[str] = set()
    for unit in plan.units:
        assert seen.issuperset(unit.needs)
        seen.add(unit.address)
    kinds = [u.kind for u in plan.units]
    assert {k: kinds.count(k) for k in set(kinds)} == {"train": 6, "measure": 8, "dimension": 16}
    assert [len(u.content["networks"]) for u in plan.units if u.kind == "train"] == [3, 3, 2] * 2
    # Results appear while training goes on.
    assert kinds.index("measure") < len(kinds) - 1 - kinds[::-1].index("train")


def test_expected_work_goes_with_the_size_of_the_network() -> None:
    plan = make_plan(tiny(TINY.replace("width: 12", "width: [4, 4000]")), None)
    for kind in ("train", "measure"):
        costs = {u.content["network"]["width"]: u.cost for u in plan.units if u.kind == kind}
        forward = {w: 2 * (64 * w + w * w + 10 * w) for w in (4, 4000)}
        assert costs[4000] / costs[4] == pytest.approx((forward[4000] + 2e5) / (forward[4] + 2e5))


@pytest.mark.parametrize(("family", "lines"), [("vgg16", 1), ("vgg16_bn", 2)])
def test_lines_that_are_measured_once_are_expected_once(family: str, lines: int) -> None:
    study = tiny(
        read_study("cifar10-vgg-cpu").text.replace("[vgg16, vgg16_bn]", family).replace("auto", "float32")
    )
    facts = NetworkFacts(stackable=False, operations=8e5, refreshable=family == "vgg16_bn")
    plan = plan_study(study, lambda data, split: f"{data} {split}", lambda variant: facts, "float32")
    methods = len(study.measure.methods)
    (cost,) = [u.cost for u in plan.units if u.kind == "measure"]
    assert cost == pytest.approx(2 * methods * lines * study.measure.points / 11)


def test_a_plan_is_made_from_shapes_alone() -> None:
    """The hidden layer of this network would fill terabytes."""
    plan = make_plan(tiny(TINY.replace("width: 12, depth: 2", "width: 10_000_000_000, depth: 1")), None)
    assert plan.units


def test_more_seeds_keep_the_addresses_of_full_stacks() -> None:
    study = TINY.replace("stack: 3", "stack: 2").replace("[0.01, 0.1]", "0.1")
    few, many = (make_plan(tiny(study.replace("seeds: 4", f"seeds: {n}")), None) for n in (2, 4))
    assert {u.address for u in few.units} < {u.address for u in many.units}


def test_methods_may_say_what_acts_on_units() -> None:
    text = "name: s\ndata: {name: digits}\nmeasure:\n  methods: [none, weights+norms, correlation+line]\n"
    assert parse_study(text).measure.methods == ("none", "weights+norms", "correlation+line")
    with pytest.raises(StudyError, match=r"measure.methods: .*'all'.* after a plus sign"):
        parse_study(text.replace("weights+norms", "weights+mirrors"))
