"""Writes ``docs/architectures.md`` from a run of the suite: ``python tests/symmetry/architectures/table.py``."""

from __future__ import annotations

import platform
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
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
- *seconds*: tracing and discovery together.

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


def table_of(entries: Sequence[Entry]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| network | class | parameters | groups | moved | error | reader | seconds |",
        "| --- | --- | ---: | --- | ---: | ---: | --- | ---: |",
    ]
    for e in entries:
        error = f"{e.verification.max_relative_error:.0e}" + ("" if e.verification.passed else " **wrong**")
        lines.append(
            f"| {e.name} | {e.kind} | {e.parameters:,} | {_groups(e)} | {e.spec.fraction_moved:.1%} | {error} | "
            f"{_reader(e)} | {e.seconds:.1f} |"
        )
    return "\n".join(lines)


def page_of(entries: Sequence[Entry]) -> str:
    """Return the whole page."""
    import transformers

    wrong = [e.name for e in entries if not e.verification.passed]
    read = [e for e in entries if e.name in EXPECTED]
    same = sum(_reader(e) == "the same" for e in read)
    summary = (
        f"{len(entries)} networks; wrong: {len(wrong)}; the same as a reader's list: {same} of {len(read)}. "
        f"PyTorch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}, one thread."
    )
    return f"{INTRODUCTION}\n{summary}\n\n{MARKER}\n\n{table_of(entries)}\n"


def main() -> None:
    """Run the whole suite and write the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    PAGE.write_text(page_of([run(name) for name in NAMES]), encoding="utf-8")


if __name__ == "__main__":
    main()
