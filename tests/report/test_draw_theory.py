"""The figures of the theory: every kind draws real records, in colours and in grey, and refuses other data."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest

from isthmus.errors import DataError, MissingExtraError
from isthmus.report import THEORY_PICTURES, draw_theory
from isthmus.report._theory_clouds import level_of

SIZES, MEANS = [8, 16, 32], [2.0, 1.5, 1.1]
FIT = {
    "slope": -0.4,
    "slope_error": 0.1,
    "local_slopes": [-0.41, -0.44],
    "dim_asymptotic": 5.0,
    "dim_calibrated": None,
}


def tower(height: int, value: float) -> dict[str, Any]:
    return {"height": height, "value": value, "text": "10^" * height + f"{value:g}"}


def width_data(depth: int = 3) -> dict[str, Any]:
    towers = [tower(0, 6.6e10), tower(1, 6.6e9), tower(2, 6.6e9), tower(3, 6.6e9)]
    rows = [{"depth": k + 1, "fixed_t": towers[k], "sup_t": towers[k]} for k in range(depth)]
    curves = {k: [3.0, 2.0] for k in ("fixed_t", "sup_t", "necessary", "entezari")}
    return {
        "input_dimension": 5,
        "depth": depth,
        "epsilon": 0.1,
        "layers": [{"fixed_t": t, "sup_t": t} for t in towers[:depth]],
        "against_epsilon": {"epsilon": [0.01, 0.1], **curves},
        "against_depth": rows,
    }


def rate_data(law: str = "gaussian", noise: float | None = None) -> dict[str, Any]:
    return {
        "law": law,
        "dimension": 8,
        "signal": 3 if law == "low-dim" else None,
        "noise": noise,
        "sizes": SIZES,
        "means": MEANS,
        "errors": [0.1, None, 0.05],
        "lower": [0.5, 0.4, 0.3],
        "nearest": [1.5, 1.2, 0.9] if law == "gaussian" else None,
        "upper": [16.0, 15.0, 14.0],
        "trivial": 16.0,
        "floor": 0.1 if law == "low-dim" else None,
        "fit": FIT,
    }


def dimension_data(layers: int = 2) -> dict[str, Any]:
    entry = {
        "rows": 64,
        "features": 10,
        "sizes": SIZES,
        "means": MEANS,
        "fit": FIT,
        "approximate": 4.0,
        "approximate_centred": 4.5,
    }
    return {"layers": [{"name": f"layers.{k}", **entry} for k in range(layers)]}


def certificate(segments: int, rise: bool = True) -> dict[str, Any]:
    ts = np.linspace(0, 1, segments + 1).tolist()
    curve = (np.sin(np.pi * np.array(ts)) * 0.4).tolist()
    steps = [1.0 / segments + 0.4] * segments
    envelope = {"ts": ts, "error": curve, "error_bound": steps}
    envelope |= {"rise": curve if rise else None, "rise_bound": steps if rise else None}
    return {"segments": segments, "ratio": 1.1, "envelope": envelope}


def benchmark_data() -> dict[str, Any]:
    rows = [
        {"network": n, "segments": k, "ratio": 1 + 3 / k, "barrier_bound": 1 / k, "barrier_grid": grid}
        for n, grid in (("MLP", 0.1), ("CNN", 0.0))
        for k in (1, 4, 16)
    ]
    costs = [
        {
            "width": w,
            "examples": 100,
            "segments": 4,
            "seconds": w / 10,
            "cpu_seconds": w / 12,
            "peak_mib": 300 + w,
            "grown_mib": w,
        }
        for w in (8, 16)
    ]
    return {"rows": rows, "costs": costs}


def mean_field_data(extra: bool = True) -> dict[str, Any]:
    values = [[0.3, 0.2], [0.1, 0.15], [0.05, 0.06]]
    return {
        "widths": SIZES,
        "parameters": 4,
        "inputs": 2,
        **dict.fromkeys(("sup_error", "w2", "bound", "unmatched"), values),
        "slopes": {"sup_error": -0.7, "w2": None},
        "floor_width": 32,
        "floor": [{"step": 0.2, "runs": 0.1, "subsamples": 0.08, "ratio": 1.25}] if extra else [],
        "delta": 0.34,
        "n_min": (
            [{"error": 0.1, "fails": 0, "enough": 8}, {"error": 0.01, "fails": 64, "enough": None}]
            if extra
            else []
        ),
    }


def dropout_data() -> dict[str, Any]:
    names = ("line", "half", "bernoulli", "matched", "w2")
    slopes = {**dict.fromkeys(names, -0.5), "matched": None}
    return {"inputs": 8, "widths": SIZES, **{key: [0.3, 0.2, 0.1] for key in names}, "slopes": slopes}


def approximate_data() -> dict[str, Any]:
    keys = [k + s for k in ("naive", "covariance", "activations") for s in ("", "_centred")]
    return {
        "width": 8,
        "networks": [
            {"learning_rate": e, "error": e, "barrier": e / 10, **dict.fromkeys(keys, 5.0 + e)}
            for e in (0.3, 0.1, 0.2)
        ],
    }


def independence_data() -> dict[str, Any]:
    numbers = {"ratio": 1.1, "ratio_low": 1.0, "ratio_high": 1.2, "networks": 0.5, "initial": 0.9}
    numbers |= {"splits_low": 0.98, "splits_high": 1.02}
    rows = [{"layer": f"layer {k}", "width": w, **numbers} for k in (1, 2) for w in (8, 16)]
    return {"layers": rows}


def bounds_data() -> dict[str, Any]:
    names = ("measured", "chain_64", "chain_16", "chain_1", "weights_only")
    names += ("barrier_64", "lipschitz_64", "barrier_16", "barrier_1", "lipschitz_weights")
    row = {name: 1.0 + k for k, name in enumerate(names)}
    return {
        "networks": [{"network": "1×8", "barrier": 0.0, **row}, {"network": "2×8", "barrier": 0.2, **row}]
    }


def lines_data() -> dict[str, Any]:
    lines = [
        {"width": w, "ts": [0, 0.5, 1], "plain": [0.1, 2.0, 0.1], "aligned": [0.1, 0.2, 0.1]} for w in (8, 16)
    ]
    return {"lines": lines}


def samples() -> list[Any]:
    low = [rate_data("low-dim", noise) for noise in (0.0, 0.1)]
    low[0]["floor"] = 0.0
    certificates = {"certificates": [certificate(16), certificate(1)]}
    quiet = {"certificates": [certificate(1, rise=False)]}
    return [
        pytest.param("width", width_data(), id="width"),
        pytest.param("width", width_data(1), id="width-one-layer"),
        pytest.param("rate", rate_data(), id="rate"),
        pytest.param("rate", {**rate_data("uniform"), "fit": None}, id="rate-without-fit"),
        pytest.param("rate", low[1], id="rate-low-dim"),
        pytest.param("rates", {"records": [rate_data(), rate_data("uniform")]}, id="rates"),
        pytest.param("two_regimes", {"records": low}, id="two-regimes"),
        pytest.param("dimension", dimension_data(), id="dimension"),
        pytest.param("dimension", dimension_data(9), id="dimension-many-layers"),
        pytest.param("certificate", certificates, id="certificate"),
        pytest.param("certificate", quiet, id="certificate-without-loss"),
        pytest.param("certificate_ratio", benchmark_data(), id="certificate-ratio"),
        pytest.param("certificate_cost", benchmark_data(), id="certificate-cost"),
        pytest.param("meanfield", mean_field_data(), id="meanfield"),
        pytest.param("meanfield", mean_field_data(extra=False), id="meanfield-plain"),
        pytest.param("dropout", dropout_data(), id="dropout"),
        pytest.param("approximate_dimension", approximate_data(), id="approximate"),
        pytest.param("independence", independence_data(), id="independence"),
        pytest.param("bounds", bounds_data(), id="bounds"),
        pytest.param("lines", lines_data(), id="lines"),
    ]


def pixels(png: bytes) -> np.ndarray:
    image = pytest.importorskip("matplotlib.image")
    return image.imread(io.BytesIO(png))


def test_every_kind_is_tested() -> None:
    assert {sample.values[0] for sample in samples()} == set(THEORY_PICTURES)


@pytest.mark.parametrize(("kind", "data"), samples())
def test_a_record_becomes_a_png_and_an_svg(kind: str, data: dict[str, Any]) -> None:
    picture = draw_theory(kind, data)
    image = pixels(picture.png)
    assert image.shape[1] >= 480
    assert 0.005 < float((image[..., :3].min(axis=2) < 0.9).mean()) < 0.5  # something is drawn on white
    assert b"<svg" in picture.svg[:1000]
    assert b"<text" in picture.svg  # text stays text
    assert len(picture.alt) > 20
    assert "nan" not in picture.alt


def test_the_same_record_gives_the_same_files() -> None:
    one, two = draw_theory("dropout", dropout_data()), draw_theory("dropout", dropout_data())
    assert one == two


def test_curves_differ_in_grey() -> None:
    """Markers and dashes differ, so that no two legend entries rely on colour alone."""
    svg = draw_theory("width", width_data()).svg.decode()
    dashes = {part.split(";")[0].split('"')[0] for part in svg.split("stroke-dasharray: ")[1:]}
    assert len(dashes) >= 3


@pytest.mark.parametrize(
    ("height", "value", "level"),
    [(0, 1.0, 0.0), (0, 10.0, 1.0), (0, 1e10, 2.0), (1, 10.0, 2.0), (2, 1.0, 2.0), (0, 0.5, -0.5)],
)
def test_levels_count_logarithms(height: int, value: float, level: float) -> None:
    assert level_of({"height": height, "value": value}) == pytest.approx(level)


def test_towers_stay_readable() -> None:
    svg = draw_theory("width", width_data(4)).svg.decode()
    assert "e+" not in svg


def test_unknown_kinds_and_foreign_records_are_refused() -> None:
    with pytest.raises(DataError, match="expected a kind among width, rate"):
        draw_theory("pie", {})
    with pytest.raises(DataError, match=r"no 'dropout' record \(KeyError: 'widths'\)"):
        draw_theory("dropout", {})
    with pytest.raises(DataError, match="no 'lines' record"):
        draw_theory("lines", {"lines": []})


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r'pip install "isthmus\[report\]"'):
        draw_theory("dropout", dropout_data())
