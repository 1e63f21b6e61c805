"""Random programs: what discovery claims is checked by means of the test's own, and damage to a spec is noticed.

Nothing of the library is used to judge it but the JSON text of a spec: relabelling, running, looking into outputs and
comparing are written here a second time, in the plainest way.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from programs import BATCH, Program
from torch import Tensor, nn

from isthmus.symmetry import SymmetrySpec, discover, verify

TOLERANCE = 1e-8


def inputs_of(program: Program) -> dict[str, Tensor]:
    """Return random inputs, and inputs that make ties: dead, saturated, rounded away, equal."""
    x = program.inputs().double()
    return {
        "random": x,
        "zeros": torch.zeros_like(x),
        "ones": torch.ones_like(x),
        "negative": -20 * x.abs(),
        "positive": 20 * x.abs(),
        "large": 20 * x,
        "small": 1e-3 * x,
        "signs": x.sign(),
        "alike": x[:1].expand(BATCH, -1).clone(),
    }


def leaves(output: Any) -> Iterator[Tensor]:
    """Yield all tensors of an output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from leaves(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from leaves(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from leaves(getattr(output, field.name))


def places(index: Mapping[str, Any], size: int) -> list[list[int]]:
    """Return the positions of every unit, in the order of its copies."""
    copies = [[k * stride for k in range(number)] for number, stride in index["copies"]]
    return [
        [index["offset"] + unit * index["stride"] + sum(more) for more in itertools.product(*copies)]
        for unit in range(size)
    ]


def relabelled(
    spec: Mapping[str, Any], orders: Mapping[str, list[int]], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Apply a relabelling read off the JSON of a spec, group by group, outer ones first, entry by entry of an axis."""
    moved = {name: value.numpy().copy() for name, value in state.items()}
    for group in spec["groups"]:
        for slot in group["slots"]:
            array = moved[slot["tensor"]]
            where = [list(range(n)) for n in array.shape]
            for block in slot.get("block", ()):
                where[block["axis"]] = [p for unit in places(block, 1) for p in unit]
            source, target = [list(w) for w in where], [list(w) for w in where]
            at = places(slot, group["size"])
            target[slot["axis"]] = [p for unit in at for p in unit]
            source[slot["axis"]] = [p for unit in orders[group["name"]] for p in at[unit]]
            array[np.ix_(*target)] = array[np.ix_(*source)].copy()
    return {name: torch.from_numpy(value) for name, value in moved.items()}


Element = tuple[list[int], np.ndarray]
"""The order of the units with a factor for each, or a matrix: what acts on the units of a group."""


def element(acts: str, size: int, dice: np.random.Generator) -> Element:
    """Return a random element of a class of the JSON text."""
    order = [int(k) for k in dice.permutation(size)]
    if acts in ("permutation", "signed", "positive", "monomial"):
        factors = np.ones(size)
        if acts in ("signed", "monomial"):
            factors = factors * dice.choice([-1.0, 1.0], size)
        if acts in ("positive", "monomial"):
            factors = factors * np.exp(dice.uniform(-0.8, 0.8, size))
        return order, factors
    matrix = np.linalg.qr(dice.normal(size=(size, size)))[0]
    if acts == "mean-fixing":  # a rotation of what is orthogonal to the mean, written in a basis of it
        basis = np.linalg.qr(np.column_stack([np.ones(size), np.eye(size)[:, 1:]]))[0]
        inner = np.eye(size)
        inner[1:, 1:] = np.linalg.qr(dice.normal(size=(size - 1, size - 1)))[0]
        matrix = basis @ inner @ basis.T
    if acts == "general":
        matrix = (
            matrix
            @ np.diag(np.exp(dice.uniform(-0.8, 0.8, size)))
            @ np.linalg.qr(dice.normal(size=(size, size)))[0]
        )
    return order, matrix


def acted_on(
    spec: Mapping[str, Any], elements: Mapping[str, Element], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Let elements act on a state as the classes and powers of the JSON say, group by group, outer ones first."""
    moved = {name: value.numpy().copy() for name, value in state.items()}
    for group in spec["groups"]:
        order, values = elements[group["name"]]
        for slot in group["slots"]:
            power, array = slot.get("power"), moved[slot["tensor"]]
            if values.ndim == 2 and power is None:
                continue  # known to hold ones or zeros
            where = [list(range(n)) for n in array.shape]
            for block in slot.get("block", ()):
                where[block["axis"]] = [p for unit in places(block, 1) for p in unit]
            at = places(slot, group["size"])
            where[slot["axis"]] = [p for unit in at for p in unit]
            taken = np.moveaxis(array[np.ix_(*where)], slot["axis"], 0)
            units = taken.reshape(group["size"], -1)
            if values.ndim == 2:
                units = (values if power == 1 else np.linalg.inv(values).T) @ units
            else:
                units = units[order]
                if power:
                    units = units * (values**power)[:, None]
            array[np.ix_(*where)] = np.moveaxis(units.reshape(taken.shape), 0, slot["axis"])
    return {name: torch.from_numpy(value) for name, value in moved.items()}


def run(model: nn.Module, state: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [v.clone() for v in leaves(torch.func.functional_call(model, dict(state), (x,)))]


def differ(one: list[Tensor], two: list[Tensor]) -> bool:
    """Return whether outputs differ by more than rounding."""
    for a, b in zip(one, two, strict=True):
        a, b = (
            a.double().nan_to_num(posinf=1e300, neginf=-1e300),
            b.double().nan_to_num(posinf=1e300, neginf=-1e300),
        )
        if float((a - b).abs().max()) > TOLERANCE * max(1.0, float(a.abs().max())):
            return True
    return False


def changed_on(
    model: nn.Module, spec: SymmetrySpec, inputs: Mapping[str, Tensor], seed: int, *, classes: bool = False
) -> list[str]:
    """Return the inputs on which a random relabelling, or a random element of the classes, changes what is returned.

    What moves as much when the state is changed by rounding is chance and says nothing about the spec.
    """
    text = json.loads(spec.to_json())
    dice = random.Random(seed)
    orders = {g["name"]: dice.sample(range(g["size"]), g["size"]) for g in text["groups"]}
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if classes:
        source = np.random.default_rng(seed)
        elements = {
            g["name"]: element(g.get("acts", "permutation"), g["size"], source) for g in text["groups"]
        }
        moved = acted_on(text, elements, state)
    else:
        moved = relabelled(text, orders, state)
    noise = torch.Generator().manual_seed(seed)
    close = {
        k: v * (1 + 1e-13 * torch.rand(v.shape, generator=noise, dtype=torch.float64))
        if v.is_floating_point()
        else v
        for k, v in state.items()
    }
    found: list[str] = []
    for name, x in inputs.items():
        reference = run(model, state, x)
        if differ(reference, run(model, moved, x)) and not differ(reference, run(model, close, x)):
            found.append(name)
    return found


def drawn(seed: int) -> tuple[Program, SymmetrySpec]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its exporter
        program = Program(seed)
        return program.double(), discover(program.float(), program.inputs())


def wrong(seeds: range) -> tuple[list[str], int, Counter[str]]:
    """Return the programs whose spec is wrong, how many groups there were, and how many of each class."""
    found: list[str] = []
    groups = 0
    classes: Counter[str] = Counter()
    for seed in seeds:
        program, spec = drawn(seed)
        groups += len(spec.groups)
        classes.update(str(group.acts) for group in spec.groups.values())
        on = changed_on(program.double(), spec, inputs_of(program), seed)
        if spec.larger:
            on += [
                f"{x} (classes)" for x in changed_on(program, spec, inputs_of(program), seed, classes=True)
            ]
        if on:
            found.append(f"seed {seed}, on {on}: {'; '.join(program.listing)}\n{spec}")
    return found, groups, classes


def damaged(spec: SymmetrySpec, dice: random.Random) -> SymmetrySpec | None:
    """Return the spec of somebody who overlooked a slot, or believed a pinned axis to be free."""
    data = json.loads(spec.to_json())
    several = [g for g in data["groups"] if len(g["slots"]) > 1 and g["size"] > 1]
    pinned = [p for p in data["pinned"] if p["size"] == data["shapes"][p["tensor"]][p["axis"]] > 1]
    if several and (dice.random() < 0.5 or not pinned):
        slots = dice.choice(several)["slots"]
        slots.remove(dice.choice(slots))
    elif pinned:
        axis = dice.choice(pinned)
        slot = {"tensor": axis["tensor"], "axis": axis["axis"], "offset": 0, "stride": 1, "copies": []}
        data["groups"].append({"name": "freed", "size": axis["size"], "slots": [slot]})
    else:
        return None
    return SymmetrySpec.from_json(json.dumps(data))


def enlarged(spec: SymmetrySpec, dice: random.Random) -> SymmetrySpec | None:
    """Return the spec of somebody who believed that a larger class acts on the units of a group."""
    data = json.loads(spec.to_json())
    larger = {
        "signed": "monomial",
        "positive": "monomial",
        "mean-fixing": "orthogonal",
        "orthogonal": "general",
    }
    several = [g for g in data["groups"] if g.get("acts") in larger and g["size"] > 1]
    if not several:
        return None
    group = dice.choice(several)
    group["acts"] = larger[group["acts"]]
    return SymmetrySpec.from_json(json.dumps(data))


def notice(seeds: range) -> tuple[int, int, list[str]]:
    """Damage the spec of each program; return how many damages change the function, how many pass, and which."""
    changing = 0
    passed: list[str] = []
    for seed in seeds:
        program, spec = drawn(seed)
        x = program.inputs()
        worse = damaged(spec, random.Random(seed))
        if worse is None or not changed_on(program.double(), worse, inputs_of(program), seed):
            continue
        changing += 1
        if verify(worse, program.float(), x, generator=torch.Generator().manual_seed(seed)).passed:
            passed.append(f"seed {seed}: {'; '.join(program.listing)}")
    return changing, len(passed), passed


def test_programs_are_varied_and_repeat_themselves() -> None:
    assert len({Program(seed).listing[1] for seed in range(40)}) > 15
    one, two = Program(7), Program(7)
    assert one.listing == two.listing
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


def test_nothing_claimed_of_random_programs_is_wrong() -> None:
    found, groups, classes = wrong(range(12))
    assert not found, "\n".join(found)
    assert groups > 40
    assert sum(classes.values()) - classes["permutation"] > 8, classes


def test_the_judge_finds_classes_that_are_too_large() -> None:
    """The comparison under random elements can fail, and does where a class is one step too large."""
    tried = noticed = 0
    for seed in range(24):
        program, spec = drawn(seed)
        worse = enlarged(spec, random.Random(seed))
        if worse is not None:
            tried += 1
            noticed += bool(changed_on(program.double(), worse, inputs_of(program), seed, classes=True))
    assert tried >= 3
    assert noticed >= 0.6 * tried, (noticed, tried)


def test_the_judge_finds_damage() -> None:
    """The comparison itself can fail, and verification notices what it finds."""
    changing, passed, which = notice(range(1000, 1008))
    assert changing >= 5
    assert not passed, which


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", [pytest.param(s, marks=pytest.mark.huge) if s >= 1500 else s for s in range(0, 3000, 250)]
)
def test_nothing_claimed_of_many_random_programs_is_wrong(start: int) -> None:
    found, _, _ = wrong(range(start, start + 250))
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_nearly_all_damage_is_noticed() -> None:
    changing, passed, which = notice(range(1000, 1300))
    assert passed <= 0.02 * changing, which
