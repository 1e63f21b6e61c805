"""Reference networks with hand-written symmetries, and planted pairs: what is needed to test a new part."""

from isthmus.networks import (
    ReferenceComparison,
    ReferenceGroup,
    ReferenceSlot,
    as_symmetry_spec,
    bert,
    compare_with_reference,
    densenet,
    gpt,
    groupnorm_resnet,
    llama,
    mlp,
    mobilenet,
    resnet20,
    unet,
    vgg16,
    vgg16_bn,
    vit,
)
from isthmus.testing._catalogue import (
    REFERENCE_NETWORKS,
    reference_inputs,
    reference_network,
    reference_spec,
)
from isthmus.testing._contracts import check_alignment_contract
from isthmus.testing._law import check_gain_law
from isthmus.testing._planted import PlantedPair, perturb, planted_pair, randomise_state

__all__ = [
    "REFERENCE_NETWORKS",
    "check_alignment_contract",
    "reference_network",
    "reference_inputs",
    "reference_spec",
    "ReferenceGroup",
    "ReferenceSlot",
    "ReferenceComparison",
    "compare_with_reference",
    "as_symmetry_spec",
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
