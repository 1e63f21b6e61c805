"""What a walk through a module follows, and what it does not."""

import logging

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from isthmus.replica import hidden_tensors


class Keeping(logging.Handler):
    """A handler that keeps what it is told, as test runners' do."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[object] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.args)


def paths(model: nn.Module) -> list[str]:
    return [h.path for h in hidden_tensors(model)]


def test_what_a_logger_was_told_is_nothing_of_the_module() -> None:
    model = nn.Linear(2, 3)
    log, handler = logging.Logger("walked"), Keeping()
    log.addHandler(handler)
    log.error("%s %s", torch.ones(3), torch.zeros(2))
    assert len(handler.told) == 1
    model.log, model.handler, model.own = log, handler, [torch.ones(1)]
    assert paths(model) == ["own[0]"]


def test_a_fake_tensor_leads_to_no_other_through_its_mode() -> None:
    model = nn.Linear(2, 3)
    mode = FakeTensorMode()
    mode.kept = torch.ones(3)  # pyright: ignore[reportAttributeAccessIssue]
    fake = mode.from_tensor(torch.zeros(2))
    fake.noted = torch.ones(4)  # pyright: ignore[reportAttributeAccessIssue]
    assert vars(fake)["fake_mode"] is mode
    model.own = fake
    assert paths(model) == ["own", "own['noted']"]
