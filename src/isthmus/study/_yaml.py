"""YAML files with the line of every value, so that an error can point at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isthmus.errors import MissingExtraError
from isthmus.study._errors import StudyError

__all__ = ["KeyPath", "line_of", "read_yaml"]

KeyPath = tuple[str | int, ...]
"""Where a value stands: keys of mappings and positions in lists, from the outside."""


def read_yaml(text: str, source: str) -> tuple[Any, dict[KeyPath, int]]:
    """Return the values of a YAML text and the line, counted from 1, of each.

    Args:
        text: one YAML document.
        source: how messages call it, such as the file's name.

    Raises:
        StudyError: no valid YAML, or a key that occurs twice in a mapping.
        MissingExtraError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError('Study files need PyYAML: pip install "isthmus[study]".') from error
    loader = yaml.SafeLoader(text)
    lines: dict[KeyPath, int] = {}

    def build(node: Any, path: KeyPath) -> Any:
        lines[path] = node.start_mark.line + 1
        if isinstance(node, yaml.SequenceNode):
            return [build(item, (*path, i)) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return loader.construct_object(node, deep=True)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node))
            if key in values:
                raise StudyError(f"{source}, line {key_node.start_mark.line + 1}: {key!r} occurs twice.")
            values[key] = build(value_node, (*path, key))
            lines[*path, key] = key_node.start_mark.line + 1
        return values

    try:
        root = loader.get_single_node()
        return (None if root is None else build(root, ())), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error)
        raise StudyError(f"{source}{where}: not valid YAML: {problem}.") from error
    finally:
        loader.dispose()


def line_of(path: KeyPath, lines: Mapping[KeyPath, int]) -> int:
    """Return the line of a value, or of the nearest thing around it."""
    while path not in lines and path:
        path = path[:-1]
    return lines.get(path, 1)
