"""Names in a file and names in a network: the prefixes that trainers, compilers and averagers put before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from isthmus.errors import CheckpointError, printable

__all__ = ["COMMON", "Naming", "as_in_network", "under_prefix", "unwrapped"]

# What wrappers call the module inside them: DataParallel and its kin and averaged models; torch.compile; sharding;
# checkpointing; Lightning's fabric. Nobody writes the later ones by hand.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
COMMON = ("model", "net", "network", "backbone", "encoder")
"""What networks inside a training class are often called; only a network's own names can tell."""
_COUNTER = "n_averaged"
"""What ``torch.optim.swa_utils.AveragedModel`` counts beside the network that it averages."""
_SHOWN = 3


@dataclass(frozen=True)
class Naming:
    """Which tensor of a file is which of a network.

    Attributes:
        names: from name in the network to name in the file.
        prefix: what was removed before every name; empty where nothing was, or not the same everywhere.
        note: a remark for the reader; empty where the names are the file's.
    """

    names: dict[str, str]
    prefix: str = ""
    note: str = ""


def unwrapped(names: Iterable[str]) -> Naming:
    """Remove what wrappers put before the names of a network: only where all names carry it.

    Names such as ``model.`` stay, since a network may well have a part of that name; the note tells of them.
    """
    names = list(names)
    kept = [n for n in names if n != _COUNTER] if all(_inside(n) for n in names) else names
    prefix, rest = "", kept
    while rest and all(n.partition(".")[0] in _WRAPPERS and n.partition(".")[2] for n in rest):
        first = {n.partition(".")[0] for n in rest}
        if len(first) > 1:
            break
        prefix += f"{first.pop()}."
        rest = [n.partition(".")[2] for n in rest]
    cleaned = {_without_wrappers(n, _WRAPPERS[1:]): old for n, old in zip(rest, kept, strict=True)}
    if len(cleaned) < len(kept):  # two names would become one
        return Naming({n: n for n in names})
    if list(cleaned) == names:
        return Naming(cleaned, "", _common_note(names))
    return Naming(cleaned, prefix, _note(prefix, cleaned, names))


def _inside(name: str) -> bool:
    return name == _COUNTER or name.partition(".")[0] in _WRAPPERS


def _common_note(names: Sequence[str]) -> str:
    first = {n.partition(".")[0] for n in names if "." in n}
    if (
        len(first) == 1
        and len(names) > 1
        and all("." in n for n in names)
        and (word := first.pop()) in COMMON
    ):
        return f"all names begin with {word + '.'!r}, which was left; it goes with prefix={word + '.'!r}"
    return ""


def under_prefix(names: Iterable[str], prefix: str, where: str) -> Naming:
    """Keep the names under a prefix, without it.

    Raises:
        CheckpointError: there are none.
    """
    names = list(names)
    start = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    found = {n.removeprefix(start): n for n in names if n.startswith(start) and n != start}
    if not found:
        raise CheckpointError(
            f"{where}: no name begins with {printable(start)!r}; they begin with {_beginnings(names)}. Give one of "
            "these, or nothing."
        )
    return Naming(found, start, _note(start, found, names) if start else "")


def _beginnings(names: Sequence[str]) -> str:
    first = list(dict.fromkeys(n.partition(".")[0] + "." * ("." in n) for n in names))
    shown = ", ".join(repr(printable(n, 60)) for n in first[:_SHOWN])
    return shown + (f" and {len(first) - _SHOWN} more" if len(first) > _SHOWN else "")


def as_in_network(state: Mapping[str, Tensor], network: Mapping[str, Tensor], where: str) -> Naming | None:
    """Find the one way in which a file's names become a network's, or return None where there is none.

    Either may have a prefix that the other lacks, of any words, and wrappers may stand in the middle of a name. What
    lies outside the prefix (a loss, a counter, a second network) is left out and named.

    Args:
        state: the file's tensors.
        network: those of the network; only names and shapes are looked at.
        where: how a message calls the file.

    Raises:
        CheckpointError: there are several, such as an average beside the network that it is of.
    """
    names, wanted = list(state), list(network)
    if set(names) == set(wanted) or not wanted or set(wanted) < set(names):
        return Naming({n: n for n in names})
    found = (
        [Naming({w: p + w for w in wanted}, p) for p in _prefixes(names, wanted)]
        or _through_wrappers(names, wanted)
        or _without_prefix(names, wanted)
    )
    claimed = {old for naming in found for old in naming.names.values()} | {_COUNTER}
    # More of the same part than the network has: then it is another network.
    found = [n for n in found if not any(old.startswith(n.prefix) and old not in claimed for old in names)]
    if len(found) > 1 or set(names) - claimed:  # of one part among several the shapes must fit too
        found = [
            n for n in found if all(state[old].shape == network[new].shape for new, old in n.names.items())
        ]
    if len(found) > 1:
        shown = [printable(naming.prefix, 60) for naming in found]
        raise CheckpointError(
            f"{where}: holds the network's tensors more than once, under the prefixes {', '.join(map(repr, shown))}. "
            f"Say which one is meant: prefix={shown[0]!r}, or FILE::{shown[0].rstrip('.')} as the path."
        )
    if not found:
        return None
    naming = found[0]
    return naming if naming.note else replace(naming, note=_note(naming.prefix, naming.names, names))


def _prefixes(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return the prefixes under which all wanted names occur."""
    longest, present = max(wanted, key=len), set(names)
    ends = [n.removesuffix(longest) for n in names if n == longest or n.endswith(f".{longest}")]
    return [p for p in ends if all(p + w in present for w in wanted)]


def _through_wrappers(names: Sequence[str], wanted: Sequence[str]) -> list[Naming]:
    """Match names from which the words of wrappers are taken out wherever they stand."""
    plain = {_without_wrappers(n): n for n in names}
    short = {w: _without_wrappers(w) for w in wanted}
    if len(plain) < len(names) or len(set(short.values())) < len(wanted):  # two names would become one
        return []
    prefixes = _prefixes(list(plain), list(short.values()))
    return [Naming({w: plain[p + s] for w, s in short.items()}, p) for p in prefixes]


def _without_prefix(names: Sequence[str], wanted: Sequence[str]) -> list[Naming]:
    """Match a network whose own names have a prefix, as in a wrapper, with a file that lacks it."""
    if len(names) != len(wanted):
        return []
    return [
        Naming(
            {p + n: n for n in names},
            "",
            f"the prefix {p!r} of the network's names was put before the file's",
        )
        for p in _prefixes(wanted, names)
    ]


def _without_wrappers(name: str, words: Sequence[str] = _WRAPPERS) -> str:
    *parts, last = name.split(".")
    return ".".join([p for p in parts if p not in words] + [last])


def _note(prefix: str, chosen: Mapping[str, str], names: Sequence[str]) -> str:
    used = set(chosen.values())
    left = [n for n in names if n not in used]
    what = f"the prefix {printable(prefix)!r} was removed" if prefix else "the words of wrappers were removed"
    if not left:
        return f"{what} from the names of all {len(chosen)} tensors"
    shown = ", ".join(repr(printable(n, 60)) for n in left[:_SHOWN])
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return f"{what} from the names of {len(chosen)} tensors; {shown}{more} outside of it were left out"
