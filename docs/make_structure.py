"""Draw how the rooms of the package import each other, and print how large its parts are.

Run as ``python docs/make_structure.py src docs/images/structure.svg``. A room is a folder of the package, or a module
that lies in it directly. Arrows point from what imports to what is imported, which is drawn lower. A public import that
other arrows already lead to is not drawn; imports of ``_private`` modules or names of another room are all drawn, with
their number, and so is every import against the order. What is imported inside functions or for types only counts too.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Edge = tuple[str, str]

Node = str | tuple[Edge, int]
"""A room, or the place where a long arrow passes a row."""

PLAIN, PRIVATE = "#7f8fa6", "#d55e00"
"""Grey-blue, and the vermilion of Okabe and Ito: they differ in lightness too."""
WIDTH, HEIGHT, ROW, GAP, LANE = 2.0, 0.62, 1.4, 0.3, 0.3


@dataclass(frozen=True)
class Import:
    """A name that one room imports from another, whether it is private there, and the statement."""

    edge: Edge
    private: bool
    where: tuple[str, int]


@dataclass(frozen=True)
class Structure:
    """What the drawing shows.

    Attributes:
        files: lines of every file, by its path below the package.
        functions: lines of every function, by path and name.
        rooms: number of files and of lines, by room.
        imports: every import of one room by another.
    """

    files: Mapping[str, int]
    functions: Mapping[str, int]
    rooms: Mapping[str, tuple[int, int]]
    imports: Sequence[Import]

    def counted(self, private: bool) -> Counter[Edge]:
        """Return how often one room imports another, by private names or by public ones."""
        return Counter(i.edge for i in self.imports if i.private is private)


def read(source: Path) -> Structure:
    """Read a package from the folder that holds it."""
    package = next(p.parent for p in sorted(source.glob("*/__init__.py")))
    files: dict[str, int] = {}
    functions: dict[str, int] = {}
    imports: list[Import] = []
    rooms = {p.name if p.is_dir() else p.stem for p in package.iterdir() if p.is_dir() or p.suffix == ".py"}
    sizes: dict[str, list[int]] = {}
    for path in sorted(package.rglob("*.py")):
        name, text = path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")
        tree, room = ast.parse(text), name.split("/")[0].removesuffix(".py")
        files[name] = len(text.splitlines())
        sizes.setdefault(room, []).append(files[name])
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                functions[f"{name}:{node.name}"] = (node.end_lineno or node.lineno) - node.lineno + 1
        for line, parts in imported(tree, package.name):
            if parts[0] in rooms and parts[0] != room:
                private = any(p.startswith("_") for p in parts[1:])
                imports.append(Import((room, parts[0]), private, (name, line)))
    shown = {room: (len(lines), sum(lines)) for room, lines in sizes.items() if not room.startswith("__")}
    kept = [i for i in imports if set(i.edge) <= shown.keys()]
    return Structure(files, functions, shown, kept)


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, list[str]]]:
    """Yield what a file imports from its package: the line, and room, modules and name of each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, n.split(".")[1:]) for n in names if n.startswith(f"{package}."))


def layers(rooms: Sequence[str], edges: Counter[Edge]) -> dict[str, int]:
    """Return the layer of every room: above all that it imports, as far as imports have one direction.

    Imports are taken from the most frequent to the rarest, and one that would close a circle is left out.
    """
    below: dict[str, set[str]] = {room: set() for room in rooms}

    def reaches(start: str, goal: str) -> bool:
        return start == goal or any(reaches(after, goal) for after in below[start])

    for (room, other), _ in sorted(edges.items(), key=lambda item: (-item[1], item[0])):
        if not reaches(other, room):
            below[room].add(other)
    found: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in found:
            found[room] = 1 + max((level(other) for other in below[room]), default=-1)
        return found[room]

    return {room: level(room) for room in rooms}


def drawn(edges: Counter[Edge], level: Mapping[str, int]) -> list[Edge]:
    """Return the edges that no longer way leads along, and those against the order."""
    below: dict[str, set[str]] = {}
    for room, other in edges:
        if level[room] > level[other]:
            below.setdefault(room, set()).add(other)

    def reaches(start: str, goal: str) -> bool:
        return start == goal or any(reaches(after, goal) for after in below.get(start, ()))

    def implied(room: str, other: str) -> bool:
        return any(reaches(after, other) for after in below.get(room, set()) - {other})

    return sorted(e for e in edges if level[e[0]] <= level[e[1]] or not implied(*e))


def places(level: Mapping[str, int], edges: Sequence[Edge]) -> dict[Node, tuple[float, float]]:
    """Return the middle of every box, and where arrows pass the rows between: near what they are joined to."""
    rows: list[list[Node]] = [
        [r for r in sorted(level) if level[r] == k] for k in range(1 + max(level.values()))
    ]
    joined: dict[Node, list[Node]] = {}
    for edge in edges:
        way = way_of(edge, level)
        for one, other in itertools.pairwise(way):
            joined.setdefault(one, []).append(other)
            joined.setdefault(other, []).append(one)
        for node in way[1:-1]:
            rows[node[1]].append(node)  # type: ignore[index,arg-type]
    x: dict[Node, float] = {}
    for row in rows:
        x.update(_packed(row, dict.fromkeys(row, 0.0)))
    for sweep in range(60):
        for row in rows if sweep % 2 else reversed(rows):
            x.update(_packed(row, {n: _mean([x[m] for m in joined.get(n, [n])]) for n in row}))
    return {n: (x[n], ROW * (level[n] if isinstance(n, str) else n[1])) for n in x}


def way_of(edge: Edge, level: Mapping[str, int]) -> list[Node]:
    """Return the rooms that an arrow joins, and between them its place in every row that it passes."""
    first, last = level[edge[0]], level[edge[1]]
    step = -1 if first > last else 1
    return [edge[0], *((edge, k) for k in range(first + step, last, step)), edge[1]]


def _packed(row: Sequence[Node], wanted: Mapping[Node, float]) -> dict[Node, float]:
    """Return places in a row, centred and without overlaps, in the order that is wanted."""
    order = sorted(row, key=lambda n: (wanted[n], str(n)))
    widths = [WIDTH + GAP if isinstance(n, str) else LANE for n in order]
    ends = list(itertools.accumulate(widths))
    return {n: end - width / 2 - ends[-1] / 2 for n, end, width in zip(order, ends, widths, strict=True)}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0


def draw(structure: Structure, target: Path) -> None:
    """Write the drawing."""
    import matplotlib as mpl

    mpl.use("svg" if target.suffix == ".svg" else "agg")
    mpl.rcParams.update({"svg.hashsalt": "isthmus", "svg.fonttype": "none", "font.size": 9})
    from matplotlib import pyplot as plt

    public, private = structure.counted(private=False), structure.counted(private=True)
    level = layers(list(structure.rooms), public + private)
    plain = drawn(public, level)
    at = places(level, [*plain, *private])
    xs, ys = zip(*at.values(), strict=True)
    figure, axes = plt.subplots(figsize=(0.8 * (max(xs) - min(xs) + WIDTH), 0.8 * (max(ys) + 1.5 * ROW)))
    for edge in plain:
        wrong = level[edge[0]] <= level[edge[1]]
        _arrow(axes, [at[n] for n in way_of(edge, level)], PLAIN, public[edge] if wrong else 0)
    for edge, count in sorted(private.items()):
        _arrow(axes, [at[n] for n in way_of(edge, level)], PRIVATE, count)
    for room, (files, lines) in structure.rooms.items():
        _box(axes, at[room], room, f"{files} files, {lines:,} lines" if files > 1 else f"{lines:,} lines")
    _legend(axes, public, private)
    axes.set_xlim(min(xs) - 0.6 * WIDTH, max(xs) + 0.6 * WIDTH)
    axes.set_ylim(-0.75 * ROW, max(ys) + 0.4 * ROW)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(
        target, bbox_inches="tight", dpi=130, metadata={"Date": None} if target.suffix == ".svg" else None
    )
    plt.close(figure)


def _arrow(axes: Any, way: Sequence[tuple[float, float]], colour: str, count: int) -> None:
    """Draw an arrow through the middle of every row that it passes, straight there and curved between rows."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Line

    half = HEIGHT / 2 if way[0][1] > way[-1][1] else -HEIGHT / 2
    (x, y), shift = (
        way[0],
        0.09 if colour == PRIVATE else -0.09,
    )  # two arrows between two rooms lie side by side
    points, codes = [(x + shift, y - half)], [Line.MOVETO]
    for k, (u, v) in enumerate(way[1:], start=1):
        middle, end = (points[-1][1] + v + half) / 2, (u + shift, v + half)
        points += [(points[-1][0], middle), (end[0], middle), end]
        codes += [Line.CURVE4] * 3
        if k < len(way) - 1:
            points.append((end[0], v - half))
            codes.append(Line.LINETO)
    width = 1.5 if colour == PRIVATE else 0.9
    line = FancyArrowPatch(
        path=Line(points, codes), arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=width
    )
    axes.add_patch(line)
    if count:
        (a, b), (c, d) = points[0], points[3]
        place = (a + 0.78 * (c - a), b + 0.7 * (d - b))  # on the first curve, where arrows have parted
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
        axes.text(*place, str(count), color=colour, weight="bold", ha="center", va="center", bbox=box)


def _box(axes: Any, middle: tuple[float, float], title: str, text: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = (middle[0] - WIDTH / 2, middle[1] - HEIGHT / 2)
    style = "round,pad=0,rounding_size=0.08"
    box = FancyBboxPatch(
        corner, WIDTH, HEIGHT, boxstyle=style, facecolor="#f4f6fa", edgecolor="#2f3640", zorder=4
    )
    axes.add_patch(box)
    axes.text(middle[0], middle[1] + 0.11, title, ha="center", va="center", weight="bold", zorder=5)
    axes.text(middle[0], middle[1] - 0.14, text, ha="center", va="center", fontsize=7.5, zorder=5)


def _legend(axes: Any, public: Counter[Edge], private: Counter[Edge]) -> None:
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], color=PLAIN, linewidth=0.9), Line2D([], [], color=PRIVATE, linewidth=1.5)]
    words = [
        f"public imports ({public.total()})",
        f"private imports across rooms ({private.total()}), with their number",
    ]
    axes.legend(lines, words, loc="lower center", ncols=2, frameon=False, bbox_to_anchor=(0.5, -0.03))


def report(structure: Structure) -> Iterator[str]:
    """Yield the figures as sentences."""
    lines = sorted(structure.files.values())
    longest = max(structure.functions, key=lambda name: structure.functions[name])
    largest = max(structure.files, key=lambda name: structure.files[name])
    tenth = statistics.quantiles(lines, n=10, method="inclusive")[-1] if len(lines) > 1 else lines[0]
    yield f"{sum(lines):,} lines in {len(lines)} files and {len(structure.rooms)} rooms"
    middle = f"median {statistics.median(lines):g}, 90th percentile {tenth:g}"
    yield f"lines of a file: {middle}, most {lines[-1]} ({largest})"
    yield f"longest function: {structure.functions[longest]} lines ({longest})"
    private = structure.counted(private=True)
    statements = len({i.where for i in structure.imports if i.private})
    yield f"private imports across rooms: {private.total()} names in {statements} statements"
    yield from (f"  {room} -> {other}: {count}" for (room, other), count in sorted(private.items()))


def main() -> None:
    """Draw and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="the folder that holds the package, such as src")
    parser.add_argument("target", type=Path, help="where the drawing goes: .svg, .png or .pdf")
    given = parser.parse_args()
    structure = read(given.source)
    draw(structure, given.target)
    print("\n".join(report(structure)))  # noqa: T201


if __name__ == "__main__":
    main()
