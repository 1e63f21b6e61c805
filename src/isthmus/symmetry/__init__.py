"""Symmetry of networks: discover which axes move together, verify it by running, apply it to a state."""

from isthmus.symmetry._apply import (
    Couplings,
    Reordering,
    Slots,
    apply,
    as_couplings,
    carry_tensor,
    check_permutations,
    reordering,
)
from isthmus.symmetry._discover import Outputs, discover, discover_from_trace
from isthmus.symmetry._permutation_spec import PermutationSpec
from isthmus.symmetry._relabelling import Relabelling
from isthmus.symmetry._spec import AxisGroup, IndexMap, PinnedAxis, Slot, SymmetrySpec
from isthmus.symmetry._trace import Trace, trace
from isthmus.symmetry._verify import Verification, function_change, verify

__all__ = [
    "Couplings",
    "Relabelling",
    "Reordering",
    "Slots",
    "as_couplings",
    "carry_tensor",
    "check_permutations",
    "reordering",
    "AxisGroup",
    "IndexMap",
    "Outputs",
    "PermutationSpec",
    "PinnedAxis",
    "Slot",
    "SymmetrySpec",
    "Trace",
    "Verification",
    "apply",
    "discover",
    "discover_from_trace",
    "function_change",
    "trace",
    "verify",
]
