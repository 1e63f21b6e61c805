from __future__ import annotations

import pytest
import torch

from isthmus.moments import ChannelMoment


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_parts_combine_into_the_moment_of_the_whole(axis: int, offset: float) -> None:
    values = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0)).double() + offset
    rows = values.movedim(axis, 0).flatten(1)
    split = 1 if axis == 0 else 0
    found = ChannelMoment.of(values[:0] if split == 0 else values[:, :0], axis)
    assert found.count == 0
    assert found.deviation.tolist() == [0.0] * len(rows)
    for part in values.split([1, 3, values.shape[split] - 4], split):
        found = found.merge(ChannelMoment.of(part.float() if offset == 0 else part, axis))
    assert found.count == rows.shape[1]
    torch.testing.assert_close(found.mean, rows.mean(1), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.deviation, rows.std(1, correction=0), rtol=1e-6, atol=1e-7)
    same = found.merge(ChannelMoment.of(values[:0] if split == 0 else values[:, :0], axis))
    assert same is found


def test_one_value_has_no_spread() -> None:
    found = ChannelMoment.of(torch.tensor([[3.0, -1.0]]), 1)
    assert (found.count, found.mean.tolist(), found.deviation.tolist()) == (1, [3.0, -1.0], [0.0, 0.0])
