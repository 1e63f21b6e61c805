"""Three billion parameters in bfloat16, relabelled and merged within 4 GiB above the interpreter's base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

GIB = 2**30
PROGRAM = Path(__file__).with_name("pretrained_large.py")


def measured(folder: Path, *options: str, program: Path = PROGRAM) -> dict[str, Any]:
    """Run the program in a process of its own, so that its base is the interpreter's and the imports'."""
    command = [sys.executable, str(program), str(folder), *options]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
@pytest.mark.slow
def test_a_small_checkpoint_of_the_same_shape(tmp_path: Path) -> None:
    found = measured(
        tmp_path, "--layers", "2", "--width", "768", "--vocabulary", "1000", "--shard", "5000000"
    )
    assert found["shards"] > 3
    assert found["moved"] == 1
    assert found["change"] < 1e-12
    assert [s["name"] for s in found["stages"]] == ["open", "discover", "relabel", "merge", "verify"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
@pytest.mark.slow
def test_a_planted_element_of_the_whole_group_of_a_small_gpt2(tmp_path: Path) -> None:
    options = ("--layers", "2", "--width", "256", "--vocabulary", "2000")
    found = measured(tmp_path, *options, program=PROGRAM.with_name("pretrained_symmetries.py"))
    assert found["kinds"]["Rotation"] == 1
    assert found["distance_before"] > 1
    assert found["distance_after"] < 1e-6
    assert found["outputs_of_the_average"] < 1e-4
    peaks = {stage["name"]: stage["peak"] for stage in found["stages"]}
    # Nearly all of it is what matching loads; the networks have 11 MB each.
    assert max(peaks.values()) < 2**29, peaks


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
@pytest.mark.slow
@pytest.mark.huge
def test_three_billion_parameters(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 40 * GIB:
        pytest.skip("needs 40 GiB of free disk")
    found = measured(tmp_path)
    shutil.rmtree(tmp_path)
    assert found["parameters"] > 3e9
    assert found["bytes"] == 2 * found["parameters"]
    assert found["change"] < 1e-4
    peaks = {stage["name"]: stage["peak"] for stage in found["stages"]}
    assert max(peaks.values()) < 4 * GIB, peaks
    # Relabelling and merging hold a few blocks beside the largest tensor, if that.
    assert max(peaks["relabel"], peaks["merge"]) < 2 * found["largest"], peaks
