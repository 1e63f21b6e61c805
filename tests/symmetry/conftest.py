"""Tests of symmetries draw weights from torch's global generator here and there: each test starts from one seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)
