"""Tests of symmetries draw weights from torch's global generator here and there: each test starts from one seed.

A rule that fails is an error here; a user's network is pinned there instead.
"""

from collections.abc import Iterator

import pytest
import torch

from isthmus.symmetry import strict_rules


@pytest.fixture(autouse=True)
def same_weights() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def mistakes_in_rules_are_errors() -> Iterator[None]:
    with strict_rules():
        yield
