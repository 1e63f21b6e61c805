"""Autoencoders whose latents are outputs.

``forward`` of an autoencoder encodes and decodes, so its latents look like hidden units, which may be relabelled. They
are not: other networks are trained on them, and ``encode`` and ``decode`` are called apart. What ``encode`` returns is
therefore an output beside the reconstruction, which keeps its order, and with it that of the decoder's input.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from isthmus.errors import ModelError

__all__ = ["with_latents"]

_SEEN: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("what encode returned", default=None)


def with_latents(model: nn.Module) -> nn.Module:
    """Let an autoencoder return its latents too, as ``latents``; any other network is returned as it is."""
    native = type(model)
    if callable(getattr(native, "encode", None)) and callable(getattr(native, "decode", None)):
        model.__class__ = _returning_latents(native)
    return model


@cache
def _returning_latents(native: Any) -> type[nn.Module]:
    """Return a class of the same name whose ``forward`` returns what ``encode`` returned as well."""

    def encode(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = native.encode(self, *args, **kwargs)
        if (seen := _SEEN.get()) is not None:
            seen.append(found)
        return found

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen: list[Any] = []
        token = _SEEN.set(seen)
        try:
            found = native.forward(self, *args, **kwargs)
        finally:
            _SEEN.reset(token)
        latents = tuple(_tensors(seen))
        if not latents:
            raise ModelError(
                f"{native.__name__} does not encode in its forward, so its latents, whose order other networks rely "
                "on, cannot be told from hidden units. Build the network in code, with a forward that returns them."
            )
        return _joined(found, latents)

    def reduced(self: nn.Module, protocol: Any) -> Any:
        return _empty, (native,), *native.__reduce_ex__(self, protocol)[2:]

    own = {"encode": encode, "forward": forward, "__reduce_ex__": reduced}
    return type(native.__name__, (native,), own | {n: getattr(native, n) for n in ("__module__", "__doc__")})


def _empty(native: Any) -> nn.Module:
    """Return an instance without contents, which pickle and copy fill: they do not find the class by its name."""
    made = _returning_latents(native)
    return made.__new__(made)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in what ``encode`` returned: outputs, tuples, and distributions, by their parameters."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(parameters := getattr(value, "parameters", None), Tensor):
        yield parameters
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))


def _joined(found: Any, latents: tuple[Tensor, ...]) -> Any:
    """Return a network's output with its latents."""
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        own = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
        return _output_with_latents(type(found))(**own, latents=latents)
    return (*found, latents) if isinstance(found, tuple) else {"sample": found, "latents": latents}


@cache
def _output_with_latents(kind: type) -> Any:
    return dataclasses.make_dataclass(kind.__name__, [("latents", Any, None)], bases=(kind,))
