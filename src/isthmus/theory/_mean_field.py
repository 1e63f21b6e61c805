r"""Two-layer networks in the mean-field scaling: neurons, and stochastic gradient descent on clouds of them.

A network is the mean over its neurons, :math:`f_N(x) = \frac1N \sum_i \sigma_*(x; \theta_i)`, so a cloud of
neurons, shape ``(N, D)``, is the whole network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from scipy.special import ndtr, ndtri

from isthmus.errors import DataError
from isthmus.theory._inputs import FloatArray, read_integer, read_number

__all__ = ["SharedDraws", "MeanFieldSettings", "Neuron", "TanhNeuron", "mean_field_pairs", "mean_field_sgd"]
__all__ += ["reference_target"]

SharedDraws = Literal["independent", "same_data", "same_init"]
"""Which random draws two runs have in common: none, the data, or the start."""

_CLIP = 3.0
"""Standard deviations at which the initial Gaussian is truncated: the theory asks for bounded support."""

_CURVATURE_TANH = 4 / (3 * math.sqrt(3))


class Neuron(Protocol):
    """What the simulator needs to know about one neuron.

    Leading axes broadcast: parameters ``(..., N, D)`` and inputs ``(..., n, d)``.
    """

    @property
    def dimension(self) -> int:
        """Number of parameters ``D``."""
        ...

    def value(self, theta: FloatArray, x: FloatArray) -> FloatArray:
        """Return the output of every neuron on every input, shape ``(..., n, N)``."""
        ...

    def weighted_gradient(self, theta: FloatArray, x: FloatArray, weights: FloatArray) -> FloatArray:
        """Return the gradient in the parameters, summed over inputs with ``weights`` ``(..., n, N)``."""
        ...

    def curvature(self, x: FloatArray) -> FloatArray:
        """Return a bound on the norm of the Hessian in the parameters, shape ``(..., n)``."""
        ...

    def lipschitz(self, x: FloatArray) -> FloatArray:
        """Return a bound on the norm of the gradient in the parameters, shape ``(..., n)``."""
        ...


@dataclass(frozen=True)
class TanhNeuron:
    r"""The bounded neuron :math:`\tanh(a) \tanh(\langle w, x \rangle + b)` with parameters ``(a, w, b)``.

    Attributes:
        inputs: number ``d`` of inputs; the neuron has ``D = d + 2`` parameters.
    """

    inputs: int

    @property
    def dimension(self) -> int:
        """Number of parameters ``D``."""
        return self.inputs + 2

    def value(self, theta: FloatArray, x: FloatArray) -> FloatArray:
        """Return the output of every neuron on every input, shape ``(..., n, N)``."""
        return np.tanh(theta[..., None, :, 0]) * np.tanh(self._pre_activation(theta, x))

    def weighted_gradient(self, theta: FloatArray, x: FloatArray, weights: FloatArray) -> FloatArray:
        """Return the gradient in the parameters, summed over inputs with ``weights`` ``(..., n, N)``."""
        outer = np.tanh(theta[..., None, :, 0])
        inner = np.tanh(self._pre_activation(theta, x))
        gradient = np.empty(np.broadcast_shapes(theta.shape, (*inner.shape[:-2], *theta.shape[-2:])))
        gradient[..., 0] = (weights * inner * (1 - outer**2)).sum(-2)
        through = weights * outer * (1 - inner**2)
        gradient[..., 1:-1] = np.swapaxes(through, -1, -2) @ x
        gradient[..., -1] = through.sum(-2)
        return gradient

    def curvature(self, x: FloatArray) -> FloatArray:
        r"""Return :math:`M_2(x)`, the largest eigenvalue of ``[[c, r], [r, c r^2]]``, shape ``(..., n)``.

        Here :math:`c = 4 / 3\sqrt3` bounds :math:`|\tanh''|` and :math:`r^2 = \lVert x \rVert^2 + 1`.
        """
        r2 = (x**2).sum(-1) + 1
        trace, gap = _CURVATURE_TANH * (1 + r2), _CURVATURE_TANH * (1 - r2)
        return (trace + np.sqrt(gap**2 + 4 * r2)) / 2

    def lipschitz(self, x: FloatArray) -> FloatArray:
        r"""Return :math:`r = (\lVert x \rVert^2 + 1)^{1/2}`, shape ``(..., n)``.

        With :math:`p = \tanh^2 a` and :math:`q = \tanh^2 h` the squared norm of the gradient is
        :math:`(1-p)^2 q + p (1-q)^2 r^2 \le r^2`.
        """
        return np.sqrt((x**2).sum(-1) + 1)

    def _pre_activation(self, theta: FloatArray, x: FloatArray) -> FloatArray:
        return x @ np.swapaxes(theta[..., 1:-1], -1, -2) + theta[..., None, :, -1]


def reference_target(x: FloatArray) -> FloatArray:
    r"""Return :math:`0.8 \tanh(1.5 x_1) + 0.4 \cos(2 x_2) - 0.3`, the target of the reference experiments.

    **[O]**, an example without any assumption of the theory; inputs of shape ``(..., d)`` with ``d`` at least 2.

    Source:
        Theory, section 6.4.
    """
    return 0.8 * np.tanh(1.5 * x[..., 0]) + 0.4 * np.cos(2 * x[..., 1]) - 0.3


@dataclass(frozen=True)
class MeanFieldSettings:
    r"""How mean-field networks are trained.

    Attributes:
        inputs: number ``d`` of inputs, uniform on :math:`[-1, 1]^d`.
        horizon: training time ``T`` in mean-field units.
        step: step :math:`\varepsilon`; there are ``floor(T / step)`` steps.
        ridge: weight decay :math:`\lambda`.
        temperature: :math:`\tau` of the noise; 0 for noiseless descent.
        batch: fresh examples per step.
        schedule: :math:`\xi(time)`, multiplying the step; constant 1 by default.
        target: noiseless function to learn, from inputs ``(..., d)`` to ``(...)``.
        neuron: the neuron; a :class:`TanhNeuron` of ``inputs`` inputs by default.

    Raises:
        DataError: a setting outside its range.
    """

    inputs: int = 2
    horizon: float = 10.0
    step: float = 0.02
    ridge: float = 0.0
    temperature: float = 0.0
    batch: int = 1
    schedule: Callable[[float], float] | None = None
    target: Callable[[FloatArray], FloatArray] = reference_target
    neuron: Neuron | None = None

    def __post_init__(self) -> None:
        read_integer(self.inputs, "MeanFieldSettings: inputs")
        read_integer(self.batch, "MeanFieldSettings: batch")
        read_number(self.horizon, "MeanFieldSettings: horizon", least=0)
        read_number(self.step, "MeanFieldSettings: step", above=0)
        read_number(self.ridge, "MeanFieldSettings: ridge", least=0)
        read_number(self.temperature, "MeanFieldSettings: temperature", least=0)

    @property
    def unit(self) -> Neuron:
        """The neuron in use."""
        return TanhNeuron(self.inputs) if self.neuron is None else self.neuron

    @property
    def steps(self) -> int:
        """Number of updates."""
        return math.floor(self.horizon / self.step * (1 + 1e-12))


class _Streams(NamedTuple):
    """Which of two independent streams a run takes for its initial cloud, its data and its noise."""

    seed: int
    init: int
    data: int
    noise: int


def mean_field_sgd(
    settings: MeanFieldSettings, widths: Sequence[int], seeds: Sequence[int], *, run: int = 0
) -> dict[int, FloatArray]:
    r"""Train two-layer networks of several widths and seeds at once.

    .. math:: \theta_i^{k+1} = (1 - 2 \lambda s_k) \theta_i^k + 2 s_k (y_k - f_N(x_k)) \nabla_\theta
        \sigma_*(x_k; \theta_i^k) + \sqrt{2 s_k \tau / D}\, g_i^k, \qquad s_k = \varepsilon \xi(k \varepsilon)

    **[L]** Mei, Misiakiewicz and Montanari (2019), recalled from memory, constants not re-checked. The
    gradient is *not* divided by ``N``: time is mean-field time. The initial neurons are i.i.d. standard
    Gaussian, truncated at 3.

    Args:
        settings: see :class:`MeanFieldSettings`.
        widths: numbers of neurons ``N``, each at least 1, all different.
        seeds: one network per seed and width; the result of a seed and width does not depend on the others.
        run: number of the run; two runs of one seed share nothing. Within a run, the widths of one seed see
            the same examples.

    Returns:
        For each width the trained clouds, shape ``(seeds, N, D)``.

    Raises:
        DataError: no or repeated widths, no seeds, or a run that diverged.

    Source:
        Theory, section 6.1.
    """
    return _train(settings, widths, [_Streams(seed, run, run, run) for seed in seeds])


def mean_field_pairs(
    settings: MeanFieldSettings,
    widths: Sequence[int],
    seeds: Sequence[int],
    *,
    coupling: SharedDraws = "independent",
) -> dict[int, tuple[FloatArray, FloatArray]]:
    r"""Train pairs of networks, coupled or not.

    **[L]** as :func:`mean_field_sgd`; the theorem of the paper **[P, Theorem 3.1]** is about the independent
    case.

    Args:
        settings: see :class:`MeanFieldSettings`.
        widths: numbers of neurons.
        seeds: one pair per seed and width.
        coupling: ``"independent"``: initial clouds, examples and noise all differ. ``"same_data"``: both see
            the same examples in the same order. ``"same_init"``: both start from the same cloud.

    Returns:
        For each width the clouds of A and of B, each of shape ``(seeds, N, D)``.

    Raises:
        DataError: an unknown coupling, or as :func:`mean_field_sgd`.

    Source:
        Theory, section 6.1.
    """
    shared = {"independent": (1, 1), "same_data": (1, 0), "same_init": (0, 1)}
    if coupling not in shared:
        raise DataError(f"mean_field_pairs: expected a coupling among {list(shared)}, found {coupling!r}.")
    init, data = shared[coupling]
    streams = [_Streams(s, 0, 0, 0) for s in seeds] + [_Streams(s, init, data, 1) for s in seeds]
    clouds = _train(settings, widths, streams)
    return {n: (theta[: len(seeds)], theta[len(seeds) :]) for n, theta in clouds.items()}


def _train(
    settings: MeanFieldSettings, widths: Sequence[int], streams: Sequence[_Streams]
) -> dict[int, FloatArray]:
    sizes = [read_integer(n, "mean field: widths") for n in widths]
    if not sizes or len(set(sizes)) < len(sizes) or not streams:
        raise DataError(
            f"Mean field: expected at least one seed and different widths, found {len(streams)} runs and "
            f"widths {list(widths)}."
        )
    # All widths lie side by side on one axis of neurons: one array operation moves every network.
    starts = np.cumsum([0, *sizes[:-1]])
    theta = np.stack([np.concatenate([_initial(settings, s, n) for n in sizes]) for s in streams])
    data = [np.random.default_rng((s.seed, s.data, 1)) for s in streams]
    noise = [[np.random.default_rng((s.seed, s.noise, 2, n)) for n in sizes] for s in streams]
    with np.errstate(over="ignore", invalid="ignore"):
        for k in range(settings.steps):
            x = np.stack([rng.uniform(-1.0, 1.0, (settings.batch, settings.inputs)) for rng in data])
            output = np.add.reduceat(settings.unit.value(theta, x), starts, axis=-1) / sizes
            residual = np.repeat(settings.target(x)[..., None] - output, sizes, axis=-1) / settings.batch
            rate = settings.step * (settings.schedule(k * settings.step) if settings.schedule else 1.0)
            gradient = settings.unit.weighted_gradient(theta, x, residual)
            theta = (1 - 2 * settings.ridge * rate) * theta + 2 * rate * gradient
            if settings.temperature > 0:
                scale = math.sqrt(2 * rate * settings.temperature / theta.shape[-1])
                theta += scale * _draw(noise, sizes, theta.shape[-1])
    if not np.isfinite(theta).all():
        raise DataError(
            f"Mean field: training diverged with step {settings.step}. Use a smaller step or ridge, or a "
            "bounded neuron."
        )
    return dict(zip(sizes, np.split(theta, starts[1:], axis=1), strict=True))


def _initial(settings: MeanFieldSettings, streams: _Streams, width: int) -> FloatArray:
    rng = np.random.default_rng((streams.seed, streams.init, 0, width))
    edge = float(ndtr(-_CLIP))
    return ndtri(rng.uniform(edge, 1 - edge, (width, settings.unit.dimension)))


def _draw(noise: Sequence[Sequence[np.random.Generator]], sizes: Sequence[int], dimension: int) -> FloatArray:
    return np.stack(
        [
            np.concatenate([rng.standard_normal((n, dimension)) for rng, n in zip(row, sizes, strict=True)])
            for row in noise
        ]
    )
