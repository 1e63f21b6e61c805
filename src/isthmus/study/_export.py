"""From the records of units to one table: a row per pair, learning rate, method, refresh and split."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import CheckpointError, MissingExtraError, StudyError
from isthmus.files import atomic_path
from isthmus.study._config import PERMUTATIONS
from isthmus.study._evidence import unproven_note
from isthmus.study._plan import StudyPlan, Unit
from isthmus.study._records import DIGEST, MEASURED, symmetry_of
from isthmus.study._store import TIMES, Store, read_json, write_json

__all__ = ["RECORDS", "RUN", "collect_rows", "export_study", "read_rows", "read_run", "summarise_run"]

RECORDS = "records.parquet"
RUN = "run.json"

_logger = logging.getLogger(__name__)

_MOST_ROWS = 10_000_000
_NEEDED = {"study", "data", "family", "seed_a", "seed_b", "method", "refresh", "split", *MEASURED}

_DIMENSIONS = {"dimension": "uncentred", "dimension_centred": "centred"}


def export_study(folder: str | Path, out: str | Path | None = None) -> tuple[Path, Path, Path]:
    """Write ``records.parquet``, ``records.csv`` and ``run.json`` of what is recorded so far.

    Args:
        folder: of the study.
        out: folder to write to; default the study's.

    Returns:
        The three paths. Lists (values per layer or along the line) are JSON in the CSV; ``run.json`` says how long
        the work took and on what (:func:`summarise_run`), and holds the study's YAML.

    Raises:
        StudyError: the folder holds no study, or no pair has been measured yet.
        CheckpointError: a record was changed or damaged; the message names it.
        MissingExtraError: pyarrow is not installed.
        OutputError: a file cannot be written.
    """
    rows = _some(collect_rows(folder), folder)
    pa, parquet, csv = _arrow("pyarrow"), _arrow("pyarrow.parquet"), _arrow("pyarrow.csv")
    target = Path(folder if out is None else out)
    paths = target / RECORDS, target / "records.csv", target / RUN
    with atomic_path(paths[0]) as temporary:
        parquet.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
    flat = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    with atomic_path(paths[1]) as temporary:
        csv.write_csv(pa.Table.from_pylist(flat), temporary)
    write_json(paths[2], summarise_run(folder))
    return paths


def summarise_run(folder: str | Path) -> dict[str, Any]:
    """Return what the records of a study took: plain values.

    ``cpu_seconds`` and ``unit_seconds`` are sums over units; ``busy_seconds`` is the time during which at least one
    unit ran, so pauses between two runs do not count; ``at_once`` is how many units ran at a time, on average.
    Units are counted by kind and status. Versions and machines are those of the records.

    Args:
        folder: of the study.

    Raises:
        StudyError: the folder holds no study.
    """
    store = Store(Path(folder))
    plan = store.plan()
    units: dict[str, dict[str, int]] = {}
    versions: dict[str, set[str]] = {}
    timings: list[dict[str, Any]] = []
    threads: set[int] = set()
    for unit in plan.units:
        record, count = store.record_of(unit), units.setdefault(unit.kind, {"done": 0, "failed": 0, "all": 0})
        count["all"] += 1
        if record is None:
            continue
        count[record["status"]] += 1
        if record["status"] == "done":
            threads.add(record["threads"])
            for name, version in record["versions"].items():
                versions.setdefault(name, set()).add(version)
        timing = store.timing(unit.address)
        if timing is not None and None not in [timing.get(key) for key in TIMES]:
            timings.append(timing)
    spent = sum(t["seconds"] for t in timings)
    busy = _busy([(t["started"], t["started"] + t["seconds"]) for t in timings])
    text = store.folder / "study.yaml"
    return {
        "study": plan.study,
        "units": units,
        "unit_seconds": spent,
        "cpu_seconds": sum(t["cpu_seconds"] for t in timings),
        "busy_seconds": busy,
        "at_once": spent / busy if busy else 0.0,
        "machines": len({str(t.get("host")) for t in timings}),
        "processors": sorted({str(t["processor"]) for t in timings if t.get("processor")}),
        "threads": sorted(threads),
        "versions": {name: sorted(found) for name, found in versions.items()},
        "yaml": text.read_text(encoding="utf-8", errors="replace") if text.is_file() else "",
    }


def read_run(folder: str | Path) -> dict[str, Any] | None:
    """Return what :func:`summarise_run` says of a study's folder, or the ``run.json`` of a results folder, if any.

    Raises:
        CheckpointError: a file is damaged.
    """
    if (Path(folder) / "plan.json").is_file():
        return summarise_run(folder)
    path = Path(folder) / RUN
    if not path.is_file():
        return None
    found = read_json(path)
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{path}: expected what a run took, found {type(found).__name__}. Export it again."
        )
    return found


def _busy(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(last - max(first, end), 0.0)
        end = max(end, last)
    return total


def read_rows(folder: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a folder: of its ``records.parquet``, or collected from its units if it has a plan.

    Raises:
        StudyError: the folder has neither, or no pair has been measured.
        CheckpointError: a record or the table was changed or damaged; the message names it.
        MissingExtraError: pyarrow is not installed.
    """
    path = Path(folder) / RECORDS
    if (Path(folder) / "plan.json").is_file():
        rows = collect_rows(folder)
    elif path.is_file():
        rows = _read_table(path)
    else:
        raise StudyError(f"{folder}: holds neither {RECORDS} nor a study. Run one, or give a results folder.")
    return _some(rows, folder)


def _some(rows: list[dict[str, Any]], folder: str | Path) -> list[dict[str, Any]]:
    """Return rows, if there are any."""
    if not rows:
        raise StudyError(f"{folder}: no pair has been measured yet. Run the study further.")
    return rows


def _read_table(path: Path) -> list[dict[str, Any]]:
    parquet = _arrow("pyarrow.parquet")
    try:
        size = parquet.read_metadata(path).num_rows
        rows = parquet.read_table(path).to_pylist() if size <= _MOST_ROWS else None
    except Exception as error:  # a damaged file makes the reader fail in any way at all
        raise CheckpointError(
            f"{path}: truncated or not a table of records: {error}. Export the study again."
        ) from error
    if rows is None:
        raise CheckpointError(
            f"{path}: expected at most {_MOST_ROWS:,} rows, found {size:,}. Is it of a study?"
        )
    lacking = sorted(_NEEDED - rows[0].keys()) if rows else []
    if lacking:
        raise CheckpointError(
            f"{path}: expected the records of a study, found a table without {', '.join(lacking)}. "
            "Export the study again."
        )
    return rows


def collect_rows(folder: str | Path) -> list[dict[str, Any]]:
    """Collect the rows of all measured pairs from the units of a study, in the order of its plan.

    Raises:
        StudyError: the folder holds no study.
        CheckpointError: a record was changed or damaged; the message names it.
    """
    store = Store(Path(folder))
    plan = store.plan()
    found = {unit.address: store.record_of(unit) for unit in plan.units}
    done = {a: r for a, r in found.items() if r is not None and r["status"] == "done"}
    unproven = sum(DIGEST not in record for record in done.values())
    if unproven:
        _logger.warning("%s: %s", folder, unproven_note(unproven))
    dimensions = _dimensions_of(plan, done)
    rows: list[dict[str, Any]] = []
    for unit in plan.units:
        if unit.kind == "measure" and unit.address in done:
            rows += _rows_of(plan.study, unit, done, dimensions)
    # A column only where it says something, as in tables of old.
    silent = {
        column
        for column, plain in (("normalise", {"none"}), ("symmetry", {"none", PERMUTATIONS}))
        if plain.issuperset(row[column] for row in rows)
    }
    return [{k: v for k, v in row.items() if k not in silent} for row in rows]


def _rows_of(
    study: str,
    unit: Unit,
    done: Mapping[str, dict[str, Any]],
    dimensions: Mapping[tuple[str, int], Mapping[str, Any]],
) -> Iterator[dict[str, Any]]:
    content, record = unit.content, done[unit.address]
    ends = [content["a"], content["b"]]
    tables = [dimensions.get((end["unit"], end["index"]), {}) for end in ends]
    trained = [_trained_loss(done.get(end["unit"]), end["index"]) for end in ends]
    about = {
        "study": study,
        **{k: v for k, v in content["network"].items() if k != "settings"},
        "network_settings": json.dumps(content["network"]["settings"], sort_keys=True),
        "augment": "none",  # left out of contents where it is the default
        **content["training"],
        "data": content["data"]["name"],
        "statistics": content["data"]["statistics"],
        "normalise": content["data"].get("normalise", "none"),
        "points": content["measure"]["points"],
        "seed_a": ends[0]["seed"],
        "seed_b": ends[1]["seed"],
        "trained_loss_a": trained[0],
        "trained_loss_b": trained[1],
    }
    origin = {
        "data_digest_train": content["digests"]["train"],
        "data_digest_test": content["digests"]["test"],
        "unit": unit.address,
        "threads": record["threads"],
        "device": record["device"],
        **{f"version_{k}": v for k, v in record["versions"].items()},
        "commit": None if record["source"] is None else record["source"]["commit"],
        "dirty": None if record["source"] is None else record["source"]["dirty"],
    }
    for row in record["result"]["rows"]:
        losses, accuracies = row["endpoint_losses"], row["endpoint_accuracies"] or [None, None]
        yield {
            **about,
            "method": row["method"],
            "symmetry": symmetry_of(row),
            "refresh": row["refresh"],
            "split": row["split"],
            "loss_a": losses[0],
            "loss_b": losses[1],
            "accuracy_a": accuracies[0],
            "accuracy_b": accuracies[1],
            **{k: row[k] for k in MEASURED},
            **_dimension_columns(row["method"], tables),
            **origin,
        }


def _trained_loss(record: Mapping[str, Any] | None, index: int) -> float | None:
    """Return the training loss of a network in its last epoch."""
    history = [] if record is None else record["result"]["networks"][index]["history"]
    return history[-1]["loss"] if history else None


def _dimensions_of(
    plan: StudyPlan, done: Mapping[str, dict[str, Any]]
) -> dict[tuple[str, int], dict[str, Any]]:
    return {
        (unit.content["of"]["unit"], unit.content["of"]["index"]): done[unit.address]["result"]["methods"]
        for unit in plan.units
        if unit.kind == "dimension" and unit.address in done
    }


def _dimension_columns(method: str, tables: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, centred and not, the mean of A's and B's dimensions per layer, and its mean over layers."""
    columns: dict[str, Any] = {}
    for column, key in _DIMENSIONS.items():
        layers = [[group[key] for group in table[method].values()] for table in tables if method in table]
        known = len(layers) == 2 and all(v is not None for values in layers for v in values)
        means = [(a + b) / 2 for a, b in zip(*layers, strict=True)] if known else None
        columns[f"{column}_by_layer"] = means
        columns[column] = sum(means) / len(means) if means else None
    return columns


def _arrow(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError('Tables need pyarrow: pip install "isthmus[study]".') from error
