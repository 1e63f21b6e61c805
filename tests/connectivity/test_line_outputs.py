"""Which of several outputs a line scores."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from isthmus import align, line
from isthmus.connectivity import line_along
from isthmus.errors import DataError, ModelError, SymmetryError, VerificationError
from isthmus.paths import Straight


class Both(nn.Module):
    """Returns features, of which one could take the labels too, and logits."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> object:
        features = self.a(x).relu()
        return {"hidden": [features, features.argmax(1)], "prediction": self.b(features)}


class Logits(Both):
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())


X = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
DATA = [(X, torch.randint(3, (40,), generator=torch.Generator().manual_seed(1)))]
CHANCE = pytest.mark.filterwarnings("ignore:On 'data'")


@CHANCE
@pytest.mark.parametrize("outputs", ["prediction", 2, -1])
def test_the_chosen_output_is_scored(outputs: str | int) -> None:
    pair, plain = (Both(0).eval(), Both(1).eval()), (Logits(0).eval(), Logits(1).eval())
    found = align(*pair, args=X, method="weights", outputs=outputs)
    wanted = line(*plain, DATA, points=3, alignment=align(*plain, args=X, method="weights"))
    aligned = line(*pair, DATA, points=3, alignment=found, outputs=outputs)
    for one, other in (
        (aligned, wanted),
        (line(*pair, DATA, points=3, outputs=outputs), line(*plain, DATA, points=3)),
    ):
        assert one.curves["data"].loss.tolist() == pytest.approx(other.curves["data"].loss.tolist(), rel=1e-6)
    assert aligned.settings["outputs"] == outputs
    assert "outputs" not in wanted.settings
    along = line_along(Straight(*pair), pair[0], DATA, points=3, outputs=outputs)
    assert along.barrier == pytest.approx(line(*plain, DATA, points=3).barrier, rel=1e-5)


@CHANCE
def test_a_function_gets_the_chosen_output() -> None:
    seen: list[torch.Size] = []

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        seen.append(output.shape)
        return nn.functional.cross_entropy(output, targets, reduction="none")

    pair = Both(0).eval(), Both(1).eval()
    line(*pair, DATA, points=3, loss=loss, outputs="prediction")
    assert {shape[1] for shape in seen} == {3}


@pytest.mark.filterwarnings("ignore:The network returns 2 outputs")
def test_an_alignment_for_another_output_is_said_to_be_that() -> None:
    pair = Both(0).eval(), Both(1).eval()
    found = align(*pair, args=X, method="weights", outputs="prediction")
    words = (
        "preserves 'prediction' alone of the network's outputs, and 'hidden.0' is scored, which it changes"
    )
    for outputs in (None, "hidden.0"):
        with pytest.raises(VerificationError, match=re.escape(words)):
            line(*pair, DATA, points=3, alignment=found, outputs=outputs)


@pytest.mark.parametrize(
    ("outputs", "error", "words"),
    [
        ("nothing", SymmetryError, "no output 'nothing'; the model returns"),
        (
            "hidden",
            DataError,
            "the one output that is scored, found 'hidden', which means 'hidden.0', 'hidden.1'",
        ),
        (("prediction", "hidden.0"), DataError, "the one output that is scored"),
        ("hidden.1", ModelError, "Expected the model to return floating outputs to be scored"),
    ],
)
def test_what_cannot_be_scored_is_refused(outputs: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        line(Both(0).eval(), Both(1).eval(), DATA, points=3, outputs=outputs)  # type: ignore[arg-type]
