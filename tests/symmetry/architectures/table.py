"""Writes ``docs/architectures.md`` from a run of the suite: ``python tests/symmetry/architectures/table.py [NAME…]``.

With names only these networks are run anew; the rows of the others stay as they are.
"""

from __future__ import annotations

import platform
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from classes import INCOMPLETE, READ, found_classes, read_classes
from suite import EXPECTED, NAMES, Entry, expected_sizes, run

MARKER = "<!-- written by tests/symmetry/architectures/table.py -->"
PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"

INTRODUCTION = """# Architectures

What discovery finds in the networks of our test-suite: small random ones, built from `transformers` configurations
without any download or written as plain modules. Norms have random gains, shifts and running statistics. Each
network is relabelled at random twice, all groups together, and run in float64.

- *groups*: sizes of the groups, with how many there are of each. Groups nested in others (the dimensions of one
  head, the hidden units of one expert) are counted one by one.
- *moved*: share of all parameters and buffers that some group moves.
- *error*: largest relative change of the outputs that count.
- *reader*: whether the groups are exactly those that a person wrote down for this network, where one did.
- *seconds*: processor time of tracing and discovery together.
- *acts*: how many groups there are of each class, the largest one whose random elements leave the function alone;
  units that have units of their own, such as heads, change places alone.
- *reader of classes*: whether these are the classes that a person wrote down for this network, where one did; where
  discovery finds less than the person sees, it is *incomplete*.

Parameters that do not move, and the operator that holds each of them, are listed by `isthmus symmetry`.
"""


def _groups(entry: Entry) -> str:
    sizes = Counter(g.size for g in entry.spec.groups.values())
    return ", ".join(
        f"{size}" + (f" ×{n}" if n > 1 else "") for size, n in sorted(sizes.items(), reverse=True)
    )


def _reader(entry: Entry) -> str:
    if entry.name not in EXPECTED:
        return ""
    return "the same" if entry.sizes == expected_sizes(EXPECTED[entry.name]) else "differs"


def _acts(entry: Entry) -> str:
    counted = Counter(str(g.acts) for g in entry.spec.groups.values())
    return ", ".join(f"{acts}" + (f" ×{n}" if n > 1 else "") for acts, n in sorted(counted.items()))


def _classes(entry: Entry) -> str:
    if entry.name not in READ:
        return ""
    if found_classes(entry.spec) == read_classes(entry.name):
        return "the same"
    return "incomplete" if entry.name in INCOMPLETE else "differs"


HEAD = (
    "| network | kind | parameters | groups | moved | error | reader | seconds | acts | reader of classes |",
    "| --- | --- | ---: | --- | ---: | ---: | --- | ---: | --- | --- |",
)


def row_of(e: Entry) -> str:
    """Return the row of one network as Markdown."""
    error = f"{e.verification.max_relative_error:.0e}" + ("" if e.verification.passed else " **wrong**")
    return (
        f"| {e.name} | {e.kind} | {e.parameters:,} | {_groups(e)} | {e.spec.fraction_moved:.1%} | {error} | "
        f"{_reader(e)} | {e.seconds:.1f} | {_acts(e)} | {_classes(e)} |"
    )


def rows_in(page: str) -> dict[str, str]:
    """Return the rows of a page by network."""
    lines = [line for line in page.splitlines() if line.startswith("| ") and line not in HEAD]
    return {line.split("|")[1].strip(): line for line in lines}


def page_of(rows: Mapping[str, str]) -> str:
    """Return the whole page from the rows of all networks."""
    import transformers

    cells = {name: [c.strip() for c in row.strip("|").split("|")] for name, row in rows.items()}
    wrong = sum("**wrong**" in row for row in rows.values())
    read = [c[6] for c in cells.values() if c[6]]
    classes = [c[9] for c in cells.values() if c[9]]
    summary = (
        f"{len(rows)} networks; wrong: {wrong}; the same as a reader's list: {read.count('the same')} of {len(read)}; "
        f"the same classes: {classes.count('the same')} of {len(classes)}; "
        f"at least 95 % of the entries move in {sum(float(c[4].rstrip('%')) >= 95 for c in cells.values())}. "
        f"PyTorch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, one thread."
    )
    table = "\n".join((*HEAD, *(rows[name] for name in NAMES if name in rows)))
    return f"{INTRODUCTION}\n{summary}\n\n{MARKER}\n\n{table}\n"


def main(names: Sequence[str]) -> None:
    """Run the suite, or the named networks, and write each row into the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = rows_in(PAGE.read_text(encoding="utf-8")) if names else {}
    for name in names or NAMES:
        rows[name] = row_of(run(name))
        PAGE.write_text(page_of(rows), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
