"""YAML files with the line of every value, so that an error can point at it.

A file is somebody else's text: its size, depth and number of values (every alias written out) are counted from the
stream of events, which needs no recursion and little memory, before anything is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.errors import MissingExtraError, StudyError

__all__ = ["KeyPath", "line_of", "read_text", "read_yaml"]

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys of mappings and positions in lists, from the outside."""

MOST_BYTES = 1 << 20
"""Of a study file; the longest preset has 2 kB."""

MOST_DEPTH = 20
"""Of lists and mappings inside each other; a study has three levels."""

MOST_VALUES = 20_000
"""Keys and values of a file, with every alias written out: room for 10,000 seeds listed one by one."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = ("null", "bool", "int", "float", "str")
_SIXTY = re.compile(r"[-+]?\d[\d_]*(:[0-5]?\d)+(\.\d*)?")
"""YAML 1.1 reads ``1:30`` as 90, in base sixty."""

_WORDS = {
    "timestamp": "a date; put it in quotes if it is meant as text",
    "merge": "a merge key (<<); write the fields out",
    "binary": "binary data",
}


def read_text(path: Path) -> str:
    """Return the text of a study file.

    Raises:
        StudyError: it cannot be read, is too long for a study, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise StudyError(
            f"{path}: cannot be read: {error.strerror or error}. Give a readable YAML file."
        ) from error
    if len(content) > MOST_BYTES:
        raise StudyError(
            f"{path}: expected a study of at most {MOST_BYTES:,} bytes, found more. Is it another file?"
        )
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise StudyError(f"{path}: expected UTF-8 text, found UTF-16. Save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise StudyError(
            f"{path}, line {line}: expected UTF-8 text, found the byte 0x{content[error.start]:02x}. Save it as UTF-8."
        ) from error


def read_yaml(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the values of a YAML text and the line, counted from 1, of each.

    Args:
        text: one YAML document of mappings, lists, texts, finite numbers, true, false and null.
        source: how messages call it, such as the file's name.

    Raises:
        StudyError: no valid YAML, a key that occurs twice in a mapping, a value of another kind, or a text that is
            longer, deeper or, its aliases written out, larger than any study.
        MissingExtraError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError('Study files need PyYAML: pip install "isthmus[study]".') from error
    if len(text) > MOST_BYTES:
        raise StudyError(
            f"{source}: expected a study of at most {MOST_BYTES:,} characters, found {len(text):,}."
        )
    try:
        _measure(yaml, text, source)
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            return _PlainBuilder(yaml, loader, source).build_all(root)
        finally:
            loader.dispose()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise StudyError(
            f"{source}, line {line}: not valid YAML: the character U+{ord(text[error.position]):04X} is not allowed."
        ) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise StudyError(f"{source}{where}: not valid YAML: {problem}.") from error


def line_of(path: KeyPath, lines: Mapping[KeyPath, int]) -> int:
    """Return the line of a value, or of the nearest thing around it."""
    while path not in lines and path:
        path = path[:-1]
    return lines.get(path, 1)


def _measure(yaml: Any, text: str, source: str) -> None:
    """Check depth and number of values, aliases written out; an alias inside what it stands for is refused."""
    sizes: dict[str, int] = {}
    open_anchors: list[tuple[str | None, int]] = []
    count = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{source}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.CollectionStartEvent):
            open_anchors.append((event.anchor, count))
            count += 1
            if len(open_anchors) > MOST_DEPTH:
                raise StudyError(
                    f"{where}: lists and mappings are nested more than {MOST_DEPTH} deep; a study has three levels."
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_anchors.pop()
            if anchor is not None:
                sizes[anchor] = count - before
        elif isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in open_anchors):
                raise StudyError(f"{where}: *{event.anchor} stands inside what it stands for. Write it out.")
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            if event.anchor is not None:
                sizes[event.anchor] = 1
        if count > MOST_VALUES:
            raise StudyError(
                f"{where}: more than {MOST_VALUES:,} values, aliases written out; no study needs so many. "
                "Give seeds as a number, and sweep fewer values."
            )


class _PlainBuilder:
    """Makes plain values of nodes, by a list of what is allowed."""

    def __init__(self, yaml: Any, loader: Any, source: str) -> None:
        self.yaml, self.loader, self.source = yaml, loader, source
        self.lines: dict[KeyPath, int] = {}

    def build_all(self, root: Any) -> tuple[Any, dict[KeyPath, int]]:
        return (None if root is None else self._build(root, ())), self.lines

    def _build(self, node: Any, path: KeyPath) -> Any:
        self.lines[path] = node.start_mark.line + 1
        if isinstance(node, self.yaml.ScalarNode):
            return self._scalar(node)
        expected = "seq" if isinstance(node, self.yaml.SequenceNode) else "map"
        if node.tag != _TAG + expected:
            raise self._unknown(node)
        if expected == "seq":
            return [self._build(item, (*path, i)) for i, item in enumerate(node.value)]
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, self.yaml.ScalarNode):
                raise StudyError(
                    f"{self._at(key_node)}: expected the name of a field, found a list or mapping."
                )
            key = str(self._scalar(key_node))
            if key in values:
                raise StudyError(f"{self._at(key_node)}: {key!r} occurs twice.")
            values[key] = self._build(value_node, (*path, key))
            self.lines[*path, key] = key_node.start_mark.line + 1
        return values

    def _scalar(self, node: Any) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if kind not in _SCALARS:
            raise self._unknown(node)
        shown = node.value if len(node.value) <= 40 else node.value[:40] + "…"
        if kind in ("int", "float") and _SIXTY.fullmatch(node.value):
            raise StudyError(f"{self._at(node)}: {shown}: expected a number without colons.")
        try:
            value = self.loader.construct_object(node)
        except (ValueError, KeyError, OverflowError) as error:
            raise StudyError(f"{self._at(node)}: {shown!r} cannot be read as {kind}.") from error
        if kind == "int" and not -(2**63) <= value < 2**63:
            raise StudyError(f"{self._at(node)}: {shown}: expected a number of less than 64 bits.")
        if kind == "float" and not math.isfinite(value):
            raise StudyError(f"{self._at(node)}: expected a finite number, found {shown}.")
        return value

    def _unknown(self, node: Any) -> StudyError:
        kind = node.tag.removeprefix(_TAG)
        what = _WORDS.get(kind, f"the tag {node.tag[:60]!r}")
        return StudyError(
            f"{self._at(node)}: expected text, numbers, true, false, lists and mappings only, found {what}."
        )

    def _at(self, node: Any) -> str:
        return f"{self.source}, line {node.start_mark.line + 1}"
