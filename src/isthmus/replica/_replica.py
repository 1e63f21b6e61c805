"""A private copy of a network that runs any state of it, and proof that it reads nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from isthmus.errors import CheckpointError, ModelError
from isthmus.replica._contents import AttributePlace, contents, differing, put_back, take_away
from isthmus.replica._copying import Cast, private_copy
from isthmus.replica._loading import empty, rebuild
from isthmus.replica._outputs import differ, other_inputs, output_leaves
from isthmus.replica._reads import Reads
from isthmus.replica._states import Stamp, refuse_torn, saved, saved_once, sharing, version
from isthmus.replica._walk import Hidden, hidden_tensors, storage_key
from isthmus.states import check_same_architecture, state_of

__all__ = ["Replica"]

_WAYS = ("clear", "delete")


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
        self._ways: dict[AttributePlace, str] = {}
        self._left: dict[AttributePlace, str] = {}
        self._pristine: nn.Module | None = None
        self._filled: Stamp | None = None
        self.caches: dict[AttributePlace, str] = {}
        self.memory: tuple[str, ...] = ()
        self.writes = False

    # --- states -------------------------------------------------------------------------------------------------
    def own_state(self) -> dict[str, Tensor]:
        """Return the parameters and saved buffers of the caller's module, detached, under all their names."""
        return {name: tensor.detach() for name, tensor in saved(self.source)}

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Check that a state can be put in.

        Raises:
            CheckpointError: the keys are not those of the network, or tensors that are one in the network differ.
            ShapeError: a tensor has another shape.
        """
        check_same_architecture(state_of(self.source), state, "the model", "the state")
        own = dict(saved(self.module))
        unknown = [name for name in state if name not in own]
        if unknown:
            raise CheckpointError(
                f"The state's key {unknown[0]!r} is no parameter or buffer of the model (a hook renames keys in "
                "its state_dict?), so it cannot be put in place. Pass a model without such hooks."
            )
        groups = sharing(own)
        if groups:
            self.fill(state)
            refuse_torn(own, state, groups)

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Put a checked state in."""
        own = dict(saved(self.module))
        wanted = {name: t.dtype for name, t in state.items() if t.is_floating_point()}
        if any(own[name].dtype != dtype for name, dtype in wanted.items() if name in own):
            dtypes = {id(t): wanted[name] for name, t in saved(self.source) if name in wanted}
            self._copy(lambda t: dtypes.get(id(t), t.dtype))
            own = dict(saved(self.module))
        self._reset()
        done: set[int] = set()
        with torch.no_grad():
            for name, tensor in own.items():
                if name in state and id(tensor) not in done:
                    done.add(id(tensor))
                    tensor.copy_(state[name])
        self.rebuild()
        self._filled = Stamp(state)

    def rebuild(self) -> None:
        """Let the modules make anew what they keep in evaluation, by ``train()`` and ``eval()``."""
        rebuild(self.module)

    def poison(self) -> None:
        """Fill the copy's floating tensors with NaN, so that what is computed from them is seen."""
        self._reset()
        with torch.no_grad():
            for _, tensor in saved(self.module):
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
            first = output_leaves(self.run(*args, **kwargs))
        self._refuse_reads_of_callers(reads)
        written = [name for name, t in saved_once(self.module) if versions.get(name) != version(t)]
        self.rebuild()
        after = contents(self.module)
        left = differing(before, after)
        own = {storage_key(t) for _, t in saved(self.module)}
        suspects = [h for key, h in hidden.items() if key in reads.found and key not in own]
        if suspects:
            self.fill(state)
            self._find_caches(suspects, args, kwargs)
            left = {place: words for place, words in left.items() if place not in self._ways}
        if left and self._settles(left, before, after, args, kwargs):
            left = {}
        if left:
            self._left, self._pristine = left, private_copy(self.source, self._cast)
        memory = self._of_inputs(left, state, after, args, kwargs)
        self.caches = {**self._ways, **{p: self._way_back(p) for p in left if p not in memory}}
        self.memory = (*written, *(_joined(place) for place in memory))
        self.writes = bool(written or left)
        if self._ways:
            self.fill(state)
            first = output_leaves(self.run(*args, **kwargs))
        if eras:
            self._refuse_memory(state, first, args, kwargs)
        self.examined = True
        self.fill(state)

    def computed(self) -> set[AttributePlace]:
        """Return the attributes, of an examined copy, that ``train()`` and ``eval()`` compute from weights."""
        self.fill(self.own_state())
        before = contents(self.module)
        self.poison()
        return set(differing(before, contents(self.module)))

    def written(self) -> set[AttributePlace]:
        """Return the attributes, of an examined copy, that runs fill or change."""
        return {*self._ways, *self._left}

    def _versions(self) -> dict[str, int]:
        return {name: version(t) for name, t in saved_once(self.module)}

    def _refuse_reads_of_callers(self, reads: Reads) -> None:
        theirs = {storage_key(t): name for name, t in saved(self.source)}
        mine = {storage_key(t) for _, t in saved(self.module)}
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
        kinds: dict[tuple[type, str], list[AttributePlace]] = {}
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

    def _settles(
        self, left: Mapping[AttributePlace, str], before: Any, after: Any, args: Any, kwargs: Any
    ) -> bool:
        """Tell whether a run leaves nothing but flags and numbers which another run, on other inputs, leaves alone."""
        values = (v for seen in (before, after) for place in left for v in seen.get(place, {}).values())
        if any(isinstance(v, Tensor) for v in values):
            return False
        other_args, other_kwargs = other_inputs((args, kwargs))
        try:
            self.run(*other_args, **other_kwargs)
        except Exception:  # inputs that the network refuses: then nothing is known
            return False
        self.rebuild()
        again = contents(self.module)
        return not differing({p: after.get(p, {}) for p in left}, {p: again.get(p, {}) for p in left})

    def _way_back(self, place: AttributePlace) -> str:
        module = self.source.get_submodule(place[0])
        return "clear" if place[1] in module._buffers or place[1] in vars(module) else "delete"

    def _of_inputs(
        self, left: Mapping[AttributePlace, str], state: Any, after: Any, args: Any, kwargs: Any
    ) -> set[AttributePlace]:
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

    def _comes_back(self, places: Mapping[AttributePlace, None], way: str, args: Any, kwargs: Any) -> bool:
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
        if differ(first, output_leaves(self.run(*args, **kwargs))):
            return  # random: whoever needs the same outputs twice checks that
        own = dict(saved_once(self.module))
        other = {n: t * 1.5 + 0.25 if t.is_floating_point() else t.clone() for n, t in own.items()}
        with torch.no_grad():
            self.fill(other)
        newcomer = private_copy(self.module)
        found = []
        for module in (self.module, newcomer):
            try:
                with self._own_random_numbers(), _no_shared_parametrizations(), torch.no_grad():
                    found.append(output_leaves(module(*args, **kwargs)))
            except Exception:  # other weights may break the network
                return
        if differ(*found):
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


def _joined(place: AttributePlace) -> str:
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
