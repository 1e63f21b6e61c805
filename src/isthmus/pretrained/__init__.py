"""Real checkpoints of any size: open a model folder, align, relabel and merge it tensor by tensor, write a folder."""

from isthmus.pretrained._adapters import MergedAdapter, are_adapters, merge_adapters
from isthmus.pretrained._align import StoredProblem, align, discover_pair
from isthmus.pretrained._files import MergedFile, merge_files
from isthmus.pretrained._fold import FoldedModel, fold
from isthmus.pretrained._folder import free_target
from isthmus.pretrained._inputs import FoundInput, check_inputs, inspect_input
from isthmus.pretrained._lazy import LazyState, StoredTensor
from isthmus.pretrained._low_rank import WAYS as ADAPTER_WAYS
from isthmus.pretrained._low_rank import AdapterWay
from isthmus.pretrained._open import OpenedModel, is_model_folder, open_model
from isthmus.pretrained._shards import parse_size
from isthmus.pretrained._verify import function_change, verify
from isthmus.pretrained._write import Written, apply, merge

__all__ = [
    "ADAPTER_WAYS",
    "parse_size",
    "free_target",
    "AdapterWay",
    "MergedAdapter",
    "are_adapters",
    "merge_adapters",
    "FoldedModel",
    "FoundInput",
    "LazyState",
    "MergedFile",
    "OpenedModel",
    "StoredTensor",
    "StoredProblem",
    "Written",
    "align",
    "apply",
    "check_inputs",
    "discover_pair",
    "fold",
    "function_change",
    "inspect_input",
    "is_model_folder",
    "merge",
    "merge_files",
    "open_model",
    "verify",
]
