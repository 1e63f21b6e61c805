"""Reference networks with hand-written symmetries, and planted pairs: what is needed to test a new part."""

from isthmus.testing._branching import densenet, mobilenet, unet
from isthmus.testing._catalogue import (
    REFERENCE_NETWORKS,
    reference_inputs,
    reference_network,
    reference_spec,
)
from isthmus.testing._contracts import check_alignment_contract
from isthmus.testing._law import check_gain_law
from isthmus.testing._plain import mlp, vgg16, vgg16_bn
from isthmus.testing._planted import PlantedPair, perturb, planted_pair, randomise_state
from isthmus.testing._reference import (
    ReferenceComparison,
    ReferenceGroup,
    ReferenceSlot,
    as_symmetry_spec,
    compare_with_reference,
)
from isthmus.testing._residual import groupnorm_resnet, resnet20
from isthmus.testing._transformers import bert, gpt, llama, vit

__all__ = [
    "REFERENCE_NETWORKS",
    "reference_network",
    "reference_inputs",
    "reference_spec",
    "ReferenceGroup",
    "ReferenceSlot",
    "ReferenceComparison",
    "compare_with_reference",
    "as_symmetry_spec",
    "check_alignment_contract",
    "check_gain_law",
    "PlantedPair",
    "planted_pair",
    "perturb",
    "randomise_state",
    "mlp",
    "vgg16",
    "vgg16_bn",
    "resnet20",
    "densenet",
    "unet",
    "mobilenet",
    "groupnorm_resnet",
    "gpt",
    "vit",
    "bert",
    "llama",
]
