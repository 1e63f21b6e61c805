"""Private copies of networks: whatever runs a state runs it in one, and the caller's module stays as it is.

A module may keep more than its parameters and buffers: what it computed from them in evaluation, tensors in lists and
functions, views of one another's memory. A :class:`Replica` is filled in place, made to compute anew what it keeps,
and examined: it reads nothing but the state.
"""

from isthmus.replica._code import differences, different_code, require_same_code
from isthmus.replica._contents import contents
from isthmus.replica._copying import hollow_copy, private_copy
from isthmus.replica._loading import empty, in_double, rebuild, with_state
from isthmus.replica._outputs import other_inputs
from isthmus.replica._replica import Replica
from isthmus.replica._walk import Hidden, hidden_tensors, registered, storage_key

__all__ = [
    "Hidden",
    "Replica",
    "contents",
    "different_code",
    "differences",
    "empty",
    "hidden_tensors",
    "hollow_copy",
    "in_double",
    "other_inputs",
    "private_copy",
    "rebuild",
    "registered",
    "require_same_code",
    "storage_key",
    "with_state",
]
