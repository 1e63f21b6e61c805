"""A private copy of a network that runs any state of it, and proof that it reads nothing else."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from isthmus.errors import CheckpointError, ModelError
from isthmus.replica._contents import Place, contents, differing, put_back, same_values, take_away
from isthmus.replica._copying import Cast, private_copy
from isthmus.replica._reads import Reads
from isthmus.replica._walk import Hidden, hidden_tensors, storage_key
from isthmus.states import check_same_architecture, state_of

__all__ = [
    "Replica",
    "different_code",
    "differences",
    "empty",
    "in_double",
    "other_inputs",
    "rebuild",
    "require_same_code",
    "with_state",
]

_Module = TypeVar("_Module", bound=nn.Module)
_WAYS = ("clear", "delete")
SAME_CODE = 1e-3
"""Share of the largest output by which two ways of running one state may differ."""
_changes = itertools.count(-1, -1)


class Replica:
    """A private copy of a network, run on any state; the network itself is never run or changed.

    A state is put in by writing into the copy's own tensors, so that whatever else refers to them (views, lists,
    functions, other names) sees it; then the copy goes through ``train()`` and ``eval()``, so that what modules keep
    in evaluation is made anew, and every module gets its mode back.

    The first run examines the copy on the inputs it is given:

    * the tensors that operators read are recorded: none may be one of the caller's;
    * an attribute that the network makes anew, from weights alone, when it is taken away is a cache, and is taken
      away whenever a state is put in;
    * what a run leaves behind on the modules is put back before the next state;
    * after a run with other weights, the state must give the very outputs that it gave before.

    Tensors that pass all this are constants of the network's code.

    Args:
        model: any module.
        cast: gives the dtype of the copy of a floating tensor; by default its own.

    Attributes:
        module: the copy.
        source: the caller's module.
        examined: whether a first run was examined.
        caches: attributes, by module and name, that hold what was computed from weights, found by the examination;
            and how they are taken away.
        writes: whether a run leaves anything changed.
        memory: attributes and buffers that a run leaves changed in a way that depends on the inputs, found likewise.

    Raises:
        ModelError: no module was given.
    """

    module: nn.Module

    def __init__(self, model: nn.Module, cast: Cast | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(
                f"Expected a torch.nn.Module, since its code is run, found {type(model).__name__}. "
                "Load the state into a module."
            )
        self.source, self._random = model, None
        self._copy(cast)

    @classmethod
    def of(cls, model: nn.Module | Replica) -> Replica:
        """Return a private copy of a module, or the one that is given."""
        return model if isinstance(model, Replica) else cls(model)

    def _copy(self, cast: Cast | None) -> None:
        self.module = private_copy(self.source, cast)
        self._cast, self.examined = cast, False
        self._ways: dict[Place, str] = {}
        self._left: dict[Place, str] = {}
        self._pristine: nn.Module | None = None
        self._filled: _Stamp | None = None
        self.caches: dict[Place, str] = {}
        self.memory: tuple[str, ...] = ()
        self.writes = False

    # --- states -------------------------------------------------------------------------------------------------
    def own_state(self) -> dict[str, Tensor]:
        """Return the parameters and saved buffers of the caller's module, detached, under all their names."""
        return {name: tensor.detach() for name, tensor in _saved(self.source)}

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Check that a state can be put in.

        Raises:
            CheckpointError: the keys are not those of the network, or tensors that are one in the network differ.
            ShapeError: a tensor has another shape.
        """
        check_same_architecture(state_of(self.source), state, "the model", "the state")
        own = dict(_saved(self.module))
        unknown = [name for name in state if name not in own]
        if unknown:
            raise CheckpointError(
                f"The state's key {unknown[0]!r} is no parameter or buffer of the model (a hook renames keys in "
                "its state_dict?), so it cannot be put in place. Pass a model without such hooks."
            )
        groups = _sharing(own)
        if groups:
            self.fill(state)
            refuse_torn(own, state, groups)

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Put a checked state in."""
        own = dict(_saved(self.module))
        wanted = {name: t.dtype for name, t in state.items() if t.is_floating_point()}
        if any(own[name].dtype != dtype for name, dtype in wanted.items() if name in own):
            dtypes = {id(t): wanted[name] for name, t in _saved(self.source) if name in wanted}
            self._copy(lambda t: dtypes.get(id(t), t.dtype))
            own = dict(_saved(self.module))
        self._reset()
        done: set[int] = set()
        with torch.no_grad():
            for name, tensor in own.items():
                if name in state and id(tensor) not in done:
                    done.add(id(tensor))
                    tensor.copy_(state[name])
        self.rebuild()
        self._filled = _Stamp(state)

    def rebuild(self) -> None:
        """Let the modules make anew what they keep in evaluation, by ``train()`` and ``eval()``."""
        rebuild(self.module)

    def poison(self) -> None:
        """Fill the copy's floating tensors with NaN, so that what is computed from them is seen."""
        self._reset()
        with torch.no_grad():
            for _, tensor in _saved(self.module):
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
        self._filled = None
        self.rebuild()

    def _reset(self) -> None:
        if self._pristine is not None:
            put_back(self.module, self._pristine, self._left)
        empty(self.module, self._ways)

    # --- runs ---------------------------------------------------------------------------------------------------
    def run_on(self, state: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a state that was checked; what an earlier run left behind is not seen.

        Raises:
            ModelError: (first run) the network reads more than its state; it is said what.
        """
        if self.writes or self._filled is None or not self._filled.is_of(state):
            self.fill(state)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the copy as it is, on random numbers of its own; the caller's generators stay where they are."""
        with self._own_random_numbers(), _no_shared_parametrizations(), torch.no_grad():
            return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        cuda = {t.device for t in self.module.parameters() if t.device.type == "cuda"}
        places: list[Any] = [torch.random, *(_OnDevice(d) for d in cuda)]
        theirs = [place.get_rng_state() for place in places]
        for place, own in zip(places, self._random or theirs, strict=True):
            place.set_rng_state(own)
        try:
            yield
        finally:
            self._random = [place.get_rng_state() for place in places]
            for place, own in zip(places, theirs, strict=True):
                place.set_rng_state(own)

    # --- examination --------------------------------------------------------------------------------------------
    def examine(
        self,
        state: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        eras: bool = True,
    ) -> None:
        """Run some examples and see that the copy reads nothing but the state (see the class); done once.

        Args:
            state: a checked state.
            args: positional inputs.
            kwargs: keyword inputs.
            eras: whether other weights are run in between; whoever compares states anyway need not.

        Raises:
            ModelError: it reads a tensor of the caller's, or keeps something that cannot be named.
        """
        if self.examined:
            return
        self.fill(state)
        before, versions = contents(self.module), self._versions()
        hidden = {storage_key(h.tensor): h for h in hidden_tensors(self.module)}
        reads = Reads((args, kwargs))
        with reads:
            first = _leaves(self.run(*args, **kwargs))
        self._refuse_reads_of_callers(reads)
        written = [name for name, t in registered_once(self.module) if versions.get(name) != _version(t)]
        self.rebuild()
        after = contents(self.module)
        left = differing(before, after)
        saved = {storage_key(t) for _, t in _saved(self.module)}
        suspects = [h for key, h in hidden.items() if key in reads.found and key not in saved]
        if suspects:
            self.fill(state)
            self._find_caches(suspects, args, kwargs)
            left = {place: words for place, words in left.items() if place not in self._ways}
        if left:
            self._left, self._pristine = left, private_copy(self.source, self._cast)
        memory = self._of_inputs(left, state, after, args, kwargs)
        self.caches = {**self._ways, **{p: self._way_back(p) for p in left if p not in memory}}
        self.memory = (*written, *(_joined(place) for place in memory))
        self.writes = bool(written or left)
        if self._ways:
            self.fill(state)
            first = _leaves(self.run(*args, **kwargs))
        if eras:
            self._refuse_memory(state, first, args, kwargs)
        self.examined = True
        self.fill(state)

    def changing(self) -> set[Place]:
        """Return the attributes, of an examined copy, that depend on weights or that runs change."""
        self.fill(self.own_state())
        before = contents(self.module)
        self.poison()
        return {*differing(before, contents(self.module)), *self._ways, *self._left}

    def _versions(self) -> dict[str, int]:
        return {name: _version(t) for name, t in registered_once(self.module)}

    def _refuse_reads_of_callers(self, reads: Reads) -> None:
        theirs = {storage_key(t): name for name, t in _saved(self.source)}
        mine = {storage_key(t) for _, t in _saved(self.module)}
        for key in reads.found:
            if key in theirs and key not in mine:
                raise ModelError(
                    f"{type(self.source).__name__} reads {theirs[key]!r} through a global variable or an object "
                    "that captured it, not as an attribute of its module, so it would keep these values whatever "
                    "state it is run with. Read the tensor from the module, as self.<name>, wherever it is used."
                )

    def _find_caches(self, suspects: list[Hidden], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take attributes away, those of one class and name together, and see whether they come back from weights."""
        modules = dict(self.module.named_modules())
        kinds: dict[tuple[type, str], list[Place]] = {}
        self.rebuild()
        same = {id(h.tensor) for h in hidden_tensors(self.module)}
        for hidden in (h for h in suspects if id(h.tensor) in same):  # the others are made anew anyway
            kind = (type(modules[hidden.module]), hidden.attribute)
            kinds.setdefault(kind, []).append((hidden.module, hidden.attribute))
        for places in kinds.values():
            for way in _WAYS:
                if self._comes_back(dict.fromkeys(places), way, args, kwargs):
                    self._ways.update(dict.fromkeys(places, way))
                    break

    def _way_back(self, place: Place) -> str:
        module = self.source.get_submodule(place[0])
        return "clear" if place[1] in module._buffers or place[1] in vars(module) else "delete"

    def _of_inputs(
        self, left: Mapping[Place, str], state: Any, after: Any, args: Any, kwargs: Any
    ) -> set[Place]:
        """Return what a run leaves behind that other inputs leave with other values."""
        if not left:
            return set()
        self.fill(state)
        other_args, other_kwargs = other_inputs((args, kwargs))
        try:
            self.run(*other_args, **other_kwargs)
        except Exception:  # inputs that the network refuses: then nothing is known
            return set(left)
        self.rebuild()
        other = contents(self.module)
        return {
            place for place in left if differing({place: after.get(place, {})}, {place: other.get(place, {})})
        }

    def _comes_back(self, places: Mapping[Place, None], way: str, args: Any, kwargs: Any) -> bool:
        modules = dict(self.module.named_modules())
        undone = [undo for p, a in places if (undo := take_away(modules[p], a, way)) is not None]
        if not undone:
            return False
        found = []
        try:
            for inputs in ((args, kwargs), other_inputs((args, kwargs))):
                for path, attribute in places:
                    take_away(modules[path], attribute, way)
                self.rebuild()
                self.run(*inputs[0], **inputs[1])
                made = contents(self.module)
                found.append({place: made.get(place, {}) for place in places})
        except Exception:  # whatever the network raises without it: then it is no cache
            found = []
        for undo in undone:
            undo()
        if not found or differing(*found):
            return False
        return all(any(isinstance(v, Tensor) for v in leaves.values()) for leaves in found[0].values())

    def _refuse_memory(self, state: Mapping[str, Tensor], first: list[Any], args: Any, kwargs: Any) -> None:
        """See that a state which comes second gives what it gives in a copy that never held another."""
        self.fill(state)
        if _differ(first, _leaves(self.run(*args, **kwargs))):
            return  # random: whoever needs the same outputs twice checks that
        own = dict(registered_once(self.module))
        other = {n: t * 1.5 + 0.25 if t.is_floating_point() else t.clone() for n, t in own.items()}
        with torch.no_grad():
            self.fill(other)
        newcomer = private_copy(self.module)
        found = []
        for module in (self.module, newcomer):
            try:
                with self._own_random_numbers(), _no_shared_parametrizations(), torch.no_grad():
                    found.append(_leaves(module(*args, **kwargs)))
            except Exception:  # other weights may break the network
                return
        if _differ(*found):
            raise ModelError(
                f"{type(self.source).__name__} keeps something computed from weights outside its module (a method with "
                "functools.lru_cache, a dictionary keyed by module?): after other weights had been run, a state gave "
                "other outputs than in a new copy. Compute it in forward, or keep it on the module and drop it in "
                "train()."
            )


class _OnDevice:
    """The generator of one CUDA device, with the interface of :mod:`torch.random`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def get_rng_state(self) -> Tensor:
        return torch.cuda.get_rng_state(self._device)

    def set_rng_state(self, state: Tensor) -> None:
        torch.cuda.set_rng_state(state, self._device)


def rebuild(model: nn.Module) -> None:
    """Send a module through ``train()`` and ``eval()`` and give every part its mode back.

    Modules that keep something in evaluation (a bias laid out, merged weights) drop it in ``train()`` and make it in
    ``eval()``. A module whose ``train`` refuses, as exported programs do, keeps nothing of this kind.

    Args:
        model: changed in place.
    """
    modes = [(m, m.training) for m in model.modules()]
    with torch.no_grad():
        for method in (model.train, model.eval):
            with contextlib.suppress(NotImplementedError):
                method()
    for module, mode in modes:
        if module.training != mode:
            module.training = mode


def empty(model: nn.Module, caches: Mapping[Place, str]) -> None:
    """Take caches, as an examination found them, away from a module of that architecture, in place."""
    modules = dict(model.named_modules())
    held = {(h.module, h.attribute) for h in hidden_tensors(model)}
    for (path, attribute), way in caches.items():
        if (path, attribute) in held:
            take_away(modules[path], attribute, way)


def with_state(
    model: _Module, state: Mapping[str, Tensor], caches: Mapping[Place, str] | None = None
) -> _Module:
    """Return a private copy of a module that holds a state, with what it keeps in evaluation made anew.

    Args:
        model: any module; not changed.
        state: its tensors by name; cast to the module's dtypes.
        caches: what an examination found to be computed from weights, and not made anew by ``train()`` and ``eval()``.

    Raises:
        CheckpointError: tensors that share memory in the module differ in the state.
        RuntimeError: other keys or shapes.
    """
    filled = private_copy(model)
    filled.load_state_dict(dict(state))
    own = dict(_saved(filled))
    refuse_torn(own, state, _sharing(own))
    empty(filled, caches or {})
    rebuild(filled)
    return filled


def in_double(model: _Module) -> _Module:
    """Return a private copy of a module in double precision, with what it keeps in evaluation made anew."""
    copied = private_copy(model, lambda t: torch.float64)
    rebuild(copied)
    return copied


def differences(one: nn.Module, two: nn.Module) -> list[str]:
    """Name what two networks of one architecture hold differently besides their states: settings and tensors."""
    first, second = (private_copy(m) for m in (one, two))
    for module in (first, second):
        rebuild(module)
    found = list(differing(contents(first), contents(second)).values())
    kinds = zip(first.named_modules(), second.named_modules(), strict=False)
    classes = [
        f"{path or 'the network'} ({type(m).__name__} against {type(n).__name__})"
        for (path, m), (_, n) in kinds
        if type(m) is not type(n)
    ]
    return classes + found


def require_same_code(
    model_a: nn.Module, model_b: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Check that B's tensors compute in A's code what they compute in B's.

    Raises:
        ModelError: they do not; what the two modules hold differently besides their states is named.
    """
    a, b = Replica(model_a), Replica(model_b)
    state = b.own_state()
    a.check(state)
    outputs = []
    for replica in (b, a):
        replica.examine(state, args, kwargs, eras=False)
        outputs.append(_leaves(replica.run_on(state, args, kwargs)))
    if _differ(*outputs, tolerance=SAME_CODE):
        raise ModelError(different_code(model_a, model_b, "outputs differ"))


def different_code(model_a: nn.Module, model_b: nn.Module, how: str, limit: int = 4) -> str:
    """Return the words on a B that computes something else than its tensors do in A's code."""
    found = differences(model_a, model_b)
    more = f" and {len(found) - limit} more" if len(found) > limit else ""
    what = (
        f"What A and B hold differently besides their states: {', '.join(found[:limit])}{more}."
        if found
        else "Their modules hold the same values besides the state, so the code differs."
    )
    return (
        f"Model B computes something else than its tensors do in model A's code: {how}. {what} Both must be built by "
        "the same code with the same settings."
    )


def refuse_torn(own: Mapping[str, Tensor], state: Mapping[str, Tensor], groups: list[list[str]]) -> None:
    """Refuse a state whose tensors differ where those of a module, which holds it, share memory.

    Raises:
        CheckpointError: naming two of them.
    """
    for names in groups:
        torn = [
            n for n in names if n in state and not same_values(own[n].detach(), state[n].detach().to(own[n]))
        ]
        if not torn:
            continue
        other = next(n for n in names if n != torn[0])
        one = own[other] is own[torn[0]]
        pair = " and ".join(repr(n) for n in names if n in (other, torn[0]))
        raise CheckpointError(
            f"{pair} {'are one tensor' if one else 'share memory'} in the model but differ in the state. "
            "Give both the same values, or untie them in the model."
        )


def registered_once(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the saved tensors under their first name."""
    done: set[int] = set()
    for name, tensor in _saved(model):
        if id(tensor) not in done:
            done.add(id(tensor))
            yield name, tensor


def _saved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and saved buffers under all their names."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for leaf, tensor in module._parameters.items():
            if tensor is not None:
                yield start + leaf, tensor
        for leaf, tensor in module._buffers.items():
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                yield start + leaf, tensor


def _sharing(own: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of saved tensors that share memory, in groups."""
    groups: dict[int, list[str]] = {}
    for name, tensor in own.items():
        key = storage_key(tensor)
        if key is not None:
            groups.setdefault(key, []).append(name)
    return [names for names in groups.values() if len(names) > 1]


class _Stamp:
    """Tells whether a state is the one that was put in, and unchanged since."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._tensors = list(state.values())  # held, so that no other tensor gets the identity of one of them
        self._versions = [_version(t) for t in self._tensors]

    def is_of(self, state: Mapping[str, Tensor]) -> bool:
        if len(state) != len(self._tensors):
            return False
        pairs = zip(state.values(), self._tensors, strict=True)
        return all(a is b for a, b in pairs) and self._versions == [_version(t) for t in self._tensors]


def _version(tensor: Tensor) -> int:
    """Return how often a tensor was written; tensors that do not count are taken to change all the time."""
    try:
        return tensor._version
    except RuntimeError:
        return next(_changes)


def _leaves(output: Any) -> list[Any]:
    if isinstance(output, Mapping) and not isinstance(output, dict):
        output = dict(output)
    return [t.detach().clone() if isinstance(t, Tensor) else t for t in pytree.tree_leaves(output)]


def _differ(one: list[Any], two: list[Any], tolerance: float = 0.0) -> bool:
    """Tell whether outputs differ by more than the root of the machine precision, or ``tolerance``, of the largest."""
    tensors = [[t for t in leaves if isinstance(t, Tensor)] for leaves in (one, two)]
    if [t.shape for t in tensors[0]] != [t.shape for t in tensors[1]]:
        return True
    return not all(_close(a, b, tolerance) for a, b in zip(*tensors, strict=True))


def _close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    if not (one.is_floating_point() or one.is_complex()):
        return torch.equal(one, two)
    allowed = max(torch.finfo(one.dtype).eps ** 0.5, tolerance)
    largest = one[one.isfinite()].abs().max() if one.isfinite().any() else torch.tensor(0.0)
    return torch.allclose(one, two, rtol=0.0, atol=allowed * float(largest), equal_nan=True)


def other_inputs(inputs: Any) -> Any:
    """Return inputs of the same form with other values: examples in reverse order, real numbers changed too."""

    def other(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        flipped = value.flip(0)
        return flipped * 0.75 + 0.125 if value.is_floating_point() else flipped

    return pytree.tree_map(other, inputs)


def _joined(place: Place) -> str:
    return ".".join(part for part in place if part)


@contextlib.contextmanager
def _no_shared_parametrizations() -> Iterator[None]:
    """Hide what ``parametrize.cached()`` has kept, which may come from another state."""
    kept = getattr(parametrize, "_cache", None)
    if kept is None:
        yield
        return
    parametrize._cache = {}
    try:
        yield
    finally:
        parametrize._cache = kept
