"""Notes on averaged statistics and buffers: one sentence wherever it is said."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from isthmus.moments import averaged_buffers, averaged_statistics, buffers_note, statistics_note


@pytest.mark.parametrize("merged", [False, True])
def test_nothing_averaged_gives_no_note(merged: bool) -> None:
    assert statistics_note([], "run it.", merged=merged) is None
    assert buffers_note([], merged=merged) is None


def test_a_line_and_a_merge_say_the_same_of_their_averages() -> None:
    for note in (lambda merged: statistics_note(["norm"], "run it.", merged=merged),
                 lambda merged: buffers_note(["norm.mean"], merged=merged)):  # fmt: skip
        inside, merged = note(False), note(True)
        assert inside is not None
        assert merged is not None
        assert "inside the line (norm" in inside
        assert merged.startswith("The merged ")
        ends = [text.partition("are the average of ")[2] for text in (inside, merged)]
        told = [
            end.replace(whose, "…").replace(effect, "…")
            for end, whose, effect in zip(
                ends,
                ("the two ends'", "the networks'"),
                ("the losses and the barrier say little", "the result may be near chance"),
                strict=True,
            )
        ]
        assert told[0] == told[1]


def test_layers_are_named_by_an_architecture_or_by_the_names_of_a_state() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert averaged_statistics(net) == averaged_statistics(list(net.state_dict())) == ["1"]
    assert averaged_statistics(nn.BatchNorm1d(3), ["running_mean"]) == [""]
    assert averaged_statistics(net, ["1.running_var"]) == []
    note = statistics_note([f"layer{k}" for k in range(5)], "run it.", merged=True)
    assert note is not None
    assert "(layer0, layer1, layer2 and 2 more)" in note
    assert note.endswith("Recompute them: run it.")


def test_buffers_that_differ_are_averaged_ones() -> None:
    net = nn.Module()
    net.register_buffer("table", torch.zeros(2))
    other = {"table": torch.ones(2)}
    assert averaged_buffers(net, [net.state_dict(), other]) == ["table"]
    assert averaged_buffers(net, [other, other]) == []
    assert averaged_buffers(None, [net.state_dict(), other]) == []
