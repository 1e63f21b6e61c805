"""Write the tables of ``transformers.md`` from its record: ``python docs/make_transformers.py``.

The record, ``transformers.json``, comes from ``python examples/transformers_pair.py``. Each table lies between
``<!-- begin NAME -->`` and ``<!-- end NAME -->``; what stands between them is replaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from isthmus.files import atomic_path

HERE = Path(__file__).parent
PAIRS = ("0-1", "0-2", "1-2")
PAGE, RECORD = HERE / "transformers.md", HERE / "transformers.json"

Record = Mapping[str, Any]
Line = Mapping[str, Any]


def main() -> None:
    """Replace the tables of the page."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    with atomic_path(PAGE) as temporary:
        temporary.write_text(filled(PAGE.read_text(encoding="utf-8"), record), encoding="utf-8")


def filled(page: str, record: Record) -> str:
    """Return the page with all its tables written from a record."""
    for name, write in TABLES.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin not in page or end not in page:
            raise ValueError(
                f"{PAGE}: has no place for {name!r}. Put {begin} and {end} where the table belongs."
            )
        text = "\n".join([begin, *write(record), end])
        page = re.sub(
            f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, text=text: text, page, flags=re.DOTALL
        )
    return page


def setting(record: Record) -> list[str]:
    """Return what was trained."""
    lines = _heading(
        "networks", "parameters", "steps × batch", "CPU seconds each", "test examples", "chance (nats)"
    )
    for kind, family in record["families"].items():
        lines.append(
            _row(
                kind,
                f"{family['parameters']:,}",
                f"{record['steps'][kind]:,} × {record['batch'][kind]}",
                f"{family['training_seconds']:.0f}",
                f"{_lines(family)[0]['none']['examples']:,}",
                f"{family['constant_loss']:.2f}",
            )
        )
    return lines


def barriers(record: Record) -> list[str]:
    """Return the barriers of all pairs by every method, and their means."""
    methods = _methods(record)
    lines = _heading("networks", "seeds", "loss of A, B", *methods)
    for kind, family in record["families"].items():
        for seeds, pair in family["pairs"].items():
            ends = ", ".join(f"{loss:.3f}" for loss in pair["lines"]["none"]["ends"])
            lines.append(_row(kind, seeds, ends, *(_barrier(pair["lines"][m]) for m in methods)))
        means = [fmean(found[m]["barrier"] for found in _lines(family)) for m in methods]
        lines.append(_row(f"**{kind}**", "mean", "", *(f"**{mean:.3f}**" for mean in means)))
    return lines


def accuracies(record: Record) -> list[str]:
    """Return the mean accuracies of the ends and of the midpoints."""
    methods = _methods(record)
    lines = _heading("networks", "ends", *methods)
    for kind, family in record["families"].items():
        ends = fmean(accuracy for found in _lines(family) for accuracy in found["none"]["end_accuracies"])
        middles = [fmean(found[m]["midpoint_accuracy"] for found in _lines(family)) for m in methods]
        lines.append(_row(kind, f"{ends:.1%}", *(f"{middle:.1%}" for middle in middles)))
    return lines


def parts(record: Record) -> list[str]:
    """Return the mean barriers when only some groups are relabelled."""
    families = record["families"]
    first = [next(iter(family["pairs"].values())) for family in families.values()]
    lines = _heading("relabelled", *(f"{kind} (groups)" for kind in families))
    lines.append(_row("nothing", *(_mean(f, "lines", "none") for f in families.values())))
    for name in first[0]["parts"]:
        groups = [pair["parts"][name]["groups"] for pair in first]
        means = [_mean(family, "parts", name) for family in families.values()]
        lines.append(_row(name, *(f"{mean} ({count})" for mean, count in zip(means, groups, strict=True))))
    lines.append(_row("everything", *(_mean(f, "lines", record["parts"]) for f in families.values())))
    return lines


def rotations(record: Record) -> list[str]:
    """Return the barriers of folded networks when ever more of what may act on them is matched, pair by pair."""
    lines = _heading("networks", "matched", *PAIRS, "mean", "midpoint accuracy")
    for kind, family in record["families"].items():
        pairs = list(family["pairs"].values())
        if not all("rotations" in pair for pair in pairs):
            continue  # a record of an earlier example
        rows = {
            "nothing": [pair["lines"]["none"] for pair in pairs],
            "best permutation": [pair["lines"][record["parts"]] for pair in pairs],
            **{name: [pair["rotations"][name] for pair in pairs] for name in pairs[0]["rotations"]},
        }
        for name, found in rows.items():
            mean, accuracy = (fmean(line[k] for line in found) for k in ("barrier", "midpoint_accuracy"))
            lines.append(_row(kind, name, *map(_barrier, found), f"**{mean:.3f}**", f"{accuracy:.1%}"))
    return lines


def agreement(record: Record) -> list[str]:
    """Return how alike the activations of the pairs are, and how alike they would look by chance."""
    sorts = ("as they are", "permuted", "rotated")
    lines = _heading("networks", "activations", *sorts)
    for kind, family in record["families"].items():
        found = [pair["agreement"] for pair in family["pairs"].values()]
        for place in found[0]:
            cells = []
            for sort in sorts:
                true, chance = (fmean(f[place][sort + end] for f in found) for end in ("", " shuffled"))
                cells.append(f"{true:.2f} ({chance:.2f})")
            lines.append(_row(kind, place, *cells))
    return lines


def control(record: Record) -> list[str]:
    """Return the barriers of the control, and how many groups came back as they were planted."""
    lines = _heading("networks", *_methods(record))
    for kind, family in record["families"].items():
        cells = []
        for method in _methods(record):
            line = family["control"][method]
            recovered = line.get("groups_recovered")
            cells.append(_barrier(line) + (f"; {recovered[0]} of {recovered[1]} groups" if recovered else ""))
        lines.append(_row(kind, *cells))
    return lines


TABLES = {
    "setting": setting,
    "barriers": barriers,
    "accuracies": accuracies,
    "rotations": rotations,
    "parts": parts,
    "agreement": agreement,
    "control": control,
}


def _lines(family: Record) -> list[Mapping[str, Line]]:
    return [pair["lines"] for pair in family["pairs"].values()]


def _methods(record: Record) -> list[str]:
    return list(next(iter(record["families"].values()))["control"])


def _barrier(line: Line) -> str:
    return f"{line['barrier']:.3f} ± {line['barrier_error']:.3f}"


def _mean(family: Record, kind: str, name: str) -> str:
    return f"{fmean(pair[kind][name]['barrier'] for pair in family['pairs'].values()):.3f}"


def _heading(*names: str) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
