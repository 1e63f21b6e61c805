"""Symmetry of networks: discover which axes move together, verify it by running, apply it to a state."""

from isthmus.symmetry._acts import Acts
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
from isthmus.symmetry._contractions import Contraction, contraction_of
from isthmus.symmetry._discover import activation_name, discover, discover_from_trace
from isthmus.symmetry._elements import random_element
from isthmus.symmetry._listed import DROPOUTS, SAME_ENTRIES, SUMS
from isthmus.symmetry._operation import Operation, rule
from isthmus.symmetry._outputs import NamedOutputs, Outputs, named_outputs, output_reader
from isthmus.symmetry._permutation_spec import PermutationSpec
from isthmus.symmetry._relabelling import Relabelling
from isthmus.symmetry._runner import DoublePrecision, noisy_input, output_change, perturbation
from isthmus.symmetry._slots import AxisGroup, IndexMap, Limit, PinnedAxis, Slot
from isthmus.symmetry._spec import SymmetrySpec
from isthmus.symmetry._strict import strict_rules
from isthmus.symmetry._trace import Trace, bound_arguments, module_of, operator_of, trace
from isthmus.symmetry._values import Value
from isthmus.symmetry._verify import (
    EditChange,
    Runs,
    Verification,
    drawn_elements,
    drawn_relabellings,
    edit_change,
    function_change,
    verification_of,
    verified,
    verify,
)

__all__ = [
    "DROPOUTS",
    "SAME_ENTRIES",
    "SUMS",
    "Contraction",
    "contraction_of",
    "Acts",
    "AxisGroup",
    "Couplings",
    "DoublePrecision",
    "EditChange",
    "IndexMap",
    "Limit",
    "NamedOutputs",
    "Operation",
    "Outputs",
    "PermutationSpec",
    "PinnedAxis",
    "Relabelling",
    "Reordering",
    "Runs",
    "Slot",
    "Slots",
    "SymmetrySpec",
    "Trace",
    "Value",
    "Verification",
    "activation_name",
    "apply",
    "as_couplings",
    "bound_arguments",
    "carry_tensor",
    "check_permutations",
    "discover",
    "discover_from_trace",
    "drawn_elements",
    "drawn_relabellings",
    "edit_change",
    "function_change",
    "module_of",
    "named_outputs",
    "output_reader",
    "noisy_input",
    "operator_of",
    "output_change",
    "perturbation",
    "random_element",
    "reordering",
    "rule",
    "strict_rules",
    "trace",
    "verification_of",
    "verified",
    "verify",
]
