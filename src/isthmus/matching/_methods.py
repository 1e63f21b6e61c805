"""Methods as values, by name: what each compares, what it needs, how it searches, and where it comes from."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType
from typing import Literal

import torch

from isthmus.errors import DataError
from isthmus.matching._activations import ActivationMatching
from isthmus.matching._alternating import Alternation
from isthmus.matching._classes import Factors, Symmetry, solvers_of
from isthmus.matching._contributions import SlopeMatching
from isthmus.matching._frank_wolfe import FrankWolfe
from isthmus.matching._head_outputs import HeadMatching
from isthmus.matching._incremental import Incremental
from isthmus.matching._kronecker import kronecker_objective
from isthmus.matching._line_factors import line_factors
from isthmus.matching._objectives import Objective
from isthmus.matching._problem import Problem, no_data
from isthmus.matching._schedules import CoordinateDescent, Match, Schedule, SinglePass, Then
from isthmus.matching._solvers import Assignment, Solver, assignment_solver
from isthmus.matching._terms import covariance_objective, incoming_weight_objective, weight_objective
from isthmus.matching._trained import GradientSearch
from isthmus.symmetry import Acts

__all__ = ["METHODS", "Found", "Method", "Methods", "by_gradient", "method_named"]

Needs = Literal["weights", "inputs", "activations", "slopes", "labels"]
"""The data of a method: weights alone; second moments of A's inputs (a pass of A); joint moments (a pass of both);
slopes of the outputs (a pass forwards and backwards); labels, and a loss that is trained on."""


@dataclass(frozen=True, eq=False)
class Found:
    """The result of a method: the match, the objective that it is by, and remarks for the reader."""

    match: Match
    objective: Objective
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Method:
    """A way to match two networks: an objective, a schedule and a solver.

    Attributes:
        name: by which it is asked for, such as ``"weights"``.
        label: how reports call it.
        objective: builds the objective from a problem and a source of randomness.
        needs: ``"weights"``, ``"inputs"``, ``"activations"``, ``"slopes"`` or ``"labels"``; all but the first need
            data.
        schedule: the usual order of matching.
        solver: couples one gain matrix, where all groups are permuted. Where a problem asks for larger classes, each
            group has the solver of its class.
        source: where it comes from.
        search: runs the whole search where objective and schedule do not say it all, given the problem, a schedule
            (None for the usual one) and a source of randomness.
        symmetry: what may act on units where nobody says it; ``None`` for permutations.
        factors: how the factor of a pair of units is found, where factors may act.
        least_error: whether factors are then moved to where the midpoint's layers err least (see
            :func:`isthmus.matching.line_factors`), which takes a pass of both networks over the data.

    Example:
        >>> import torch, isthmus
        >>> from isthmus.matching import weight_objective
        >>> mine = Method("my-weights", "my weights", lambda problem, generator: weight_objective(problem.pair))
        >>> a, b = (torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)).eval() for _ in range(2))
        >>> isthmus.align(a, b, args=torch.zeros(1, 2), method=mine).method
        'my-weights'
    """

    name: str
    label: str
    objective: Callable[[Problem, torch.Generator], Objective]
    needs: Needs = "weights"
    schedule: Schedule = field(default_factory=SinglePass)
    solver: Solver = field(default_factory=Assignment)
    source: str = ""
    search: Callable[[Problem, Schedule | None, torch.Generator], Found] | None = None
    symmetry: Symmetry | None = None
    factors: Factors = "least squares"
    least_error: bool = False

    def run(self, problem: Problem, schedule: Schedule | None, generator: torch.Generator) -> Found:
        """Return what the method finds, with the usual schedule or another one.

        A search of one's own finds what it looks for: :attr:`Problem.classes` says what each group allows.

        Raises:
            DataError: factors are to be found on the line, and there are no data.
        """
        found = self._searched(problem, schedule, generator)
        if not self.least_error or problem.permutes:
            return found
        if problem.data is None:
            raise no_data(f"method {self.name!r}")
        couplings = line_factors(problem, found.match.couplings)
        return replace(found, match=replace(found.match, couplings=couplings))

    def _searched(self, problem: Problem, schedule: Schedule | None, generator: torch.Generator) -> Found:
        if self.search is not None:
            return self.search(problem, schedule, generator)
        objective = self.objective(problem, generator)
        used = self.schedule if schedule is None else schedule
        solver = self.solver if problem.permutes else solvers_of(problem.classes, self.factors, problem.spec)
        return Found(used.run(objective, solver, None, generator), objective)


class Methods(Mapping[str, Method]):
    """Methods by name, in the order in which they are shown.

    Args:
        methods: what is compared where nothing else is asked for.
        further: what is there by name.

    Attributes:
        usual: the names of the methods that are compared where nothing else is asked for.
        shipped: the names that were there from the start, whatever was registered later.
    """

    def __init__(self, *methods: Method, further: Iterable[Method] = ()) -> None:
        self.usual = tuple(method.name for method in methods)
        self._methods = {method.name: method for method in (*methods, *further)}
        self.shipped = tuple(self._methods)

    def __getitem__(self, name: str) -> Method:
        """Return a method by its name."""
        return self._methods[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._methods)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._methods)

    def register(self, method: Method) -> Method:
        """Add a method, which is then known by its name everywhere in this process.

        Raises:
            DataError: another one has this name.
        """
        if self._methods.get(method.name, method) is not method:
            raise DataError(f"A method named {method.name!r} is registered already. Give yours another name.")
        self._methods[method.name] = method
        return method

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Return a context that begins with the first methods, and after which what it registers is forgotten."""
        before = self._methods
        self._methods = {name: before[name] for name in self.shipped}
        try:
            yield
        finally:
            self._methods = before

    def __repr__(self) -> str:
        """Return one line."""
        return f"Methods({', '.join(self)})"


_WEIGHTS = Then(SinglePass(), CoordinateDescent())


def _covariance(problem: Problem, generator: torch.Generator, *, tie_outgoing: bool = False) -> Objective:
    statistics = problem.input_statistics(generator)
    return Incremental(covariance_objective(problem.pair, statistics, tie_outgoing=tie_outgoing))


def _kronecker(problem: Problem, generator: torch.Generator) -> Objective:
    slopes = problem.output_moments()
    return Incremental(kronecker_objective(problem.pair, problem.input_statistics(generator), slopes))


def _by_activations(
    name: str,
    source: str,
    *,
    correlation: bool,
    needs: Needs = "activations",
    matched: Callable[..., ActivationMatching] = ActivationMatching,
    factors: Factors = "norms",
) -> Method:
    """Return a method whose objective depends on its search, since rows may be units that are matched too."""

    def search(problem: Problem, schedule: Schedule | None, generator: torch.Generator) -> Found:
        solver = assignment_solver if problem.permutes else solvers_of(problem.classes, factors, problem.spec)
        matching = matched(problem, correlation, schedule, generator, solver)
        match, objective = matching.run()
        return Found(match, objective, matching.notes)

    def objective(problem: Problem, generator: torch.Generator) -> Objective:
        return search(problem, None, generator).objective

    return Method(
        name, name, objective, needs=needs, source=source, search=search, factors=factors, least_error=True
    )


def _alternating(problem: Problem, schedule: Schedule | None, generator: torch.Generator) -> Found:
    matching = Alternation(problem, schedule, generator)
    match = matching.run()
    return Found(match, matching.objective, matching.notes)


def by_gradient(search: GradientSearch, name: str = "", start: str = "contributions") -> Method:
    """Return a method that searches permutations by gradient, on the training loss between two networks.

    Args:
        search: the settings.
        name: by which it is asked for; default: that of the search.
        start: the method whose permutations it starts from.

    Example:
        >>> by_gradient(GradientSearch("straight-through", steps=50), "short").name
        'short'
    """

    def run(problem: Problem, schedule: Schedule | None, generator: torch.Generator) -> Found:
        first = METHODS[start].run(problem, schedule, generator)
        return Found(search.run(problem, first.match, generator), first.objective, first.notes)

    name = name or search.by
    source = {
        "straight-through": "Ainsworth, Hayase and Srinivasa 2023, section 3.3",
        "sinkhorn": "Guerrero et al. 2023",
    }[search.by]
    return Method(
        name,
        name,
        lambda problem, generator: METHODS[start].objective(problem, generator),
        needs="labels",
        source=source,
        search=run,
    )


_BY_ACTIVATIONS = ("activations", "correlation")

METHODS = Methods(
    Method(
        "weights-incoming",
        "incoming weights",
        lambda problem, generator: Incremental(incoming_weight_objective(problem.pair)),
        source="Ferbach et al. 2024, section 6 (naive weight matching)",
        factors="norms",
    ),
    Method(
        "weights",
        "weights, both sides",
        lambda problem, generator: Incremental(weight_objective(problem.pair)),
        schedule=_WEIGHTS,
        source="Ainsworth, Hayase and Srinivasa 2023",
    ),
    Method(
        "covariance",
        "covariance",
        _covariance,
        needs="inputs",
        source="Ferbach et al. 2024, section 6",
        factors="norms",
        least_error=True,
    ),
    _by_activations(
        "activations", "Ainsworth, Hayase and Srinivasa 2023; Singh and Jaggi 2020", correlation=False
    ),
    _by_activations("correlation", "Li et al. 2016", correlation=True),
    further=(
        _by_activations(
            "contributions",
            "isthmus.matching, contributions of units to randomly projected outputs",
            correlation=False,
            needs="slopes",
            matched=partial(SlopeMatching, by="contributions"),
        ),
        _by_activations(
            "sensitivity",
            "isthmus.matching, the second-order change of the outputs; after Martens and Grosse 2015",
            correlation=False,
            needs="slopes",
            matched=partial(SlopeMatching, by="sensitivity"),
        ),
        Method(
            "kronecker",
            "Kronecker curvature",
            _kronecker,
            needs="slopes",
            schedule=Then(FrankWolfe(), CoordinateDescent()),
            source="Martens and Grosse 2015, with the Jacobian of the outputs; Frank and Wolfe 1956",
        ),
        Method(
            "frank-wolfe",
            "weights, all groups at once",
            lambda problem, generator: Incremental(weight_objective(problem.pair)),
            schedule=Then(FrankWolfe(), CoordinateDescent()),
            source="Crisostomi et al. 2024; Frank and Wolfe 1956",
        ),
        Method(
            "alternating",
            "activations and weights in turn",
            lambda problem, generator: Incremental(weight_objective(problem.pair)),
            needs="activations",
            source="streams and heads: Theus 2025; turns by relative weights and the choice on the path are ours",
            search=_alternating,
        ),
        _by_activations(
            "head-outputs",
            "Li et al. 2016; heads by what they write: isthmus.matching",
            correlation=True,
            matched=HeadMatching,
        ),
        by_gradient(GradientSearch("straight-through")),
        by_gradient(GradientSearch("sinkhorn", learning_rate=0.1)),
    ),
)
"""The methods by name. ``METHODS.register`` adds one; ``METHODS.usual`` names those that studies compare by default."""


def tied(method: Method) -> Method:
    """Return the covariance method whose outgoing weights count too, each unit weighted by its mean square."""
    return replace(
        method,
        objective=lambda problem, generator: _covariance(problem, generator, tie_outgoing=True),
        schedule=_WEIGHTS,
    )


def method_named(method: str | Method) -> Method:
    """Return a method by its name, or one of the user's own as ``module:NAME``, also from the current folder.

    A name may go on, after plus signs, with what may act on units (``"all"``, or classes by their names in
    :class:`isthmus.symmetry.Acts`) and with how factors are found: ``"least-squares"``, ``"norms"``, or ``"line"``,
    where the layers of the midpoint err least. Who says how factors are found and not what acts means all that acts.

    Raises:
        DataError: nothing has that name, or what has is no :class:`Method`, or it cannot go on like this.

    Example:
        >>> method_named("weights+norms").symmetry  # SEA's closed form
        'all'
    """
    if isinstance(method, Method):
        return method
    if method in METHODS:
        return METHODS[method]
    name, *options = method.split("+")
    if options:
        return _with_options(method_named(name), options)
    known = ", ".join(map(repr, METHODS))
    if ":" not in method:
        raise DataError(
            f"unknown method {method!r}: expected one of {known}, or your own as 'module:METHOD'."
        )
    module, _, name = method.partition(":")
    if module.endswith(".py"):
        stem = module.replace(os.sep, "/").rpartition("/")[2].removesuffix(".py")
        raise DataError(
            f"method {method!r}: expected 'module:METHOD', found a file's name. Write '{stem}:{name}', from the folder "
            f"in which {stem}.py lies."
        )
    try:
        found = getattr(_imported(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"method {method!r}: {error}. Expected one of {known}, or 'module:METHOD'."
        ) from error
    if not isinstance(found, Method):
        raise DataError(
            f"method {method!r}: expected an isthmus.matching.Method, found {type(found).__name__}."
        )
    return found


_FACTORS: Mapping[str, Factors] = {"least-squares": "least squares", "norms": "norms"}
_LEAST_ERROR = "line"
_SYMMETRIES = ("permutations", "all", *map(str, Acts))


def _with_options(method: Method, options: Sequence[str]) -> Method:
    """Return a method that says what may act on units, and how factors are found."""
    name = "+".join([method.name, *options])
    for option in options:
        if option not in (*_FACTORS, _LEAST_ERROR, *_SYMMETRIES):
            known = ", ".join(map(repr, (*_SYMMETRIES, *_FACTORS, _LEAST_ERROR)))
            raise DataError(f"method {name!r}: expected {known} after a plus sign, found {option!r}.")
    acting = [option for option in options if option in _SYMMETRIES]
    rules: list[Factors] = [_FACTORS[option] for option in options if option in _FACTORS]
    together = len(acting) > 1 and {"permutations", "all"} & set(acting)
    if together or len(set(rules)) > 1:
        raise DataError(
            f"method {name!r}: expected one of 'permutations', 'all' and some classes, and one of 'least-squares' and "
            "'norms', found more."
        )
    search = method.search
    rule: Factors = rules[0] if rules else method.factors
    if rules and search is not None:
        if method.name not in _BY_ACTIVATIONS:
            raise DataError(f"method {name!r}: it has a search of its own, which says how factors are found.")
        search = _by_activations(
            method.name, method.source, correlation=method.name == "correlation", factors=rule
        ).search
    least_error = _LEAST_ERROR in options or (method.least_error and not rules)
    wanted = acting[0] if len(acting) == 1 else tuple(acting) or "all"
    moves = least_error and wanted != "permutations"
    return replace(
        method,
        name=name,
        label=" + ".join([method.label, *(option.replace("-", " ") for option in options)]),
        search=search,
        symmetry=wanted,
        factors=rule,
        least_error=least_error,
        needs="inputs" if moves and method.needs == "weights" else method.needs,
    )


def _imported(module: str) -> ModuleType:
    """Import a module; the current folder is searched last, if it is not among the usual places."""
    here = os.getcwd()
    if here in sys.path:
        return importlib.import_module(module)
    sys.path.append(here)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(here)
