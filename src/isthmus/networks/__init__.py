"""Networks that serve as references: small ones of every kind, for tests, examples and studies."""

from isthmus.networks._branching import (
    densenet,
    densenet_reference,
    mobilenet,
    mobilenet_reference,
    unet,
    unet_reference,
)
from isthmus.networks._plain import (
    mlp,
    mlp_reference,
    vgg16,
    vgg16_bn,
    vgg_reference,
)
from isthmus.networks._reference import (
    ReferenceComparison,
    ReferenceGroup,
    ReferenceSlot,
    as_symmetry_spec,
    compare_with_reference,
)
from isthmus.networks._residual import (
    groupnorm_reference,
    groupnorm_resnet,
    resnet20,
    resnet20_reference,
)
from isthmus.networks._shuffled import shufflenet, shufflenet_reference
from isthmus.networks._transformers import (
    bert,
    gpt,
    llama,
    vit,
)

__all__ = [
    "ReferenceComparison",
    "ReferenceGroup",
    "ReferenceSlot",
    "as_symmetry_spec",
    "compare_with_reference",
    "bert",
    "densenet",
    "densenet_reference",
    "gpt",
    "groupnorm_reference",
    "groupnorm_resnet",
    "llama",
    "mlp",
    "mlp_reference",
    "mobilenet",
    "mobilenet_reference",
    "resnet20",
    "resnet20_reference",
    "shufflenet",
    "shufflenet_reference",
    "unet",
    "unet_reference",
    "vgg16",
    "vgg16_bn",
    "vgg_reference",
    "vit",
]
