"""Real checkpoints of any size: open a model folder, align, relabel and merge it tensor by tensor, write a folder."""

from isthmus.pretrained._align import StoredWeights, align
from isthmus.pretrained._lazy import LazyState, StoredTensor
from isthmus.pretrained._open import OpenedModel, is_model_folder, open_model
from isthmus.pretrained._verify import function_change, verify
from isthmus.pretrained._write import Written, apply, merge

__all__ = [
    "LazyState",
    "OpenedModel",
    "StoredTensor",
    "StoredWeights",
    "Written",
    "align",
    "apply",
    "function_change",
    "is_model_folder",
    "merge",
    "open_model",
    "verify",
]
