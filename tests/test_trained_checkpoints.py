"""Checkpoints as trainers leave them: the state is found, its names are the network's, and nothing is guessed."""

from __future__ import annotations

import argparse
import datetime
import pathlib
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from isthmus.checkpoints import load_metadata, load_state, read_checkpoint, save_state
from isthmus.errors import CheckpointError

SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin", ".th", ".pth.tar")


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def written(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_state(path, content)
    else:
        torch.save(content, path)
    return path


def same(a: dict[str, Tensor], b: Any) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in b)


def prefixed(prefix: str, state: Any) -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + k, v) for k, v in state.items())


# --- Where the state lies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"net": s},
        lambda s: {"state_dict": s, "best_acc": torch.tensor(0.5), "arch": "resnet20"},
        lambda s: {"model": s, "step": torch.tensor(7), "loss": torch.tensor(0.25)},
        lambda s: {"ema": s, "decay": 0.99},
        lambda s: {"params": s},
        lambda s: {"my_network_of_monday": s, "epoch": 3},
        lambda s: {"checkpoint": {"weights": {"model_state_dict": s}}, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"model": s, "metrics": {"loss": torch.tensor(1.0)}, "history": [1, 2]},
        lambda s: {"model": s, "rng": np.random.RandomState(0).get_state(), "acc": np.float64(0.5)},
        lambda s: {"model": s, "when": datetime.datetime(2026, 1, 1), "out": pathlib.Path("/tmp/x")},
        lambda s: {"model": s, "config": types.SimpleNamespace(width=3), "sizes": np.arange(3)},
    ],
)
def test_one_state_is_found_wherever_it_lies(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    model = network()
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 3)).sum().backward()
    optimiser.step()
    content = {**wrap(model.state_dict()), "optimizer": optimiser.state_dict()}
    found = read_checkpoint(written(tmp_path / "c.pt", content))
    assert same(found.state, model.state_dict())
    assert found.key
    assert found.notes == ()
    network(1).load_state_dict(found.state)


def test_of_several_states_one_must_be_named(tmp_path: Path) -> None:
    raw, average = network(0).state_dict(), network(1).state_dict()
    path = written(tmp_path / "c.pt", {"model": raw, "ema": average, "epoch": 1})
    with pytest.raises(
        CheckpointError,
        match=r"holds 2 states: 'model' \(9 tensors\), 'ema' \(9 tensors\)\. Name one: key='model', or .*c\.pt::model",
    ):
        load_state(path)
    with pytest.raises(CheckpointError, match="holds 2 states that fit the network"):
        load_state(path, like=network())
    assert same(load_state(path, key="ema"), average)
    assert same(load_state(f"{path}::ema"), average)
    assert same(load_state(f"{path}::model", like=network()), raw)
    with pytest.raises(CheckpointError, match=r"holds no state under 'student'.*It holds 'model'"):
        load_state(path, key="student")
    with pytest.raises(CheckpointError, match="holds no state under 'epoch'"):
        load_state(path, key="epoch")


def test_the_state_that_fits_is_taken_and_named(tmp_path: Path) -> None:
    generator, critic = network(), nn.Linear(5, 1)
    content = {"critic": critic.state_dict(), "generator": prefixed("module.", generator.state_dict())}
    found = read_checkpoint(written(tmp_path / "gan.pt", content), like=generator)
    assert same(found.state, generator.state_dict())
    assert found.key == "generator"
    assert (
        "took the state under 'generator', the only one that fits the network; left 'critic'"
        in found.notes[0]
    )
    assert "'module.' was removed" in found.notes[1]
    with pytest.raises(CheckpointError, match="holds 2 states: 'critic'"):
        load_state(tmp_path / "gan.pt", like=nn.Linear(7, 7))


def test_keys_with_points(tmp_path: Path) -> None:
    content = {
        "a.b": {"c": {"w": torch.ones(2)}},
        "a": {"b.d": {"w": torch.zeros(2)}, "x": {"w": torch.ones(3)}},
    }
    path = written(tmp_path / "c.pt", content)
    assert torch.equal(load_state(path, key="a.b.c")["w"], torch.ones(2))
    assert torch.equal(load_state(path, key="a.b.d")["w"], torch.zeros(2))
    with pytest.raises(CheckpointError, match=r"holds 3 states: 'a\.b\.c'"):
        load_state(path)


def test_a_file_whose_name_has_colons(tmp_path: Path) -> None:
    path = written(tmp_path / "a::b.pt", {"w": torch.ones(2)})
    assert list(load_state(path)) == ["w"]


def test_tensors_beside_a_state(tmp_path: Path) -> None:
    path = written(tmp_path / "c.pt", {"w": torch.ones(2), "ema": {"w": torch.zeros(2)}})
    with pytest.raises(CheckpointError, match=r"tensors of its own beside 'ema' \(1 tensors\)"):
        load_state(path)
    assert torch.equal(load_state(path, key="ema")["w"], torch.zeros(2))


def test_an_optimiser_is_no_network(tmp_path: Path) -> None:
    model = network()
    optimiser = torch.optim.Adam(model.parameters())
    model(torch.randn(8, 3)).sum().backward()
    optimiser.step()
    path = written(tmp_path / "c.pt", {"optimizer": optimiser.state_dict()})
    with pytest.raises(CheckpointError, match=r"holds no tensors; it holds 'optimizer' \(dict\)"):
        load_state(path)


def test_dictionaries_that_hold_themselves_end(tmp_path: Path) -> None:
    """The search once went round for ever."""
    around: dict[str, Any] = {"epoch": 1}
    around["state_dict"] = around
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_state(written(tmp_path / "a.pt", around))
    around["model"] = {"w": torch.ones(2), "up": around}
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_state(written(tmp_path / "b.pt", around))
    around["model"] = {"w": torch.ones(2)}
    assert list(load_state(written(tmp_path / "c.pt", around))) == ["w"]
    deep: dict[str, Any] = {}
    inner = deep
    for _ in range(100):
        inner["model"] = {}
        inner = inner["model"]
    inner["w"] = torch.ones(2)
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_state(written(tmp_path / "d.pt", deep))


# --- What stands before the names --------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "module.module.",
        "_fsdp_wrapped_module.",
    ],
)
def test_what_wrappers_put_before_all_names_is_removed(tmp_path: Path, suffix: str, prefix: str) -> None:
    model = network()
    path = written(tmp_path / f"c{suffix}", prefixed(prefix, model.state_dict()))
    found = read_checkpoint(path)
    assert same(found.state, model.state_dict())
    assert found.prefix == prefix
    assert f"the prefix {prefix!r} was removed from the names of all 9 tensors" in found.notes[0]
    assert same(load_state(path, like=model), model.state_dict())
    assert set(load_state(path, prefix="")) == {prefix + k for k in model.state_dict()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when it is first asked to compile
def test_real_wrappers(tmp_path: Path) -> None:
    model = network()
    compiled = torch.compile(network())
    assert same(
        load_state(written(tmp_path / "p.pt", nn.DataParallel(model).state_dict())), model.state_dict()
    )
    assert same(load_state(written(tmp_path / "c.pt", compiled.state_dict())), network().state_dict())
    averaged = torch.optim.swa_utils.AveragedModel(nn.DataParallel(model))
    found = read_checkpoint(written(tmp_path / "a.pt", averaged.state_dict()))
    assert same(found.state, model.state_dict())
    assert "'n_averaged' outside of it were left out" in found.notes[0]
    assert same(load_state(tmp_path / "a.pt", like=model), model.state_dict())


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "model.module.", "module.model.", "a.long.way.down.", "_orig_mod.net."]
)
def test_the_network_decides_about_other_prefixes(tmp_path: Path, prefix: str) -> None:
    model = network()
    state = prefixed(prefix, model.state_dict())
    path = written(tmp_path / "c.pt", {"state_dict": state})
    found = read_checkpoint(path, like=model)
    assert same(found.state, model.state_dict())
    assert found.prefix == prefix
    assert same(load_state(path, prefix=prefix), model.state_dict())
    assert same(load_state(f"{path}::{prefix.rstrip('.')}"), model.state_dict())
    # The same names are right for a network that has them.
    assert same(load_state(path, like=state), state)


def test_a_name_that_a_network_may_have_is_kept_without_one(tmp_path: Path) -> None:
    state = prefixed("model.", network().state_dict())
    found = read_checkpoint(written(tmp_path / "c.pt", state))
    assert same(found.state, state)
    assert "all names begin with 'model.', which was left; it goes with prefix='model.'" in found.notes[0]


def test_words_of_wrappers_in_the_middle_of_names(tmp_path: Path) -> None:
    """As in the old networks of torchvision, whose features alone ran in parallel, and in compiled parts."""
    model = nn.Sequential(OrderedDict(features=network(), head=nn.Linear(2, 2)))
    wrapped = nn.Sequential(OrderedDict(features=nn.DataParallel(network()), head=nn.Linear(2, 2)))
    wrapped.load_state_dict(
        {k.replace("features.", "features.module."): v for k, v in model.state_dict().items()}
    )
    path = written(tmp_path / "c.pt", prefixed("net.", wrapped.state_dict()))
    assert same(load_state(path, like=model), model.state_dict())
    compiled = {k.replace("features.", "features._orig_mod."): v for k, v in model.state_dict().items()}
    assert same(load_state(written(tmp_path / "d.pt", compiled)), model.state_dict())
    # And the other way: the network is wrapped, the file is not.
    assert same(
        load_state(written(tmp_path / "e.pt", model.state_dict()), like=wrapped), wrapped.state_dict()
    )


def test_a_wrapped_network_takes_the_file_of_a_bare_one(tmp_path: Path) -> None:
    model = network()
    path = written(tmp_path / "c.pt", model.state_dict())
    found = read_checkpoint(path, like=prefixed("model.net.", model.state_dict()))
    assert same(found.state, prefixed("model.net.", model.state_dict()))
    assert "the prefix 'model.net.' of the network's names was put before the file's" in found.notes[0]


def test_a_training_module_with_more_in_it(tmp_path: Path) -> None:
    """A Lightning file: the network under ``model.``, a loss with weights, and settings."""
    model = network()
    more = {"criterion.weight": torch.ones(2), "metric.total": torch.zeros(3)}
    state = {**prefixed("model.", model.state_dict()), **more}
    content = {
        "epoch": 3,
        "global_step": 99,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "optimizer_states": [torch.optim.SGD(model.parameters(), 0.1).state_dict()],
        "hyper_parameters": {
            "lr": 0.1,
            "path": pathlib.PurePosixPath("/data"),
            "args": argparse.Namespace(x=1),
        },
    }
    found = read_checkpoint(written(tmp_path / "last.ckpt", content), like=model)
    assert same(found.state, model.state_dict())
    assert "'criterion.weight', 'metric.total' outside of it were left out" in found.notes[0]


def test_two_networks_under_prefixes_must_be_told_apart(tmp_path: Path) -> None:
    model, average = network(0), network(1)
    state = {**prefixed("online_model.", model.state_dict()), **prefixed("ema_model.", average.state_dict())}
    path = written(tmp_path / "c.pt", {**state, "step": torch.tensor(3)})
    with pytest.raises(
        CheckpointError,
        match=r"more than once, under the prefixes 'online_model\.', 'ema_model\.'\. .*FILE::online_model as the path",
    ):
        load_state(path, like=model)
    assert same(load_state(f"{path}::ema_model", like=model), average.state_dict())
    assert same(load_state(path, prefix="online_model"), model.state_dict())
    with pytest.raises(
        CheckpointError, match=r"no name begins with 'teacher\.'; they begin with 'online_model\.'"
    ):
        load_state(path, prefix="teacher")
    nested = {**prefixed("model.", model.state_dict()), **prefixed("model.ema.", average.state_dict())}
    with pytest.raises(CheckpointError, match="more than once"):
        load_state(written(tmp_path / "d.pt", nested), like=model)


def test_another_network_keeps_its_names(tmp_path: Path) -> None:
    """What does not fit is shown as it is, wrappers aside, so that the check of the architecture can say what "
    "differs."""
    state = prefixed("module.", {**network().state_dict(), "extra": torch.ones(1)})
    found = load_state(written(tmp_path / "c.pt", state), like=network())
    assert list(found) == [*network().state_dict(), "extra"]
    found = load_state(
        written(tmp_path / "d.pt", {**network().state_dict(), "extra": torch.ones(1)}), like=network()
    )
    assert list(found) == [*network().state_dict(), "extra"]


def test_names_that_would_become_one_stay(tmp_path: Path) -> None:
    state = {"module.w": torch.ones(1), "module._orig_mod.w": torch.zeros(1)}
    assert same(load_state(written(tmp_path / "c.pt", state)), state)


# --- What the entries are ----------------------------------------------------------------------------------


def test_numpy_arrays_and_numbers_become_tensors(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    content = {"w": array, "n": np.int64(3), "x": np.float16(0.5), "t": torch.ones(1)}
    found = load_state(written(tmp_path / "c.pt", {"state_dict": content, "epoch": np.int32(1)}))
    assert torch.equal(found["w"], torch.arange(6.0).reshape(2, 3).T)
    assert (found["n"].dtype, found["x"].dtype) == (torch.int64, torch.float16)
    with pytest.raises(CheckpointError, match="'w' is a NumPy array of <U1, which no tensor can hold"):
        load_state(written(tmp_path / "d.pt", {"w": np.array(["a"])}))


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16, torch.complex64]
)
@pytest.mark.parametrize("suffix", SUFFIXES[:2])
def test_every_width_of_numbers_is_read_as_it_is(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    state = {"w": torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(dtype), "b": torch.ones(2)}
    found = load_state(written(tmp_path / f"c{suffix}", state))
    assert found["w"].dtype == dtype
    assert torch.equal(found["w"].to(torch.complex64), state["w"].to(torch.complex64))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, 2, device="meta"), "is on the meta device: it has a shape and no values"),
        (lambda: torch.eye(3).to_sparse(), r"is a sparse tensor.*to_dense"),
        (lambda: torch.eye(3).to_sparse_csr(), "is a sparse tensor"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            r"is a quantised tensor.*dequantize",
        ),
        (
            lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
            r"is a nested tensor.*to_padded_tensor",
        ),
    ],
)
def test_tensors_without_one_array_of_numbers(
    tmp_path: Path, make: Callable[[], Tensor], message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"'w' {message}"):
        load_state(written(tmp_path / "c.pt", {"w": make(), "b": torch.ones(2)}))


def test_a_jagged_tensor(tmp_path: Path) -> None:
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(CheckpointError, match="nested tensor"):
        load_state(written(tmp_path / "c.pt", {"w": jagged}))


class Settings:
    """A class of a trainer's own."""

    rate = 0.1


def test_foreign_classes_are_named_with_the_way_out(tmp_path: Path) -> None:
    content = {
        "state_dict": {"w": torch.ones(2)},
        "hyper_parameters": {"config": Settings(), "loss": nn.MSELoss()},
    }
    with pytest.raises(
        CheckpointError,
        match=r"refused.*asks to run .*Settings.*torch\.nn\.modules\.loss\.MSELoss.*Save only tensors",
    ):
        load_state(written(tmp_path / "last.ckpt", content))
    written(tmp_path / "only.ckpt", {"state_dict": {"w": torch.ones(2)}, "config": Settings()})
    with pytest.raises(CheckpointError, match=r"settings of a trainer's own classes.*weights_only=False"):
        load_state(tmp_path / "only.ckpt")
    written(tmp_path / "whole.pt", network())
    with pytest.raises(
        CheckpointError, match=r"asks to run torch\.nn\.modules.*If it is a whole module.*Save only tensors"
    ):
        load_state(tmp_path / "whole.pt")


def test_what_the_caller_allows_stays_allowed(tmp_path: Path) -> None:
    path = written(tmp_path / "c.pt", {"w": torch.ones(1), "args": argparse.Namespace()})
    with torch.serialization.safe_globals([argparse.Namespace]):
        before = torch.serialization.get_safe_globals()
        with pytest.raises(CheckpointError, match="expected a tensor under 'args', found Namespace"):
            load_state(path)
        assert set(torch.serialization.get_safe_globals()) == set(before)
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


# --- Versions of modules -----------------------------------------------------------------------------------


class Second(nn.Module):
    """Reads a state of another version in another way, as MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError("unknown version")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
@pytest.mark.parametrize("metadata", [None, {"a": "b"}])
def test_versions_are_written_and_read(tmp_path: Path, suffix: str, metadata: dict[str, str] | None) -> None:
    model = nn.Sequential(Second(), nn.BatchNorm1d(2))
    save_state(tmp_path / f"c{suffix}", model.state_dict(), metadata)
    assert load_metadata(tmp_path / f"c{suffix}") == (metadata or {})
    found = load_state(tmp_path / f"c{suffix}")
    assert found._metadata == model.state_dict()._metadata  # type: ignore[attr-defined]
    nn.Sequential(Second(), nn.BatchNorm1d(2)).load_state_dict(found)


def test_versions_follow_the_names(tmp_path: Path) -> None:
    model = Second()
    path = written(tmp_path / "c.pt", nn.DataParallel(model).state_dict())
    Second().load_state_dict(load_state(path))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    Second().load_state_dict(load_state(written(tmp_path / "a.pt", averaged.state_dict()), like=model))


# --- Damage ------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """The archive keeps sums of its parts, which torch does not look at."""
    path = written(tmp_path / "c.pt", {"w": torch.arange(64.0)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(64.0).numpy().tobytes()) + 7] ^= 0x40
    path.write_bytes(content)
    assert not torch.equal(torch.load(path)["w"], torch.arange(64.0))
    with pytest.raises(CheckpointError, match=r"truncated or damaged \(Bad CRC-32"):
        load_state(path)


def test_a_file_without_sums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        path = written(tmp_path / "c.pt", {"w": torch.ones(3)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_state(path)["w"], torch.ones(3))


def test_files_that_claim_more_than_they_hold(tmp_path: Path) -> None:
    path = written(tmp_path / "c.pt", {"w": torch.zeros(1).expand(10**12)})
    with pytest.raises(CheckpointError, match=r"claims 4,000,000,000,000 bytes of tensors in a file of"):
        load_state(path)
    import zipfile

    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in range(10):
            archive.writestr(f"x/data/{part}", bytes(2**24))
    with pytest.raises(CheckpointError, match=r"claims 167,772,160 bytes"):
        load_state(tmp_path / "bomb.pt")


def test_a_part_of_another_network_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """Every network has a linear layer somewhere; only one of the same shape could be meant."""
    path = written(tmp_path / "c.pt", network().state_dict())
    assert set(load_state(path, like=nn.Linear(7, 7))) == set(network().state_dict())
    assert set(load_state(path, like=nn.Linear(3, 4))) == {"weight", "bias"}
    # All of the file, and all of the network, but of other sizes: the names are the network's, the sizes differ.
    path = written(tmp_path / "d.pt", {"net.weight": torch.ones(2, 2), "net.bias": torch.ones(2)})
    assert load_state(path, like=nn.Linear(7, 7))["weight"].shape == (2, 2)
