"""A study on one HTML page: the table of barriers, every figure, what it took; made from the records alone."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.errors import DataError
from isthmus.files import atomic_path
from isthmus.report._extras import load_extra
from isthmus.report._format import label, number, percent, with_error
from isthmus.report._study_figures import Rate, write_study_figures
from isthmus.report._study_summary import Row
from isthmus.report._study_table import BarrierTable, Spread, barrier_tables
from isthmus.report._write import unwritable

__all__ = ["write_study_report"]


_CAPTIONS = {
    "midpoint": "Loss at the middle of the line. The dotted line is the mean of the endpoints.",
    "accuracy": "Accuracy at the middle of the line. The dotted line is the mean of the endpoints.",
    "barrier": "The barrier: the most that the loss rises on the line above the chord between the endpoints.",
    "error": "How far the outputs on the line are from the mixture of the endpoints' outputs.",
    "methods": "Midpoint and barrier, method by method.",
    "line": "Loss along the line.",
    "dimension": "Approximate dimension against barrier, with Spearman's rank correlation.",
}


def write_study_report(
    rows: Sequence[Row],
    folder: str | Path,
    *,
    run: Mapping[str, Any] | None = None,
    rate: Rate | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write ``study.html``: the barriers as a table, and every figure of the study.

    The page is self-contained: it opens from disk and loads nothing.

    Args:
        rows: as :func:`isthmus.study.read_rows` returns them.
        folder: where to; made if need be.
        run: what the run took, as :func:`isthmus.study.read_run` returns it.
        rate: the theory's exponent (:func:`isthmus.study.transport_exponent`), drawn beside the fitted ones.
        notes: sentences that a reader should know, such as units that are missing.

    Returns:
        The path of the page.

    Raises:
        DataError: no rows.
        MissingExtraError: matplotlib or jinja2 is not installed.
        OutputError: the page cannot be written.
    """
    if not rows:
        raise DataError("Study report: expected rows, found none. Has a pair been measured?")
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(target, error) from error
    jinja2 = load_extra("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("isthmus.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "label": label}
    text = environment.get_template("study.html.jinja").render(
        study=rows[0]["study"],
        data=", ".join(dict.fromkeys(str(row["data"]) for row in rows)),
        tables=[_cells(table) for table in barrier_tables(rows)],
        pictures=_pictures(rows, rate),
        took=_took(run),
        yaml="" if run is None else str(run.get("yaml", "")),
        versions=_versions(rows),
        notes=list(notes),
    )
    path = target / "study.html"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _cells(table: BarrierTable) -> dict[str, Any]:
    """Return a table as words."""
    return {
        "title": f"Barrier on the {table.split} split" + (f", {table.about}" if table.about else ""),
        "swept": table.swept.replace("_", " "),
        "methods": [label(m) for m in table.methods],
        "rows": [
            {
                "place": f"{row.place:g}",
                "pairs": row.pairs,
                "loss": _words(row.loss),
                "accuracy": "–" if row.accuracy is None else percent(row.accuracy.mean),
                "barriers": [_words(row.barriers.get(m)) for m in table.methods],
            }
            for row in table.rows
        ],
    }


def _words(spread: Spread | None) -> str:
    return "–" if spread is None else with_error(spread.mean, spread.deviation)


def _pictures(rows: Sequence[Row], rate: Rate | None) -> list[dict[str, str]]:
    """Draw the figures into a folder that is thrown away, and return the PNG files as text."""
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder:
        paths = [p for p in write_study_figures(rows, folder, rate=rate) if p.suffix == ".png"]
        return [
            {
                "name": path.stem,
                "caption": _CAPTIONS.get(path.stem.partition("-")[0], ""),
                "data": base64.b64encode(path.read_bytes()).decode("ascii"),
            }
            for path in paths
        ]


def _took(run: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if run is None:
        return []
    units = run.get("units", {})
    found = [
        (f"{kind} units", f"{c['done']} of {c['all']} done, {c['failed']} failed")
        for kind, c in units.items()
    ]
    hours = [("CPU time", "cpu_seconds"), ("time in which something ran", "busy_seconds")]
    found += [
        (name, f"{run[key] / 3600:.2f} h") for name, key in hours if isinstance(run.get(key), (int, float))
    ]
    found += [("processor", text) for text in run.get("processors", [])]
    return found


def _versions(rows: Sequence[Row]) -> dict[str, str]:
    names = [column for column in rows[0] if column.startswith("version_")]
    return {
        name.removeprefix("version_"): ", ".join(sorted({str(row.get(name)) for row in rows}))
        for name in names
    }
