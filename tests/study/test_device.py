"""Devices are checked once, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_studies import tiny

from isthmus.study import StudyError, check_device, run_study


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cuda", "cuda:0", "cuda:1"):
        check_device(name)
    with pytest.raises(StudyError, match=r"device 'cuda:2': torch .* finds 2 cuda devices on this machine"):
        check_device("cuda:2")


def test_devices_that_are_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        StudyError, match=r"device 'cuda': torch .* finds no cuda devices .* Use --device cpu"
    ):
        run_study(tiny(), tmp_path / "out", device="cuda")
    assert not (tmp_path / "out").exists()
    check_device("cuda", here=False)  # a cluster's nodes may have what this machine has not
    for name in ("gpu", "", "cuda:x"):
        with pytest.raises(StudyError, match=f"expected 'cpu' or 'cuda', found '{name}'"):
            check_device(name)
    with pytest.raises(StudyError, match="expected one that computes, such as 'cpu' or 'cuda', found 'meta'"):
        check_device("meta", here=False)
