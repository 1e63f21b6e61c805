"""The theory commands: tables, JSON, figures, and clear errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from isthmus.checkpoints import save_state
from isthmus.testing import mlp

Cli = Callable[..., "object"]

PAIR = ("a.safetensors", "b.pt", "--model", "mynet:build", "--data", "mynet:batches")


def test_help_lists_the_theory_commands(isthmus: Cli) -> None:
    result = isthmus("theory", "--help")
    assert result.code == 0
    for command in ("width", "rate", "dimension", "certify", "meanfield", "dropout"):
        assert command in result.out


def files(folder: Path, kind: str, record: object) -> None:
    """Check the files of a command: the printed JSON, a PNG and an SVG."""
    assert json.loads((folder / f"{kind}.json").read_text("utf-8")) == record
    assert (folder / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (folder / f"{kind}.svg").read_bytes()[:1000]
    assert len(list(folder.iterdir())) == 3  # no temporary file is left


def test_width_gives_the_reference_values(isthmus: Cli, tmp_path: Path) -> None:
    result = isthmus(
        "theory", "width", "--inputs", "784", "--depth", "1", "--eps", "0.1", "--json", "--out", tmp_path
    )
    assert result.code == 0, result.err
    (layer,) = result.json["layers"]
    assert layer["fixed_t"]["value"] == pytest.approx(1274.2, abs=0.1)
    assert layer["sup_t"]["value"] == pytest.approx(1418.9, abs=0.1)
    assert result.json["necessary"] == pytest.approx(851.0, abs=0.1)
    assert result.json["entezari"] == pytest.approx(1572)
    files(tmp_path, "width", result.json)


def test_width_prints_towers(isthmus: Cli) -> None:
    result = isthmus("theory", "width", "--inputs", "5", "--depth", "3", "--eps", "0.5")
    assert result.code == 0
    assert "10^10^6.64" in result.out
    assert "Entezari" not in result.out  # one hidden layer only


def test_width_of_other_first_layers(isthmus: Cli) -> None:
    from isthmus.theory import layer_tolerance, log_width_low_dimension, log_width_sub_gaussian

    asked = ("theory", "width", "--inputs", "40", "--eps", "0.2", "--delta", "0.05")
    others = ("--proxy", "1.5", "--signal", "3", "--noise", "0.001")
    found = isthmus(*asked, *others, "--json").json
    for kind, sup_t in (("fixed_t", False), ("sup_t", True)):
        tau2 = layer_tolerance(1, 0.2, delta=0.05, sup_t=sup_t) ** 2
        wide = log_width_sub_gaussian(40, tau2, proxy=1.5)
        flat = log_width_low_dimension(3, 40, tau2, 0.001)
        assert found["sub_gaussian"][kind] == pytest.approx(wide / math.log(10))
        assert found["low_dimension"][kind] == pytest.approx(flat.log_width / math.log(10))
        assert found["low_dimension"]["regime"][kind] == flat.regime
    certain, plain = found["layers"][0]["sup_t"]["value"], isthmus(*asked[:-2], "--json").json
    assert certain > plain["layers"][0]["sup_t"]["value"]
    assert found["necessary"] == plain["necessary"]
    assert plain["sub_gaussian"] is None
    assert plain["low_dimension"] is None
    table = isthmus(*asked, *others).out
    assert "with probability 0.95" in table
    assert f"10^{found['sub_gaussian']['fixed_t']:.2f}" in table
    assert f"10^{found['low_dimension']['sup_t']:.2f}" in table
    assert isthmus(*asked[:-1], "0").code == 2


@pytest.mark.parametrize("law", ["gaussian", "uniform", "low-dim"])
def test_rate_lies_between_its_bounds(isthmus: Cli, tmp_path: Path, law: str) -> None:
    sizes = ("--sizes", "8,16,32", "--replicates", "12", "--dimension", "6")
    result = isthmus("theory", "rate", "--law", law, *sizes, "--json", "--out", tmp_path)
    assert result.code == 0, result.err
    record = result.json
    assert record["sizes"] == [8, 16, 32]
    for low, mean, high in zip(record["lower"], record["means"], record["upper"], strict=True):
        assert low < mean < high
    assert (record["nearest"] is None) == (law != "gaussian")
    assert (record["floor"] is None) == (law != "low-dim")
    files(tmp_path, "rate", record)
    table = isthmus("theory", "rate", "--law", law, *sizes)
    assert "slope" in table.out


def test_rate_with_one_size_has_no_slope(isthmus: Cli) -> None:
    result = isthmus("theory", "rate", "--sizes", "8", "--replicates", "1", "--json")
    assert result.code == 0
    assert result.json["fit"] is None
    assert result.json["errors"] == [None]


@pytest.mark.parametrize("how", [(), ("--model", "mynet:with_inputs")])
def test_dimension_of_a_checkpoint(isthmus: Cli, project: Path, how: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    save_state(project / "wide.pt", mlp(64, 40, 2, 10).state_dict())
    if how:
        how = ("--model", "mynet:build(width=40)", "--data", "mynet:batches")
    result = isthmus("theory", "dimension", "wide.pt", *how, "--json", "--replicates", "3", "--out", "found")
    assert result.code == 0, result.err
    names = [layer["name"] for layer in result.json["layers"]]
    # the head's units are outputs: with the network known, they are no layer of neurons
    assert names == (["layers.0.weight", "layers.1.weight"] + ([] if how else ["layers.2.weight"]))
    assert [layer["rows"] for layer in result.json["layers"]] == [40, 40] + ([] if how else [10])
    for layer in result.json["layers"]:
        assert layer["stable_rank"] <= layer["approximate"] <= layer["entropy_rank"] <= layer["features"]
    files(project / "found", "dimension", result.json)


def test_dimension_says_what_it_skipped(isthmus: Cli, project: Path) -> None:
    save_state(
        project / "narrow.pt",
        {"small": torch.randn(4, 3), "large": torch.randn(16, 3), "one": torch.ones(9, 2)},
    )
    result = isthmus("theory", "dimension", "narrow.pt")
    assert result.code == 0, result.err
    assert "Skipped (too few or equal neurons): small, one" in result.out
    save_state(project / "narrow.pt", {"small": torch.randn(4, 3)})
    result = isthmus("theory", "dimension", "narrow.pt")
    assert result.code == 2
    assert "at least one layer of 8 different neurons" in result.err


def test_certify_halves_segments_for_a_target(isthmus: Cli, project: Path) -> None:
    result = isthmus(
        "theory", "certify", *PAIR, "--segments", "2", "--target", "1.1", "--json", "--out", "near"
    )
    assert result.code == 0, result.err
    first, last = result.json["certificates"]
    assert first["segments"] == 2 < last["segments"]
    assert last["ratio"] <= 1.1 < first["ratio"]
    assert last["lmc_error"] < first["lmc_error"]
    files(project / "near", "certificate", result.json)
    refused = isthmus("theory", "certify", *PAIR, "--target", "0.9")
    assert refused.code == 2
    assert "must be above 1, found 0.9" in refused.err


def test_certify_proves_more_with_more_segments(isthmus: Cli, project: Path) -> None:
    result = isthmus("theory", "certify", *PAIR, "--segments", "1,4,8", "--json", "--out", "proof")
    assert result.code == 0, result.err
    found = result.json["certificates"]
    assert [c["segments"] for c in found] == [1, 4, 8]
    bounds = [c["lmc_error"] for c in found]
    assert bounds == sorted(bounds, reverse=True)
    assert all(c["lmc_error_measured"] <= c["lmc_error"] for c in found)
    assert all(c["barrier_measured"] <= c["barrier"] for c in found)
    files(project / "proof", "certificate", result.json)


def test_certify_relabels_first(isthmus: Cli, project: Path) -> None:
    plain = isthmus("theory", "certify", *PAIR, "--segments", "4", "--json")
    moved = isthmus("theory", "certify", *PAIR, "--segments", "4", "--method", "covariance", "--json")
    assert moved.code == 0, moved.err
    error = [r.json["certificates"][0]["lmc_error_measured"] for r in (plain, moved)]
    assert error[1] < error[0]
    data = ("--data", "mynet:batches")
    isthmus("align", *PAIR[:4], *data, "--method", "covariance", "--out", "ab.safetensors")
    read = isthmus("theory", "certify", *PAIR, "--segments", "4", "--alignment", "ab.safetensors")
    assert read.code == 0, read.err
    assert "Proven for these two networks and these 40 examples" in " ".join(read.out.split())
    assert f"{error[1]:.4g}" in read.out


def test_certify_of_one_network_with_itself_is_json(isthmus: Cli, project: Path) -> None:
    """Nothing measured, nothing proven but rounding: ratios must not become infinite numbers in JSON."""
    same = ("a.safetensors", "a.safetensors", *PAIR[2:])
    result = isthmus("theory", "certify", *same, "--segments", "1,2", "--json", "--out", "same")
    assert result.code == 0, result.err
    assert result.json["certificates"][0]["lmc_error"] < 1e-8
    single = isthmus("theory", "certify", *PAIR, "--segments", "1", "--json", "--out", "one")
    assert single.code == 0, single.err
    assert single.json["certificates"][0]["ratio"] is None


def test_meanfield_and_dropout_write_their_files(isthmus: Cli, tmp_path: Path) -> None:
    small = ("--widths", "8,32", "--seeds", "2", "--horizon", "1", "--step", "0.1", "--floor-steps", "0.1")
    result = isthmus(
        "theory",
        "meanfield",
        *small,
        "--errors",
        "0.5",
        "--reference-width",
        "64",
        "--json",
        "--out",
        tmp_path / "m",
    )
    assert result.code == 0, result.err
    record = result.json
    assert (torch.tensor(record["sup_error"]) <= torch.tensor(record["bound"])).all()
    assert record["floor"][0]["ratio"] > 0
    assert record["n_min"][0]["enough"] <= 16
    files(tmp_path / "m", "meanfield", record)
    table = isthmus("theory", "meanfield", *small, "--errors", "0.0000001,0.5", "--reference-width", "64")
    assert table.code == 0, table.err
    assert "more than tried" in table.out
    noisy = ("--ridge", "0.01", "--temperature", "0.1", "--coupling", "same_init", "--errors", "", "--json")
    other = isthmus("theory", "meanfield", *small, *noisy, "--reference-width", "64")
    assert other.code == 0, other.err
    assert other.json["coupling"] == "same_init"
    assert (other.json["ridge"], other.json["temperature"]) == (0.01, 0.1)
    assert max(other.json["w2"][0]) < min(record["w2"][0])  # the same initial neurons stay closer
    refused = isthmus("theory", "meanfield", "--coupling", "twins")
    assert refused.code == 2
    assert "--coupling twins: expected one of independent, same_data, same_init" in refused.err

    result = isthmus(
        "theory", "dropout", "--widths", "16,64", "--seeds", "2", "--json", "--out", tmp_path / "d"
    )
    assert result.code == 0, result.err
    assert result.json["slopes"]["line"] < 0
    assert result.json["matched"][1] < result.json["half"][1]
    files(tmp_path / "d", "dropout", result.json)
    assert "slope" in isthmus("theory", "dropout", "--widths", "16,64", "--seeds", "1").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("width", "--eps", "0"), "epsilon: expected a finite number above 0"),
        (("width", "--inputs", "0"), "--inputs"),
        (("rate", "--law", "cauchy"), "--law cauchy: expected one of gaussian, uniform, low-dim"),
        (("rate", "--sizes", "8,x"), "--sizes 8,x: expected whole numbers"),
        (("rate", "--sizes", ""), "expected at least one whole number"),
        (("rate", "--sizes", "16,8"), "strictly rising sizes"),
        (("rate", "--law", "low-dim", "--signal", "9"), "at most 5 signal axes, found 9"),
        (("meanfield", "--floor-steps", "a"), "--floor-steps a: expected numbers"),
        (("meanfield", "--widths", "2000", "--horizon", "0"), "need at least 4000 neurons"),
        (("meanfield", "--step", "0"), "step: expected a finite number above 0"),
        (("dropout", "--widths", "1,2"), "widths"),
        (("dimension", "missing.pt"), "missing.pt"),
        (("certify", *PAIR, "--segments", "0"), "each 1 or more"),
        (("certify", *PAIR, "--split", "test"), "--split test: mynet:batches has data"),
        (("certify", *PAIR, "--method", "weights", "--alignment", "x"), "not both"),
        (("certify", *PAIR, "--method", "magic"), "magic"),
        (("certify", *PAIR, "--loss", "hinge"), "unknown loss 'hinge'"),
    ],
)
def test_bad_use_exits_with_2_and_writes_nothing(
    isthmus: Cli, project: Path, arguments: tuple[str, ...], message: str
) -> None:
    result = isthmus("theory", *arguments, "--out", "nothing")
    assert result.code == 2
    assert message in " ".join(result.err.split())
    assert "Traceback" not in result.err
    assert not list((project / "nothing").glob("*"))


def test_a_network_out_of_scope_is_refused_by_operator(isthmus: Cli, project: Path) -> None:
    text = (project / "mynet.py").read_text(encoding="utf-8")
    text += """
class Attending(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(64, 10)

    def forward(self, x):
        return torch.softmax(self.one(x), dim=1)

def attending():
    return Attending()
"""
    (project / "mynet.py").write_text(text, encoding="utf-8")
    for name in ("c.pt", "d.pt"):
        save_state(project / name, {"one.weight": torch.randn(10, 64), "one.bias": torch.zeros(10)})
    result = isthmus(
        "theory",
        "certify",
        "c.pt",
        "d.pt",
        "--model",
        "mynet:attending",
        "--data",
        "mynet:batches",
        "--segments",
        "1",
    )
    assert result.code == 2
    assert "aten.softmax is out of scope" in " ".join(result.err.split())


def test_the_folder_is_checked_before_the_work(isthmus: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    result = isthmus("theory", "width", "--out", tmp_path / "file")
    assert result.code == 2
    assert "Cannot write to the output folder" in result.err
