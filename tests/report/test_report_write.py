"""The files: figures that are not empty, and a folder that is never left half-written."""

from __future__ import annotations

import base64
import copy
import errno
import io
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from report_samples import METHODS, make_arrays, make_record

from isthmus.errors import CheckpointError, MissingExtraError, OutputError
from isthmus.report import check_record, write_report
from isthmus.report._draw_layers import cost_picture, descent_picture, dimension_picture
from isthmus.report._draw_lines import accuracy_picture, barrier_picture, loss_picture
from isthmus.report._draw_relabelling import relabelling_picture
from isthmus.report._panels import Panel, Picture, literal, look_of, render, tile
from isthmus.report._record import check_arrays
from isthmus.report._write import _pictures

NAMES = ("loss", "barriers", "accuracy", "relabelling", "matched-cost", "dimension", "descent")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    record = make_record((60, 1))
    return write_report(record, make_arrays(record), tmp_path_factory.mktemp("report") / "new" / "folder")


def small(sizes: tuple[int, ...] = (3,), methods: tuple[str, ...] = ("none", "weights")) -> dict[str, Any]:
    record = make_record(sizes)
    record["methods"] = {name: record["methods"][name] for name in methods}
    for method in record["methods"].values():
        del method["line"]["train"]
    return record


def pixels(panel: Panel) -> np.ndarray:
    image = render(panel)
    assert image.dtype == np.uint8
    assert image.shape[2] == 4
    return image


def ink(image: np.ndarray) -> float:
    return float((image[..., :3] < 250).any(axis=-1).mean())


def test_every_file_is_written_and_nothing_else(written: dict[str, Path]) -> None:
    folder = written["report"].parent
    assert set(written) == {"report", *NAMES}
    assert {path.name for path in folder.iterdir()} == {"report.html", *(f"{name}.png" for name in NAMES)}


@pytest.mark.parametrize("name", NAMES)
def test_figures_are_not_empty(written: dict[str, Path], name: str) -> None:
    image = imread(written[name])
    assert min(image.shape[:2]) > 400
    assert ((image[..., :3] < 0.98).any(axis=-1)).mean() > 0.01


def test_the_page_holds_every_panel(written: dict[str, Path]) -> None:
    html = written["report"].read_text(encoding="utf-8")
    images = re.findall(r'<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">', html)
    # two splits or kinds: loss and its closer view, barriers, accuracy, dimension; cost; 2 groups; descent
    assert len(images) == 4 + 2 + 2 + 2 + 1 + 2 + 1
    assert html.count("<img") == len(images)
    assert html.count("<figcaption>") == len(NAMES)
    for alt, data in images:
        assert len(alt) > 40
        assert imread(io.BytesIO(base64.b64decode(data))).shape[1] == 960
    assert not re.search(r"(src|href)=\"(?!data:)", html)


def test_the_input_is_not_touched_and_the_result_repeats(tmp_path: Path) -> None:
    record = small()
    arrays = make_arrays(record)
    kept, kept_arrays = copy.deepcopy(record), {name: value.copy() for name, value in arrays.items()}
    first = {key: path.read_bytes() for key, path in write_report(record, arrays, tmp_path).items()}
    assert record == kept
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, kept_arrays[name])
    assert {key: path.read_bytes() for key, path in write_report(record, arrays, tmp_path).items()} == first


def test_the_users_plotting_style_is_neither_used_nor_changed() -> None:
    panel = loss_picture(check_record(small())).panels[0]
    plain = pixels(panel)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30}):
        np.testing.assert_array_equal(pixels(panel), plain)
        assert matplotlib.rcParams["font.size"] == 30


def test_without_arrays_there_is_no_relabelling_picture() -> None:
    record = check_record(small())
    names = [picture.name for picture in _pictures(record, check_arrays(record, {}), None)]
    assert names == [name for name in NAMES if name != "relabelling"]


def test_the_pictured_method_can_be_chosen() -> None:
    record = small(methods=METHODS)
    checked = check_record(record)
    stored = check_arrays(checked, make_arrays(record))
    captions = {
        chosen: next(p.caption for p in _pictures(checked, stored, chosen) if p.name == "relabelling")
        for chosen in (None, "covariance")
    }
    assert "relabelling by correlation" in captions[None]
    assert "relabelling by covariance" in captions["covariance"]


def test_an_unknown_pictured_method_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"relabelling of 'ghost': expected a method of the record"):
        write_report(small(), {}, tmp_path, pictured="ghost")


def test_accuracy_may_be_missing_for_one_method_or_for_all() -> None:
    record = small(methods=("none", "weights", "covariance"))
    record["methods"]["weights"]["line"]["test"]["accuracy"] = None
    picture = accuracy_picture(check_record(record))
    assert picture is not None
    assert "weights, both sides" not in picture.panels[0].alt
    assert ink(pixels(picture.panels[0])) > 0.01
    for method in record["methods"].values():
        method["line"]["test"]["accuracy"] = None
    assert accuracy_picture(check_record(record)) is None


def test_a_closer_view_only_where_relabelling_helps() -> None:
    record = small()
    assert len(loss_picture(check_record(record)).panels) == 2
    record["methods"]["none"] = copy.deepcopy(record["methods"]["weights"])
    assert len(loss_picture(check_record(record)).panels) == 1


def test_no_barrier_no_errors_and_no_chart_breaks() -> None:
    record = small()
    for method in record["methods"].values():
        method["barrier"] = method["line"]["test"]["barrier"] = 0.0
        method["line"]["test"]["barrier_error"] = None
        method["line"]["test"]["loss_error"] = None
    for picture in (loss_picture(check_record(record)), barrier_picture(check_record(record))):
        assert ink(pixels(picture.panels[0])) > 0.01


def test_costs_and_dimensions_may_be_unknown() -> None:
    record = small((3, 4))
    method = record["methods"]["weights"]
    method["matched_cost"]["layers.0"] = {"before": 0.0, "after": 0.0}
    method["dimension"]["layers.0"] |= {"uncentred": None}
    cost, dimension = cost_picture(check_record(record)), dimension_picture(check_record(record))
    assert cost is not None
    assert dimension is not None
    assert len(dimension.panels) == 2
    assert ink(pixels(cost.panels[0])) > 0.01
    method["matched_cost"]["layers.1"] = {"before": None, "after": None}
    for group in method["dimension"].values():
        group |= {"uncentred": None, "centred": None}
    assert cost_picture(check_record(record)) is None
    assert dimension_picture(check_record(record)) is None


def test_descent_needs_a_method_with_two_sweeps() -> None:
    record = small(methods=("none", "weights", "covariance"))
    picture = descent_picture(check_record(record))
    assert picture is not None
    assert picture.caption.endswith("with fewer than two values: covariance.")
    record["methods"]["weights"]["sweeps"] = [5.0]
    assert descent_picture(check_record(record)) is None


@pytest.mark.parametrize("size", [1, 2, 3, 41])
def test_relabelling_of_small_and_odd_groups(size: int) -> None:
    record = small((size,))
    picture = relabelling_picture(
        check_record(record), check_arrays(check_record(record), make_arrays(record)), "weights"
    )
    assert picture is not None
    assert f"{size} units" in picture.panels[0].alt
    assert ink(pixels(picture.panels[0])) > 0.02


def test_relabelling_moves_b_towards_a() -> None:
    """A 3-cycle, because a transposition equals its inverse and would hide a wrong direction."""
    record = check_record(small((3,)))
    permutation = np.array([1, 2, 0])
    similarity = np.zeros((3, 3), dtype=np.float32)
    similarity[np.arange(3), permutation] = 1.0
    arrays = {"similarity/layers.0": similarity, "permutation/weights/layers.0": permutation}
    picture = relabelling_picture(record, check_arrays(record, arrays), "weights")
    assert picture is not None
    assert "0 before, 1.00 after" in picture.panels[0].alt
    figure = Figure()
    picture.panels[0].draw(figure)
    before, after = (axes.images[0].get_array() for axes in figure.axes[:2])
    np.testing.assert_array_equal(after, np.eye(3))
    np.testing.assert_array_equal(before, similarity)


def test_relabelling_of_units_that_never_vary() -> None:
    record = check_record(small((3,)))
    arrays = {
        "similarity/layers.0": np.full((3, 3), np.nan),
        "permutation/weights/layers.0": np.array([1, 2, 0]),
    }
    picture = relabelling_picture(record, check_arrays(record, arrays), "weights")
    assert picture is not None
    assert "– before, – after" in picture.panels[0].alt
    assert ink(pixels(picture.panels[0])) > 0.02


def test_relabelling_of_an_empty_group_and_of_many_groups() -> None:
    empty = small((0,))
    checked = check_record(empty)
    assert relabelling_picture(checked, check_arrays(checked, make_arrays(empty)), "weights") is None
    many = small((2,) * 20)
    checked = check_record(many)
    picture = relabelling_picture(checked, check_arrays(checked, make_arrays(many)), "weights")
    assert picture is not None
    assert len(picture.panels) == 6
    assert picture.caption.endswith("6 of 20 groups, evenly chosen.")


def test_names_are_never_mathematics(tmp_path: Path) -> None:
    assert literal("_a$b") == r" _a\$b"
    record = small((3,))
    nasty = "_$\\bad{$"
    record["split"] = nasty
    for method in record["methods"].values():
        method["line"] = {nasty: method["line"]["test"]}
    record["methods"][nasty] = copy.deepcopy(record["methods"]["weights"])
    for picture in (loss_picture(check_record(record)), barrier_picture(check_record(record))):
        for panel in picture.panels:
            assert ink(pixels(panel)) > 0.01


def test_looks_differ_in_more_than_colour() -> None:
    looks = [look_of(i) for i in range(14)]
    assert len({(look.colour, look.marker, look.dashes) for look in looks}) == 14
    for trait in ("colour", "marker", "dashes"):
        assert len({getattr(look, trait) for look in looks[:7]}) == 7


def test_tiling_pads_with_white() -> None:
    black = np.zeros((2, 3, 4), dtype=np.uint8)
    sheet = tile([black, black, black[:1]], 2)
    assert sheet.shape == (4, 6, 4)
    assert (sheet[:2] == 0).all()
    assert (sheet[2, :3] == 0).all()
    assert (sheet[3] == 255).all()
    assert (sheet[2:, 3:] == 255).all()


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf'needs {module}.*pip install "isthmus\[report\]"'):
        write_report(small(), {}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def _cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw one small panel instead of all: these tests are about the folder."""
    picture = Picture("loss", "t", "c", (Panel("a", 1.0, lambda figure: None),), 1)
    monkeypatch.setattr("isthmus.report._write._pictures", lambda *arguments: [picture])


def test_a_folder_that_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _cheap(monkeypatch)
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(
        OutputError, match=r"Writing the report to .*file: .*Choose a folder that can be written"
    ):
        write_report(small(), {}, tmp_path / "file")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _cheap(monkeypatch)
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    try:
        (folder / "probe").touch()
    except PermissionError:
        pass
    else:
        pytest.skip("this user may write to read-only folders")
    with pytest.raises(OutputError, match="Permission denied"):
        write_report(small(), {}, folder)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_leaves_the_old_report_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: int
) -> None:
    _cheap(monkeypatch)
    (tmp_path / "report.html").write_text("old", encoding="utf-8")
    count = iter(range(10))
    write_bytes = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if next(count) == failing:
            write_bytes(path, content[:3])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"No space left on device.*No file was left half-written"):
        write_report(small(), {}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "old"
