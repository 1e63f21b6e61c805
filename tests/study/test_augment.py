"""Random crops and mirror images: of the right kind, drawn from the seed, and out of the way by default."""

from __future__ import annotations

import pytest
import torch
from engine_studies import TINY, tiny

from isthmus.errors import ModelError
from isthmus.study import Dataset, StudyError, TrainSettings, make_plan, train, train_stacked
from isthmus.testing import mlp, resnet20
from isthmus.training._augment import PADDING, augmented


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 8) -> Dataset:
    values = torch.randint(0, 256, (count, 3, 32, 32), generator=drawn(0)).byte()
    return Dataset("toy images", "train", values, torch.arange(count) % 2, ("a", "b"), 255.0)


def windows(image: torch.Tensor) -> list[torch.Tensor]:
    """Return every crop of the padded image, plain and mirrored, by plain slicing."""
    _, height, width = image.shape
    padded = torch.zeros(image.shape[0], height + 2 * PADDING, width + 2 * PADDING)
    padded[:, PADDING : PADDING + height, PADDING : PADDING + width] = image
    plain = [
        padded[:, top : top + height, left : left + width]
        for top in range(2 * PADDING + 1)
        for left in range(2 * PADDING + 1)
    ]
    return [w for crop in plain for w in (crop, crop.flip(2))]


@pytest.mark.parametrize("shape", [(1, 6, 5), (3, 4, 7)])
def test_every_result_is_a_crop_or_its_mirror_image_and_all_occur(shape: tuple[int, int, int]) -> None:
    image = torch.rand(shape, generator=drawn(1)) + 0.1
    found = augmented(image.expand(4000, *shape), "crop-flip", drawn(2))
    assert found.shape == (4000, *shape)
    allowed = torch.stack(windows(image))
    assert len(allowed) == 2 * (2 * PADDING + 1) ** 2
    equal = (found[:, None] == allowed[None]).flatten(2).all(2)
    # Crops that hold nothing but padding are alike, so a result may equal several.
    assert bool(equal.any(1).all())
    assert bool(equal.any(0).all())


def test_none_draws_nothing_and_returns_the_same_tensor() -> None:
    generator, inputs = drawn(0), torch.rand(2, 3, 4, 4)
    before = generator.get_state()
    assert augmented(inputs, "none", generator) is inputs
    assert torch.equal(generator.get_state(), before)


def test_only_images_can_be_cropped() -> None:
    with pytest.raises(ModelError, match=r"crops and mirrors images .* found \(2, 5\). Use augment: none"):
        augmented(torch.rand(2, 5), "crop-flip", drawn(0))
    with pytest.raises(StudyError, match="augment: expected one of none, crop-flip, found 'cutout'"):
        TrainSettings(augment="cutout")  # type: ignore[arg-type]
    flat = Dataset("toy", "train", torch.rand(4, 6), torch.arange(4) % 2, ("a", "b"))
    with pytest.raises(StudyError, match="augment 'crop-flip' is for images"):
        train_stacked(mlp(6, 4, 1, 2), flat, [TrainSettings(augment="crop-flip")])


def test_training_with_crops_is_determined_by_the_seed_and_differs_from_training_without() -> None:
    model = resnet20(2, 0.25)
    options = {"epochs": 2, "batch_size": 4, "learning_rate": 0.05, "warmup_steps": 0}
    first, second, plain = (
        train(model, images(), TrainSettings(**options, augment=how)).history  # type: ignore[arg-type]
        for how in ("crop-flip", "crop-flip", "none")
    )
    losses = [[r.loss for r in history] for history in (first, second, plain)]
    assert losses[0] == losses[1] != losses[2]


def test_addresses_of_studies_without_it_stay_as_they_were() -> None:
    texts = [
        TINY.replace("epochs: 2", f"epochs: 2{more}")
        for more in ("", ", augment: none", ", augment: crop-flip")
    ]
    plans = [make_plan(tiny(t), None) for t in texts]
    assert [u.address for u in plans[0].units] == [u.address for u in plans[1].units]
    assert not {u.address for u in plans[0].units} & {u.address for u in plans[2].units}
    assert all("augment" not in u.content.get("training", {}) for u in plans[0].units)
    # Augmented networks are trained one by one, 8 in all.
    assert [u.content["training"]["augment"] for u in plans[2].units if u.kind == "train"] == [
        "crop-flip"
    ] * 8
