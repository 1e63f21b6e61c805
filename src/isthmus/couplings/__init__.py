r"""Couplings as values: how units of network B are expressed in the units of network A.

Conventions (``docs/decisions/0001-conventions.md``): **B moves towards A**; entry ``i`` of a permutation's index is the
unit of B that is placed at position ``i`` of A. Every class here is a :class:`Coupling`, a protocol: a matrix
:math:`M` that carries what holds the units (:math:`M W`) and what reads them (:math:`W M^{-1}`). This room knows
neither networks nor solvers.
"""

from isthmus.couplings._coupling import Coupling, is_orthogonal
from isthmus.couplings._indices import (
    compose_permutations,
    identity_permutation,
    invert_permutation,
    invert_permutations,
    moved_fraction,
    random_permutation,
    validate_permutation,
)
from isthmus.couplings._linear import Linear, Rotation
from isthmus.couplings._monomial import Monomial, Permutation, as_coupling, index_of
from isthmus.couplings._nested import Nested
from isthmus.couplings._plan import Plan
from isthmus.couplings._summary import CouplingSummary, summary_of

__all__ = [
    "Coupling",
    "CouplingSummary",
    "Linear",
    "Monomial",
    "Nested",
    "Permutation",
    "Plan",
    "Rotation",
    "as_coupling",
    "compose_permutations",
    "identity_permutation",
    "index_of",
    "invert_permutation",
    "invert_permutations",
    "is_orthogonal",
    "moved_fraction",
    "random_permutation",
    "summary_of",
    "validate_permutation",
]
