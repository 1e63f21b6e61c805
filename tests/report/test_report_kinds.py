"""Reports of what is more than a permutation: every kind has its picture, and the page says what acts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from report_samples import make_record

from isthmus.errors import CheckpointError
from isthmus.report import check_record
from isthmus.report._draw_relabelling import relabelling_picture
from isthmus.report._moved_group import moved_groups
from isthmus.report._page import page
from isthmus.report._panels import render
from isthmus.report._record import check_arrays

RING = np.array([1, 2, 0])
NAME = "weights"


def kinds() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a record of five groups and a pair of heads, each moved by another kind, with arrays."""
    record, rng = make_record((3,) * 8), np.random.default_rng(0)
    names = [group["name"] for group in record["symmetry"]["groups"]]
    signs, scales, both, turned, mapped, heads, *inner = names
    for unit in range(len(inner)):
        record["symmetry"]["groups"][6 + unit]["block"] = {"group": heads, "unit": unit, "family": "values"}
    record["symmetry"]["groups"][0]["acts"] = "signs"
    arrays = {f"similarity/{name}": rng.uniform(-1, 1, (3, 3)) for name in names}
    arrays |= {f"permutation/{NAME}/{name}": RING for name in (signs, scales, both, heads)}
    arrays[f"factors/{NAME}/{signs}"] = np.array([1.0, -1.0, -1.0])
    arrays[f"factors/{NAME}/{scales}"] = np.array([0.5, 1.0, 2.0])
    arrays[f"factors/{NAME}/{both}"] = np.array([-0.5, 1.0, 3.0])
    arrays |= {f"after/{NAME}/{name}": rng.uniform(-1, 1, (3, 3)) for name in (turned, mapped, *inner)}
    arrays |= {f"spectrum/{NAME}/{name}": np.array([3.0, 1.0, 0.5]) for name in (mapped, *inner)}
    return record, arrays


def test_groups_are_what_the_arrays_say() -> None:
    record, arrays = kinds()
    clean = check_record(record)
    found = moved_groups(clean, check_arrays(clean, arrays), NAME)
    assert [group.kind for group in found.values()] == [
        "signs",
        "scales",
        "signs and scales",
        "rotation",
        "invertible map",
        "permutation",
        "invertible map",
        "invertible map",
    ]
    signs = found["layers.0"]
    before = arrays["similarity/layers.0"]
    assert np.array_equal(signs.after, before[:, RING] * [1, -1, -1])
    assert signs.flipped == 2
    assert signs.means == pytest.approx((np.trace(before) / 3, np.trace(signs.after) / 3))
    assert np.array_equal(found["layers.3"].after, arrays[f"after/{NAME}/layers.3"])
    assert not moved_groups(clean, check_arrays(clean, arrays), "none")


def test_every_kind_has_a_panel_of_its_own_and_heads_share_one() -> None:
    record, arrays = kinds()
    clean = check_record(record)
    picture = relabelling_picture(clean, check_arrays(clean, arrays), NAME)
    assert picture is not None
    said = [panel.alt for panel in picture.panels]
    assert len(said) == 6
    for words, alt in zip(
        (
            "What acts is signs. 2 of the units flipped.",
            "What acts is scales. Factors from 0.5 to 2.",
            "What acts is signs and scales. 1 of the units flipped. Factors from 0.5 to 3.",
            "What acts is a rotation.",
            "What acts is an invertible map. Singular values from 0.5 to 3.",
            "Dot chart for the 2 blocks of group layers.5, whose members move by invertible map.",
        ),
        said,
        strict=True,
    ):
        assert words in alt
    for words in (
        "from −1 to 1, red for positive",
        "The histogram shows",
        "Singular values of a map",
        "Blocks (heads)",
    ):
        assert words in picture.caption
    assert "drawn as 0" not in picture.caption


def texts(figure: Any) -> set[str]:
    return {t.get_text() for t in figure.findobj(lambda artist: hasattr(artist, "get_text"))}


def test_panels_are_drawn_with_labels_for_what_they_show() -> None:
    from matplotlib.figure import Figure

    record, arrays = kinds()
    clean = check_record(record)
    picture = relabelling_picture(clean, check_arrays(clean, arrays), NAME)
    assert picture is not None
    drawn = []
    for panel in picture.panels:
        figure = Figure(layout="constrained")
        panel.draw(figure)
        drawn.append(texts(figure))
    signs, scales, both, turned, mapped, heads = drawn
    assert {"layers.0: 3 units, 2 flipped", "units of A", "correlation"} <= signs
    assert "factor (log scale)" in scales & both
    assert "factor (log scale)" not in signs | turned | mapped
    assert {"layers.3: 3 dimensions, rotation", "dimensions of A"} <= turned
    assert "singular value" in mapped
    assert {"0 ← 1", "1 ← 2", "values"} <= heads


def test_a_single_unit_and_equal_factors_are_drawn() -> None:
    record = make_record((1, 2))
    arrays = {
        "similarity/layers.0": np.array([[np.nan]]),
        f"permutation/{NAME}/layers.0": np.array([0]),
        f"factors/{NAME}/layers.0": np.array([-2.0]),
        "similarity/layers.1": np.eye(2),
        f"after/{NAME}/layers.1": np.eye(2),
        f"spectrum/{NAME}/layers.1": np.array([1.0, 1.0]),
    }
    clean = check_record(record)
    picture = relabelling_picture(clean, check_arrays(clean, arrays), NAME)
    assert picture is not None
    assert all(render(panel).std() > 0 for panel in picture.panels)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "factors/weights/layers.0",
            np.array([1.0, 0.0, 1.0]),
            r"finite and not zero of shape \(3,\) at array 'factors",
        ),
        ("factors/weights/layers.0", np.array([1.0, np.inf, 1.0]), "finite and not zero of shape"),
        ("factors/weights/layers.0", np.array([1.0]), "finite and not zero of shape"),
        ("factors/nothing/layers.0", np.ones(3), "a method among"),
        ("spectrum/weights/layers.0", np.array([1.0, -1.0, 1.0]), r"positive numbers of shape \(3,\)"),
        ("after/weights/layers.9", np.eye(3), "a group among"),
        ("after/weights/layers.0", np.eye(2), r"of shape \(3, 3\) at array 'after"),
    ],
)
def test_arrays_that_do_not_fit_are_named(name: str, values: np.ndarray, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_arrays(check_record(make_record((3,))), {name: values})


def test_the_page_says_what_acts() -> None:
    record, _ = kinds()
    coupling = {
        "kind": "signs and scales",
        "units": 3,
        "moved": 2,
        "flipped": 1,
        "factors": [0.5, 1.0, 2.0],
        "condition": None,
        "similarity": [-0.1, 0.9],
        "text": "",
    }
    mixed = {
        **coupling,
        "moved": None,
        "flipped": None,
        "factors": None,
        "condition": 2.5,
        "similarity": None,
    }
    record["methods"]["weights, all"] = {
        **record["methods"]["weights"],
        "couplings": {"layers.0": coupling, "layers.1": mixed},
    }
    text = page(check_record(record), [])
    assert "3 units, 2 moved, 1 flipped, factors 0.5 to 2, median 1" in text
    assert "3 dimensions, condition number 2.5" in text
    assert "−0.10 → 0.90" in text
    assert "weights, both sides (all)" in text
    assert "and of 1 more may act on the units than permutations" in text
    plain = page(check_record(make_record((3,))), [])
    assert "more than permutations may act" not in plain
    assert "what may act" not in plain
    for key, values in (("factors", [1.0]), ("similarity", [1.0])):
        record["methods"]["weights, all"]["couplings"]["layers.0"] = {**coupling, key: values}
        with pytest.raises(
            CheckpointError, match=rf"numbers at methods.weights, all.couplings.layers.0.{key}"
        ):
            check_record(record)


@pytest.mark.filterwarnings("ignore:On 'train':isthmus.errors.IsthmusWarning")  # untrained, at chance
def test_a_comparison_by_all_classes_holds_what_a_report_shows() -> None:
    """A head's maps, a nested order and signs, from networks to files: what is after is what B relabelled shows."""
    import torch

    from isthmus.couplings import Permutation
    from isthmus.states import state_of
    from isthmus.study import compare
    from isthmus.symmetry import Relabelling, discover, drawn_elements
    from isthmus.testing import llama, randomise_state

    def source(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    model = randomise_state(llama(11, 8, 1, 2, kv_heads=2, hidden=6), source(0)).eval()
    tokens = torch.randint(0, 11, (16, 5), generator=source(1))
    spec = discover(model, tokens[:2])
    (truth,) = drawn_elements(spec, source(3), 1)
    truth = {**truth, "blocks.0.query": Permutation(torch.tensor([1, 0]))}
    other = llama(11, 8, 1, 2, kv_heads=2, hidden=6).eval()
    other.load_state_dict(Relabelling(spec, truth).inverse().apply(state_of(model)))
    data = [(tokens, tokens.roll(-1, 1))]
    found = compare(
        model,
        other,
        data,
        {"train": data},
        name="llama",
        settings={},
        methods=["weights"],
        symmetries=("permutations", "all"),
        points=2,
    )
    assert list(found.record["methods"]) == ["none", "weights", "weights, all"]
    assert found.record["methods"]["weights, all"]["barrier"] < 1e-3
    assert "couplings" not in found.record["methods"]["weights"]
    after = {k: v for k, v in found.arrays.items() if k.startswith("after/weights, all/")}
    assert after
    for name, values in after.items():
        assert np.nanmin(np.diagonal(values)) > 0.999, name
    texts_of = {g: c["text"] for g, c in found.record["methods"]["weights, all"]["couplings"].items()}
    assert any("flipped" in text for text in texts_of.values())
    assert any("invertible map, 4 dimensions" in text for text in texts_of.values())
    clean = check_record(found.record)
    groups = moved_groups(clean, check_arrays(clean, found.arrays), "weights, all")
    assert {"signs", "invertible map"} <= {group.kind for group in groups.values()}
