"""Models that look at values: checks, branches, packed sequences, wrappers; and what is said where tracing ends."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from symmetry_helpers import Net, build, check, group, normal
from torch import Tensor, nn

from isthmus.errors import ModelError
from isthmus.symmetry import apply, discover, trace, verify

X = normal(2, 3)
HIDDEN = group(4, "a.weight[0]", "a.bias[0]", "b.weight[1]")


def two(work: Callable[..., Tensor]) -> nn.Module:
    return build(lambda: Net(lambda m, x, *r: m.b(work(m.a(x), *r)), a=nn.Linear(3, 4), b=nn.Linear(4, 2)))


def sizes(model: nn.Module, *args: Any) -> list[int]:
    return sorted(g.size for g in check(model, args, every_slot=False).groups.values())


def _asserted(h: Tensor) -> Tensor:
    assert not torch.isnan(h).any()
    return h


def _refused(h: Tensor) -> Tensor:
    if h.abs().max().item() > 1e5:
        raise ValueError("too large")
    if not torch.isfinite(h).all() or torch.allclose(h, torch.zeros(())):
        raise ValueError("not finite")
    return h


def _scaled(h: Tensor) -> Tensor:
    return h / h.norm() if h.norm() > 1e-3 else h


def _halved(h: Tensor) -> Tensor:
    for _ in range(3):
        if h.norm() < 1:
            break
        h = h / 2
    return h


def _largest(h: Tensor) -> Tensor:
    return h * 2 if max(h.sum(1).tolist()) > 0 else h


def _all_listed(h: Tensor) -> Tensor:
    return h * 2 if all((h.abs().amax(1) < 9).tolist()) else h - 1


def _counted(h: Tensor) -> Tensor:
    return h * sum((h > 0).sum(1).tolist()) + len(h.sum(1).tolist())


@pytest.mark.parametrize(
    "work",
    [_asserted, _refused, _scaled, _halved, _largest, _all_listed, _counted],
)
def test_checks_and_choices_that_see_no_order_leave_the_symmetry(work: Callable[[Tensor], Tensor]) -> None:
    check(two(work), X, {HIDDEN})


def _numpy(h: Tensor) -> Tensor:
    return h * float(h.detach().numpy().sum())


def _third(h: Tensor) -> Tensor:
    if h.mean(0).argmax() == 2:
        raise ValueError("never the third")
    return h


@pytest.mark.parametrize(
    "work",
    [
        _numpy,
        _third,
        lambda h: h[:, h.mean(0).argmax().item()][:, None] + h,
        lambda h: h * 2 if h.tolist()[0][0] > 0 else h,
        lambda h: h * int(h.mean(0).argsort().tolist()[0] + 1),
    ],
)
def test_what_python_reads_unit_by_unit_is_pinned(work: Callable[[Tensor], Tensor]) -> None:
    assert sizes(two(work), X) == []


def test_every_way_through_the_code_counts() -> None:
    """The example takes one head; the other one must move along all the same."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(h) if x.sum() > 0 else m.c(h)

    model = build(lambda: Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2), c=nn.Linear(4, 2)))
    expected = {group(4, "a.weight[0]", "a.bias[0]", "b.weight[1]", "c.weight[1]")}
    for x in (X.abs(), -X.abs()):
        spec = check(model, x, expected, every_slot=False)
    state = apply(spec, {"a": torch.tensor([1, 2, 3, 0])}, model.state_dict())
    before = [model(x) for x in (X.abs(), -X.abs())]
    model.load_state_dict(state)
    assert all(
        torch.allclose(model(x), y, atol=1e-6) for x, y in zip((X.abs(), -X.abs()), before, strict=True)
    )


def test_a_trace_says_when_other_values_lead_another_way() -> None:
    model = two(lambda h: h if h.sum() > 0 else -h)
    traced = trace(model, X)
    state = dict(model.state_dict())
    assert torch.allclose(traced.run(state, (X,)), model(X))
    assert len(traced.others) == 1
    here = model.a(X).sum() > 0  # type: ignore[operator]
    other = next(x for x in (50 * X, -50 * X, 50 + 0 * X, -50 + 0 * X) if (model.a(x).sum() > 0) != here)  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"test_tracing\.py:\d+: .*reads (True|False), but here it reads"):
        traced.run(state, (other,))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("LSTM", {"bidirectional": True}),
        ("GRU", {"num_layers": 2}),
        pytest.param("LSTM", {"num_layers": 2}, marks=pytest.mark.slow),
        pytest.param("GRU", {"bidirectional": True}, marks=pytest.mark.slow),
        pytest.param("RNN", {"num_layers": 2}, marks=pytest.mark.slow),
        pytest.param("RNN", {"bidirectional": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_packed_sequences(kind: str, settings: dict[str, Any]) -> None:
    def forward(m: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        rows, state = m.layer(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(rows, batch_first=True)
        last = state[0][-1] if kind == "LSTM" else state[-1]
        return m.rows(padded).sum(1) + m.last(last)

    ways = 2 if settings.get("bidirectional") else 1
    parts = {"layer": getattr(nn, kind)(3, 4, batch_first=True, **settings), "rows": nn.Linear(4 * ways, 2)}
    model = build(lambda: Net(forward, **parts, last=nn.Linear(4, 2)))
    args = (normal(3, 5, 3), torch.tensor([2, 5, 3]))
    assert sizes(model, *args) == [4, 4]
    assert torch.allclose(trace(model, args).run(dict(model.state_dict()), args), model(*args), atol=1e-6)


def test_packed_sequences_with_projected_states() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 2, 1]), batch_first=True)
        return m.b(nn.utils.rnn.pad_packed_sequence(m.layer(packed)[0], batch_first=True)[0])

    parts = {"layer": nn.LSTM(3, 5, batch_first=True, proj_size=4), "b": nn.Linear(4, 2)}
    model, x = build(lambda: Net(forward, **parts)), normal(3, 5, 3)
    assert sizes(model, x) == [4, 5]
    assert torch.allclose(trace(model, x).run(dict(model.state_dict()), (x,)), model(x), atol=1e-6)


@pytest.mark.parametrize("given", [False, True])
def test_a_transformer_that_looks_at_its_mask(given: bool) -> None:
    mask = nn.Transformer.generate_square_subsequent_mask

    def forward(m: Any, x: Tensor, y: Tensor, *masks: Tensor) -> Tensor:
        return m.head(m.body(m.a(x), m.b(y), tgt_mask=masks[0] if masks else mask(y.shape[1])))

    body = nn.Transformer(8, 2, 1, 1, 6, batch_first=True)
    model = build(lambda: Net(forward, body=body, a=nn.Linear(3, 8), b=nn.Linear(3, 8), head=nn.Linear(8, 2)))
    args = (normal(2, 5, 3), normal(2, 4, 3), *([mask(4)] if given else []))
    # the streams of source and target (each is read by its own rows of the fused projection), hidden units of two
    # layers, three attentions of two heads, and in every head its values and its queries
    assert sizes(model, *args) == [*[2] * 3, *[4] * 12, 6, 6, 8, 8]


@pytest.mark.parametrize("nested", [False, True])
def test_parallel_wrappers_are_looked_through(nested: bool) -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    model: nn.Module = nn.Sequential(nn.DataParallel(inner), nn.Linear(4, 2)).eval()
    prefix, last = "0.module.0", "1"
    if not nested:
        model = nn.DataParallel(nn.Sequential(*inner, nn.Linear(4, 2))).eval()
        prefix, last = "module.0", "module.2"
    spec = check(model, X, {group(4, f"{prefix}.weight[0]", f"{prefix}.bias[0]", f"{last}.weight[1]")})
    assert set(spec.shapes) == set(model.state_dict())


# --- Where tracing ends ----------------------------------------------------------------------------------------
class Inner(nn.Module):
    def __init__(self, work: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.work = work

    def forward(self, h: Tensor) -> Tensor:
        return self.work(h)


def outer(work: Callable[[Tensor], Tensor]) -> nn.Module:
    parts = {"a": nn.Linear(3, 4), "inner": Inner(work), "b": nn.Linear(4, 2)}
    return build(lambda: Net(lambda m, x: m.b(m.inner(m.a(x))), **parts))


@pytest.mark.parametrize(
    "work",
    [
        lambda h: h * h[h > 0].sum(),
        lambda h: h * (h > 0).nonzero().shape[0],
        lambda h: h * torch.unique(h).sum(),
        lambda h: h + h.masked_select(h > 0).mean(),
    ],
)
def test_shapes_that_depend_on_values(work: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(
        ModelError, match=r"'inner' \(Inner\) calls aten\.\w+\S* at test_tracing\.py:\d+: "
    ) as found:
        discover(outer(work), X)
    assert "torch.where" in str(found.value)
    assert "Guard" not in str(found.value)


def _until_small(h: Tensor) -> Tensor:
    while h.norm() > 1e-3:
        h = h * 0.99
    return h


def _many(h: Tensor) -> Tensor:
    for k in range(6):
        h = h.relu() if h.sum() > k else h.tanh()
    return h


def _through_numpy(h: Tensor) -> Tensor:
    return torch.from_numpy(h.detach().cpu().numpy() * 2)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (
            _until_small,
            r"repeats a step for as long as .* at test_tracing\.py:\d+: while h\.norm\(\) > 1e-3.*fixed number",
        ),
        (
            lambda h: h * 2 if 7 in h.repeat(1, 200)[0].int().tolist() else h,
            r"or reads a long list of them, at test_tracing\.py:\d+: lambda h.*operators of PyTorch for lists",
        ),
        (
            lambda h: h * max((h > 0).tolist()[0]),
            r"decides by the values .* at test_tracing\.py:\d+: .*more than 8",
        ),
        (_many, r"decides by the values .* at test_tracing\.py:\d+: h = h\.relu\(\).*more than 8 ways"),
        (
            lambda h: h @ torch.zeros(5, 4),
            r"the model itself fails .* at test_tracing\.py:\d+: .*module 'inner' \(Inner\)",
        ),
    ],
    ids=["loop", "list", "entries", "ways", "fails"],
)
def test_other_ends_name_the_line(work: Callable[[Tensor], Tensor], said: str) -> None:
    with pytest.raises(ModelError, match=said) as found:
        discover(outer(work), X)
    assert "Traceback" not in str(found.value)


def test_weights_without_values_cannot_decide() -> None:
    with torch.device("meta"):
        model = Net(lambda m, x: m.a(x) if m.a(x).sum() > 0 else x, a=nn.Linear(3, 3)).eval()
    with pytest.raises(
        ModelError, match=r"decides by the values of tensors at test_tracing.*meta device. Load the"
    ):
        discover(model, torch.zeros(2, 3, device="meta"))


class Handwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.relu(x)


def test_code_that_cannot_be_followed_names_the_line() -> None:
    def leaves(h: Tensor) -> Tensor:
        return h + len(h.detach().untyped_storage().tolist())

    with pytest.raises(ModelError, match=r"test_tracing\.py:\d+: .*rewrite this line with"):
        discover(outer(leaves), X)


def test_a_number_that_python_reads_is_read_on_other_inputs_too() -> None:
    """``float(tensor)`` leaves nothing to follow, so verification runs where the number is another one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.f(x).relu()
            return self.g(h) if float(x.sum()) > 0 else self.g(h * torch.arange(8.0, dtype=h.dtype))

    model, x = Net().eval(), torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    spec = discover(model, x)
    found = verify(spec, model, x, generator=torch.Generator().manual_seed(0))
    assert not spec.groups or not found.passed


@pytest.mark.parametrize(
    ("forward", "found"),
    [
        (lambda m, x: m.b(m.a(x)[:, :3]), "the model itself fails on these inputs"),
        (lambda m, x: m.b(m.a(x)).repeat(int(m.a(x).abs().sum()) % 3 + 1, 1), None),
        (lambda m, x: m.b(m.a(x) * 2 if m.a(x).sum() > 0 else m.a(x)), None),
        (lambda m, x: m.b(m.a(x))[m.a(x)[:, 0] > 0], "the shape of the result"),
    ],
    ids=["wrong shape", "number", "branch", "mask"],
)
def test_a_failed_attempt_prints_and_logs_nothing(
    forward: Callable[..., Tensor], found: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """PyTorch's exporter prints its half-made graph and logs tracebacks; the user reads one sentence of ours."""
    model = Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).eval()
    loggers = [
        logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("torch")
    ]
    streams = [h for logger in loggers for h in logger.handlers if type(h) is logging.StreamHandler]
    assert streams
    before = [(handler, handler.stream) for handler in streams]  # not those of the test runner
    try:
        for handler in streams:
            handler.stream = sys.stderr  # setStream flushes the old one, which another test may have closed
        with pytest.raises(ModelError, match=found) if found else contextlib.nullcontext():
            discover(model, normal(2, 3))
    finally:
        for handler, stream in before:
            handler.stream = stream
    assert capfd.readouterr() == ("", "")
    assert not any(handler.filters for handler in streams)


def test_what_a_model_writes_itself_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        sys.stderr.write("one note\n")
        return m.b(m.a(x))

    discover(Net(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 2)).eval(), normal(2, 3))
    assert capfd.readouterr().err.count("one note") == 1
