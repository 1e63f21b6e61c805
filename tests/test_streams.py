from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from isthmus.batches import Batch, as_batch, iterate
from isthmus.errors import DataError
from isthmus.streams import Mapped, limited


def counted(sizes: list[int], seen: list[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    start = 0
    for size in sizes:
        seen.append(size)
        rows = torch.arange(start, start + size)
        yield rows[:, None].float(), rows
        start += size


@pytest.mark.parametrize("size", [None, 1, 2, 3, 4, 5, 8, 100])
@pytest.mark.parametrize("limit", [None, 1, 2, 5, 7, 9, 50])
@pytest.mark.parametrize("sizes", [[5], [3, 4, 2], [1, 1, 1, 1, 1], [8, 1]])
def test_examples_keep_their_order_and_their_targets(
    sizes: list[int], limit: int | None, size: int | None
) -> None:
    total = min(sum(sizes), limit or 99)
    found = limited(list(counted(sizes, [])), limit=limit, batch_size=size)
    for _ in range(2):
        batches = list(iterate(found))
        assert torch.cat([b.targets for b in batches]).tolist() == list(range(total))
        assert torch.cat([b.args[0][:, 0] for b in batches]).tolist() == list(range(total))
        if size is not None:
            assert [b.size for b in batches] == [size] * (total // size) + [total % size] * (total % size > 0)


def test_nothing_to_do_is_nothing_done() -> None:
    data = [(torch.zeros(2, 1), torch.zeros(2))]
    assert limited(data) is data


def test_reading_stops_at_the_limit() -> None:
    seen: list[int] = []
    found = limited(counted([4, 4, 4, 4], seen), limit=6, batch_size=3)
    assert seen == []
    assert next(iter(found)).size == 3
    assert seen == [4]
    assert [len(list(found)) for _ in range(3)] == [2, 2, 2]
    assert seen == [4, 4]
    whole: list[int] = []
    assert [b.size for b in limited(counted([4, 4, 4], whole), limit=8)] == [4, 4]
    assert whole == [4, 4]


def test_a_loader_that_shuffles_gives_the_same_examples_to_every_pass() -> None:
    rows = torch.arange(100)
    loader = DataLoader(TensorDataset(rows[:, None].float(), rows), batch_size=10, shuffle=True)
    found = limited(loader, limit=25)
    first, second = (torch.cat([b.targets for b in iterate(found)]).tolist() for _ in range(2))
    assert first == second
    assert len(first) == 25


def test_batches_that_are_not_alike_stay_apart() -> None:
    short, long = torch.zeros(2, 3), torch.zeros(2, 5)
    found = limited([short, short, long, {"x": long}, {"x": long.double()}], batch_size=4)
    assert [b.size for b in found] == [4, 2, 2, 2]
    flagged = [{"x": short, "flag": 1}, {"x": short, "flag": 1}, {"x": short, "flag": 2}]
    assert [b.size for b in limited(flagged, batch_size=6)] == [4, 2]
    assert [b.size for b in limited([{"x": short, "n": torch.tensor(1)}] * 2, batch_size=4)] == [2, 2]


@pytest.mark.parametrize(("limit", "size"), [(0, None), (None, 0), (-1, 2)])
def test_numbers_below_one_are_refused(limit: int | None, size: int | None) -> None:
    with pytest.raises(DataError, match=r"Limiting data: expected a (limit|batch size) of at least 1, found"):
        limited([], limit=limit, batch_size=size)


def test_a_failure_is_told_to_every_pass() -> None:
    def failing() -> Iterator[torch.Tensor]:
        yield torch.zeros(2, 1)
        raise OSError("the disk is gone")

    found = limited(failing(), limit=9)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            list(found)


def test_mapped_batches_can_be_read_again() -> None:
    doubled = Mapped(lambda b: Batch((2 * b.args[0],)), (torch.ones(1, 1) for _ in range(2)))
    assert [[float(as_batch(b).args[0]) for b in doubled] for _ in range(2)] == [[2.0, 2.0], [2.0, 2.0]]
