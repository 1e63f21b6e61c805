"""Model cards: what a written folder is, what it was made from and how, for people and for the hub."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.errors import printable
from isthmus.matching import Alignment

__all__ = ["Contribution", "adapters_card", "folded_card", "merge_card", "relabelled_card"]

_SHOWN = 20
"""Names of tensors listed in a card."""


@dataclass(frozen=True)
class Contribution:
    """A model that went into another: its title, share, alignment (unless it stayed as it was), and what loads it."""

    title: str
    weight: float = 1.0
    alignment: Alignment | None = None
    library: str = "transformers"


def _text(text: object) -> str:
    """Return text from a file as plain words of a card: no markup, no links, no breaks."""
    return re.sub(r"([\\\\`*|\[\]!#])", r"\\\1", html.escape(printable(text), quote=False))


def _code(text: object) -> str:
    """Return a name from a file as code in a card."""
    return f"`{printable(text).replace('`', chr(39))}`"


def merge_card(
    sources: Sequence[Contribution], left_out: Sequence[str], unknown: Sequence[str] = (), repair: str = ""
) -> str:
    """Return the card of a weighted average.

    Args:
        sources: the networks.
        left_out: files that were not copied.
        unknown: stored tensors that belong to no part of the network.
        repair: what was done to the average, in words.
    """
    lines = [*_front(sources, "merge"), "# Merged model", ""]
    lines += ["A weighted average of networks of one architecture, made with Isthmus.", ""]
    lines += ["| model | weight | relabelled towards the first |", "|---|---|---|"]
    for source in sources:
        lines.append(f"| {_text(source.title)} | {source.weight:.6g} | {_how(source.alignment)} |")
    lines += ["", _text(repair)] if repair else []
    lines += _alignments(sources) + _unknown(unknown, "the first model's") + _left_out(left_out)
    return "\n".join(lines) + "\n"


def relabelled_card(source: Contribution, left_out: Sequence[str], unknown: Sequence[str] = ()) -> str:
    """Return the card of a relabelled model (see :func:`merge_card`)."""
    lines = [*_front([source], "relabelled"), "# Relabelled model", ""]
    lines += [
        f"{_text(source.title)} with its hidden units {_moved_how(source.alignment)}, made with Isthmus. It computes "
        "the same function; its weights can be averaged with those of the model it was aligned to.",
    ]
    lines += _alignments([source]) + _unknown(unknown, "as they were, in the old order") + _left_out(left_out)
    return "\n".join(lines) + "\n"


def adapters_card(sources: Sequence[tuple[str, float]], base: str, how: str, error: float) -> str:
    """Return the card of an average of adapters.

    Args:
        sources: titles and weights.
        base: the network that they were trained for; empty where it is not known.
        how: in words, how the factors were averaged.
        error: distance to the mean of the products, relative to its norm.
    """
    front = ["---", "library_name: peft", *([f"base_model: {json.dumps(printable(base))}"] if base else [])]
    lines = [*front, "tags:", "- lora", "- merge", "- isthmus", "---", "", "# Merged adapter", ""]
    lines += ["A weighted average of LoRA adapters of one network, made with Isthmus.", ""]
    lines += ["| adapter | weight |", "|---|---|"]
    lines += [f"| {_text(title)} | {weight:.6g} |" for title, weight in sources]
    lines += ["", f"Factors: {how}. Distance to the mean of the products: {error:.3g} of its norm."]
    return "\n".join(lines) + "\n"


def folded_card(
    source: Contribution, folds: Sequence[str], left_out: Sequence[str], unknown: Sequence[str] = ()
) -> str:
    """Return the card of a model whose norms were folded.

    Args:
        source: the network.
        folds: what was folded, one line each.
        left_out: files that were not copied.
        unknown: stored tensors that belong to no part of the network.
    """
    lines = [*_front([source], "folded"), "# Folded model", ""]
    lines += [
        f"{_text(source.title)} with gains, biases and means of its norms moved into the layers around them, made with "
        "Isthmus. It computes the same function, up to rounding.",
        "",
    ]
    lines += [f"- {_text(line)}" for line in folds]
    lines += _unknown(unknown, "as they were") + _left_out(left_out)
    return "\n".join(lines) + "\n"


def _front(sources: Sequence[Contribution], tag: str) -> list[str]:
    """Return the front matter that the hub reads; names are quoted as JSON, which YAML reads alike."""
    titles = [
        f"- {json.dumps(printable(title), ensure_ascii=False)}"
        for title in dict.fromkeys(s.title for s in sources)
    ]
    return [
        "---",
        f"library_name: {sources[0].library}",
        "base_model:",
        *titles,
        "tags:",
        f"- {tag}",
        "- isthmus",
        "---",
        "",
    ]


def _only_permutes(alignment: Alignment | None) -> bool:
    return alignment is None or set(alignment.kinds) <= {"Permutation"}


def _moved_how(alignment: Alignment | None) -> str:
    """Say what happened to the units."""
    if _only_permutes(alignment):
        return "in another order"
    return "in another order, and signs, factors or directions of their own"


def _what(alignment: Alignment) -> str:
    """Name the couplings."""
    if _only_permutes(alignment):
        return "permutations"
    return f"couplings ({', '.join(f'{n} of the kind {kind}' for kind, n in alignment.kinds.items())})"


def _how(alignment: Alignment | None) -> str:
    return "no" if alignment is None else f"yes, by the method {_text(repr(alignment.method))}"


def _alignments(sources: Sequence[Contribution]) -> list[str]:
    lines: list[str] = []
    for source in sources:
        found = source.alignment
        if found is not None:
            lines += ["", f"## How {_text(source.title)} was relabelled", ""]
            lines.append(
                f"Method {_text(repr(found.method))}, {len(found.couplings)} groups of units, "
                f"{_text(found.status)}, seed {found.seed}. {_verified(found)} The {_what(found)} lie in the folder "
                "`isthmus`."
            )
    return lines


def _verified(alignment: Alignment) -> str:
    if alignment.verification_error is None:
        return "That the function stays the same was not measured."
    return f"Largest relative change of its outputs: {alignment.verification_error:.2e}."


def _unknown(names: Sequence[str], what: str) -> list[str]:
    if not names:
        return []
    shown = ", ".join(map(_code, names[:_SHOWN])) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )
    return [
        "",
        f"The architecture named in `config.json` does not use {shown}. These tensors are {what}; a network that does "
        "use them must not be loaded from here.",
    ]


def _left_out(names: Sequence[str]) -> list[str]:
    if not names:
        return []
    return ["", "Not copied, because they belong to the old weights: " + ", ".join(map(_code, names)) + "."]
