"""Whether a rule that fails is an error, or says nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import fx

from isthmus.errors import SymmetryError
from isthmus.symmetry._trace import module_of, operator_of

__all__ = ["report_failure", "strict_rules"]

_STRICT: ContextVar[bool] = ContextVar("strict_rules", default=False)


@contextmanager
def strict_rules(strict: bool = True) -> Iterator[None]:
    """Return a context in which a rule for an operator that fails is an error, for tests of rules.

    Outside of it a rule that raises, or answers in another shape than the traced one, says nothing, and everything
    its operator touches is pinned: sound, but a mistake in the rule then looks like a symmetry that is not there.

    Args:
        strict: ``False`` for the behaviour outside, within another such context.

    Example:
        >>> import torch, isthmus
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)).eval()
        >>> with strict_rules():
        ...     [group.size for group in isthmus.discover(model, torch.zeros(1, 2)).groups.values()]
        [3]
    """
    before = _STRICT.set(strict)
    try:
        yield
    finally:
        _STRICT.reset(before)


def report_failure(node: fx.Node, failure: Exception | None) -> None:
    """Raise what is wrong with the rule of a node, where rules are strict.

    Args:
        node: the call of the operator.
        failure: what the rule raised, ``None`` if it answered in another shape than the traced one.

    Raises:
        SymmetryError: rules are strict.
    """
    if not _STRICT.get():
        return
    found = f"it raised {type(failure).__name__}: {failure}" if failure else "it answered in another shape"
    raise SymmetryError(
        f"the rule for {operator_of(node)} in module {module_of(node) or '(the model)'!r}, called as "
        f"{node.format_node()}: expected labels in the shape of the traced result, found that {found}. Mend the rule; "
        "for a form that it does not know, let it pin and return op.fixed_result."
    ) from failure
