"""The HTML page: turns a checked record and drawn pictures into one self-contained document."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isthmus.report._extras import load_extra
from isthmus.report._format import (
    amount,
    best_method,
    label,
    moved_share,
    number,
    percent,
    unit_of,
    with_error,
)
from isthmus.report._panels import Picture, look_of
from isthmus.report._record import Record, RecordedCoupling, RecordedLine

__all__ = ["Headline", "headline", "page"]


@dataclass(frozen=True)
class Headline:
    """The result in words; ``explanation`` says what the numbers of ``sentence`` are."""

    sentence: str
    explanation: str
    best: str | None


def headline(record: Record) -> Headline:
    """Put the result in plain words: what the line costs with and without relabelling."""
    methods, split = record["methods"], record["split"]
    before = methods["none"]["barrier"]
    line = "The straight line between the two networks"
    cost = f"{line} costs {amount(before, unit_of(record))} without relabelling"
    meaning = (
        f"The cost is the barrier: the most that the loss on the {split} examples rises, anywhere on the "
        "line, above a steady passage from the loss of A to the loss of B."
    )
    best = best_method(record)
    if best is None:
        return Headline(f"{cost}; no relabelling was tried.", meaning, None)
    after = methods[best]["barrier"]
    if before <= 0:
        return Headline(
            f"The straight line between the two networks has no barrier to remove, and "
            f"{amount(after, unit_of(record))} after the best relabelling.",
            meaning,
            best,
        )
    if after >= before:
        sentence = f"{cost}, and no relabelling tried here lowers that: the best leaves {number(after)}."
        return Headline(sentence, meaning, best)
    return Headline(f"{cost} and {number(after)} after.", f"{meaning} {_what_moved(record, best)}", best)


def _what_moved(record: Record, best: str) -> str:
    method = record["methods"][best]
    moved = moved_share(record, method["moved"])
    who = f"The lowest barrier is that of the method “{label(best)}”"
    if moved is not None:
        who += f", which moves {percent(moved, 0)} of the units of B that can move"
    if method["verification_error"] is not None:
        who += (
            f". Moving them leaves what B computes as it was: its outputs change by at most "
            f"{number(method['verification_error'])} relative, in double precision"
        )
    return who + "."


def page(record: Record, pictures: Sequence[tuple[Picture, Sequence[bytes]]]) -> str:
    """Fill the template.

    Args:
        record: a checked record.
        pictures: every picture with the PNG bytes of its panels, in order of appearance.

    Returns:
        A complete HTML document that loads nothing from anywhere: styles are inline, images are data.
    """
    jinja2 = load_extra("jinja2")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("isthmus.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": percent, "label": label}
    return environment.get_template("report.html.jinja").render(
        record=record,
        unit=unit_of(record),
        headline=headline(record),
        methods=_method_rows(record),
        notes=_notes(record),
        splits=_split_tables(record),
        couplings=_couplings(record),
        larger=sum(
            group.get("acts", "permutations") != "permutations" for group in record["symmetry"]["groups"]
        ),
        groups=[{"acts": "permutations", **group} for group in record["symmetry"]["groups"]],
        pinned=record["symmetry"]["pinned"],
        pictures=[_picture(picture, images) for picture, images in pictures],
        settings={key: _plain(v) for key, v in record["settings"].items() if v != ""},
    )


def _method_rows(record: Record) -> list[dict[str, Any]]:
    """Return the cells of the table of methods."""
    baseline = record["methods"]["none"]["barrier"]
    rows = []
    for index, (name, method) in enumerate(record["methods"].items()):
        line = method["line"][record["split"]]
        lower = name != "none" and 0 < method["barrier"] < baseline
        rows.append(
            {
                "name": name,
                "look": look_of(index),
                "barrier": with_error(method["barrier"], line["barrier_error"]),
                "lower": f"{baseline / method['barrier']:.1f}×" if lower else "–",
                "at": f"{line['barrier_at']:.2f}",
                "midpoint_loss": number(method["midpoint_loss"]),
                "midpoint_accuracy": percent(method["midpoint_accuracy"]),
                "verification": number(method["verification_error"]),
                "moved": percent(moved_share(record, method["moved"]), 0),
                "seconds": number(method["seconds"], 2),
                "status": "–" if name == "none" else method["status"],
            }
        )
    return rows


def _couplings(record: Record) -> dict[str, list[dict[str, str]]]:
    """Return, by method that may act by more than permutations, what it does to every group."""
    return {
        name: [_coupling_cells(group, coupling) for group, coupling in method["couplings"].items()]
        for name, method in record["methods"].items()
        if "couplings" in method
    }


def _coupling_cells(group: str, coupling: RecordedCoupling) -> dict[str, str]:
    numbers = [f"{coupling['units']} {'units' if coupling['moved'] is not None else 'dimensions'}"]
    if coupling["moved"] is not None:
        numbers.append(f"{coupling['moved']} moved")
    if coupling["flipped"]:
        numbers.append(f"{coupling['flipped']} flipped")
    if coupling["factors"]:
        low, middle, high = coupling["factors"]
        numbers.append(f"factors {low:.3g} to {high:.3g}, median {middle:.3g}")
    if coupling["condition"] is not None:
        numbers.append(f"condition number {coupling['condition']:.3g}")
    ends = coupling["similarity"]
    similarity = "–" if ends is None else f"{ends[0]:.2f} → {ends[1]:.2f}".replace("-", "−")
    return {"group": group, "kind": coupling["kind"], "numbers": ", ".join(numbers), "similarity": similarity}


def _notes(record: Record) -> dict[str, str]:
    """Return what the methods have to say, such as units that never vary, each with the methods that say it."""
    said: dict[str, list[str]] = {}
    for name, method in record["methods"].items():
        for note in method.get("notes", []):
            said.setdefault(note, []).append(label(name))
    return {note: ", ".join(names) for note, names in said.items()}


def _split_tables(record: Record) -> list[dict[str, Any]]:
    """Return, per split, every number measured on it for every method."""
    names = dict.fromkeys(split for method in record["methods"].values() for split in method["line"])
    return [
        {
            "name": split,
            "rows": [
                {"method": name, **_line_cells(method["line"][split])}
                for name, method in record["methods"].items()
                if split in method["line"]
            ],
        }
        for split in names
    ]


def _line_cells(line: RecordedLine) -> dict[str, str]:
    return {
        "barrier": with_error(line["barrier"], line["barrier_error"]),
        "at": f"{line['barrier_at']:.2f}",
        "midpoint_loss": number(line["midpoint_loss"]),
        "midpoint_accuracy": percent(line["midpoint_accuracy"]),
        "lmc_error_sup": number(line["lmc_error_sup"]),
        "ensemble_loss": number(line["ensemble_loss"]),
        "ensemble_accuracy": percent(line["ensemble_accuracy"]),
    }


def _picture(picture: Picture, images: Sequence[bytes]) -> Mapping[str, Any]:
    panels = [
        {"alt": panel.alt, "data": base64.b64encode(image).decode("ascii")}
        for panel, image in zip(picture.panels, images, strict=True)
    ]
    columns = min(picture.columns, len(panels))
    words = {"name": picture.name, "title": picture.title, "caption": picture.caption}
    return {**words, "columns": columns, "panels": panels}


def _plain(value: Any) -> str:
    """Print one setting: a text as it is, anything else as JSON."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
