"""Symmetry of networks: discover which axes move together, verify it by running, apply it to a state."""

from isthmus.symmetry._apply import apply
from isthmus.symmetry._discover import Outputs, discover, discover_from_trace
from isthmus.symmetry._permutation_spec import PermutationSpec
from isthmus.symmetry._spec import AxisGroup, IndexMap, PinnedAxis, Slot, SymmetrySpec
from isthmus.symmetry._trace import Trace, bound_arguments, module_of, operator_of, trace
from isthmus.symmetry._verify import Verification, function_change, verify

__all__ = [
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
    "bound_arguments",
    "discover",
    "discover_from_trace",
    "function_change",
    "module_of",
    "operator_of",
    "trace",
    "verify",
]
