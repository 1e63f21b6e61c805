r"""BatchNorm in evaluation mode, into the layer before it, so that it is left as the identity.

With :math:`s = \gamma / \sqrt{v + \epsilon}` the layer becomes :math:`s W`, :math:`s (b - \mu) + \beta`. What is left
has :math:`\gamma = 1`, :math:`\beta = 0`, :math:`\mu = 0` and a variance chosen so that :math:`v + \epsilon` is 1 in
the tensor's own precision. A layer without a bias leaves the shift in the norm: as its bias, or as minus its mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from isthmus.errors import SymmetryError
from isthmus.folding._edits import EditStep, Filled, LookUp, MapPart, along
from isthmus.folding._graph import LiveWay, described, kind_of, shape_of
from isthmus.folding._moves import StatePart
from isthmus.folding._uses import Refusal, TensorUses
from isthmus.layers import BATCH_NORMS, BatchNorm, Site, find_sites, following_norm, operands_of
from isthmus.symmetry import bound_arguments, module_of, operator_of

__all__ = ["BatchFold", "find_batch_folds", "unit_variance"]


def unit_variance(eps: float, dtype: torch.dtype) -> Tensor:
    """Return a variance that makes 1 with a norm's ``eps``, as nearly as its precision allows; zero-dimensional.

    Rounding ``1 - eps`` leaves an error of at most half of the spacing below 1, which is a quarter of the spacing
    above: the sum rounds to 1 exactly, in the precision of the tensor.
    """
    return torch.tensor(1.0 - eps, dtype=torch.float64).to(dtype)


@dataclass(frozen=True, eq=False)
class BatchFold:
    """A BatchNorm that goes into the layer before it.

    Attributes:
        name: path of the norm's module.
        site: the layer.
        norm: names of the norm's tensors.
    """

    name: str
    site: Site
    norm: BatchNorm

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the norm's tensors."""
        return self.norm.names

    @property
    def into(self) -> tuple[str, ...]:
        """Names of the layer's tensors."""
        return tuple(n for n in (self.site.weight, self.site.bias) if n is not None)

    @property
    def keeps_shift(self) -> bool:
        """Whether the shift stays in the norm, since the layer has no bias."""
        return self.site.bias is None

    def __str__(self) -> str:
        """Return one line."""
        stays = "; its shift stays, since that layer has no bias" if self.keeps_shift else ""
        return f"{self.name}: BatchNorm into {', '.join(self.into)}{stays}"

    def steps(self, state: Mapping[str, Tensor]) -> Iterable[EditStep]:
        """Yield the steps; dtypes of the state are looked at."""
        norm, site = self.norm, self.site
        unit = unit_variance(norm.eps, state[norm.running_var].dtype).double()
        left = float((unit + norm.eps).rsqrt())

        def factor(look: LookUp) -> Tensor:
            return norm.scale(_Looked(look)) / left

        def shift(look: LookUp) -> Tensor:
            bias = None if site.bias is None else look(site.bias)
            return norm.affine(_Looked(look), bias)[1] / (left if site.bias is not None else 1.0)

        if site.bias is not None:
            yield MapPart(site.bias, StatePart(site.bias), lambda own, look: shift(look).to(own))
        yield MapPart(
            site.weight,
            StatePart(site.weight),
            lambda own, look: own * along(own, site.out_axis, factor(look).to(own)),
        )
        yield from self._norm_steps(shift, float(unit), left)

    def _norm_steps(self, shift: object, unit: float, left: float) -> Iterable[EditStep]:
        """Yield the steps that make the norm the identity, or a shift; what they look at changes last."""
        norm = self.norm
        values: dict[str, EditStep] = {}
        if norm.bias is not None:
            values[norm.bias] = Filled(norm.bias, StatePart(norm.bias), 0.0)
        if self.keeps_shift:
            kept = norm.bias or norm.running_mean
            sign = 1.0 if norm.bias is not None else -1.0 / left
            values[kept] = MapPart(kept, StatePart(kept), lambda own, look: sign * shift(look).to(own))  # pyright: ignore
        if norm.bias is not None:
            yield values[norm.bias]
            yield Filled(norm.running_mean, StatePart(norm.running_mean), 0.0)
        else:
            yield values.get(norm.running_mean, Filled(norm.running_mean, StatePart(norm.running_mean), 0.0))
        if norm.weight is not None:
            yield Filled(norm.weight, StatePart(norm.weight), 1.0)
        yield Filled(norm.running_var, StatePart(norm.running_var), unit)

    def inverse_steps(self, original: Mapping[str, Tensor]) -> Iterable[EditStep]:
        """Yield the steps that put the norm's tensors back, whatever the state has in their place by now.

        Args:
            original: the norm's tensors as they were.

        Raises:
            SymmetryError: the scale had a zero.
        """
        norm, site = self.norm, self.site
        before = {name: original[name].double() for name in norm.names}
        scale = norm.scale(before)
        if not bool((scale != 0).all()):
            raise SymmetryError(
                f"Cannot unfold {self.name!r}: {int((scale == 0).sum())} entries of its gain were 0, so what the layer "
                "before it had there is gone. Keep the state as it was before folding."
            )

        def factor(look: LookUp) -> Tensor:
            return norm.scale(_Looked(look)) / scale

        if site.bias is not None:
            # s (b - μ) + β must stay: first with the statistics as they are now, then with the original ones
            def bias(own: Tensor, look: LookUp) -> Tensor:
                now = norm.affine(_Looked(look), own)[1]
                return (now - norm.affine(before)[1]) / scale

            yield MapPart(site.bias, StatePart(site.bias), bias)
        yield MapPart(
            site.weight,
            StatePart(site.weight),
            lambda own, look: own * along(own, site.out_axis, factor(look).to(own)),
        )
        if site.bias is None:
            yield from self._shift_back(before)
        elif norm.bias is not None:
            yield MapPart(norm.bias, StatePart(norm.bias), lambda own, _: before[norm.bias or ""].to(own))
        if site.bias is not None or norm.bias is not None:
            yield MapPart(
                norm.running_mean,
                StatePart(norm.running_mean),
                lambda own, _: before[norm.running_mean].to(own),
            )
        if norm.weight is not None:
            yield MapPart(
                norm.weight, StatePart(norm.weight), lambda own, _: before[norm.weight or ""].to(own)
            )
        yield MapPart(
            norm.running_var, StatePart(norm.running_var), lambda own, _: before[norm.running_var].to(own)
        )

    def _shift_back(self, before: Mapping[str, Tensor]) -> Iterable[EditStep]:
        """Yield the step that lets the norm shift as it does now, once its other tensors are back."""
        norm = self.norm
        if norm.bias is not None:
            plain = {**before, norm.bias: torch.zeros_like(before[norm.bias])}
            yield MapPart(
                norm.bias,
                StatePart(norm.bias),
                lambda own, look: (norm.affine(_Looked(look))[1] - norm.affine(plain)[1]).to(own),
            )
        else:
            yield MapPart(
                norm.running_mean,
                StatePart(norm.running_mean),
                lambda own, look: (-norm.affine(_Looked(look))[1] / norm.scale(before)).to(own),
            )


class _Looked(Mapping[str, Tensor]):
    """The tensors that a step may look at, as a state."""

    def __init__(self, look: LookUp) -> None:
        self._look = look

    def __getitem__(self, name: str) -> Tensor:
        return self._look(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def find_batch_folds(uses: TensorUses) -> tuple[list[BatchFold], list[Refusal]]:
    """Return the BatchNorms that go into the layer before them, and those that stay."""
    found: dict[tuple[str, ...], BatchFold] = {}
    nodes: dict[tuple[str, ...], set[object]] = {}
    for way in uses.ways:
        for site in (*find_sites(way.traced), *_normalised_sites(way)):
            if site.norm is not None and _lives(way, site.name):
                fold = _first_names(uses, BatchFold(_title(way, site.name), site, site.norm))
                found.setdefault((*fold.into, *fold.own), fold)
                nodes.setdefault((*fold.into, *fold.own), set()).update(_operators(way, site.name))
    folds, refusals = list[BatchFold](), list[Refusal]()
    for key, fold in found.items():
        why = _problem(uses, fold, nodes[key])
        if why:
            refusals.append(Refusal(fold.name, "batch norm", why))
        else:
            folds.append(fold)
    taken = {name for fold in found.values() for name in fold.own}
    refusals += [r for way in uses.ways for r in _left(uses, way, taken)]
    return folds, list(dict.fromkeys(refusals))


def _normalised_sites(way: LiveWay) -> Iterable[Site]:
    """Yield the layers with a normalised weight ``g v / |v|`` and a length for each output, as sites of the lengths."""
    tensors = way.traced.tensors
    for node in way.nodes:
        given = operands_of(node)
        weight = None if given is None else given.weight
        if given is None or not isinstance(weight, fx.Node) or kind_of(weight) != "_weight_norm":
            continue
        bound = bound_arguments(weight)
        lengths, bias = tensors.get(bound["g"].name), tensors.get(getattr(given.bias, "name", ""))
        alone = way.users(weight) == [node] and weight not in way.kept
        plain = not given.scaled and (given.bias is None) == (bias is None)
        if lengths is None or int(bound["dim"]) != given.out_axis or not alone or not plain:
            continue
        site = Site(node.name, lengths, bias, given.in_axis, given.out_axis, "", node.name, given.convolution)
        found = following_norm(node, tensors, site.channel_axis_of(len(shape_of(node))))
        if found is not None:
            yield replace(site, norm=found[0], target=found[1])


def _first_names(uses: TensorUses, fold: BatchFold) -> BatchFold:
    """Return the fold with every tensor under the first of its names."""

    def first(name: str | None) -> str | None:
        return None if name is None else uses.names(name)[0]

    norm = fold.norm
    own = BatchNorm(
        first(norm.weight),
        first(norm.bias),
        first(norm.running_mean) or "",
        first(norm.running_var) or "",
        norm.eps,
    )
    site = replace(fold.site, weight=first(fold.site.weight) or "", bias=first(fold.site.bias))
    return BatchFold(fold.name, site, own)


def _lives(way: LiveWay, name: str) -> bool:
    return any(node.name == name for node in way.nodes)


def _operators(way: LiveWay, name: str) -> tuple[fx.Node, ...]:
    """Return a layer's operator, the norm that alone reads it, and what else is given the layer's tensors for it."""
    node = next(n for n in way.nodes if n.name == name)
    weights = (n for n in node.all_input_nodes if kind_of(n) == "_weight_norm")
    return node, next(iter(node.users)), *weights


def _title(way: LiveWay, name: str) -> str:
    norm = _operators(way, name)[1]
    return module_of(norm) or norm.name


def _problem(uses: TensorUses, fold: BatchFold, nodes: set[object]) -> str:
    """Return why a BatchNorm stays: its layer or its own tensors are used elsewhere too."""
    for name in (*fold.into, *fold.own):
        claimed = {use for use, _ in uses.of(name) if use.user in nodes}
        problem = uses.problem(StatePart(name), claimed, f"the layer before {fold.name!r}, or that norm")
        if problem is not None:
            return problem.text
    return ""


def _left(uses: TensorUses, way: LiveWay, taken: set[str]) -> Iterable[Refusal]:
    """Yield the BatchNorms that follow no layer."""
    for node in way.nodes:
        if operator_of(node) not in BATCH_NORMS:
            continue
        norm = BatchNorm.from_node(node, way.traced.tensors)
        name = module_of(node) or node.name
        if norm is None:
            yield Refusal(name, "batch norm", "it uses computed tensors, or the statistics of its input")
        elif uses.names(norm.running_mean)[0] not in taken:
            source = bound_arguments(node)["input"]
            yield Refusal(
                name,
                "batch norm",
                f"it does not follow a layer whose only reader it is, but {described(source)}",
            )
