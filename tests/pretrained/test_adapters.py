"""Averages of LoRA adapters: folders made by hand with peft's names, and three ways to average factors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from isthmus import pretrained
from isthmus.errors import CheckpointError, DataError, IsthmusWarning, OutputError
from isthmus.pretrained import _low_rank, merge_adapters
from isthmus.pretrained._low_rank import LowRank, averaged_products

ROOT = "base_model.model.model.layers.0"
RANK = 3
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/base",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = generator(seed)
    shapes = {
        f"{ROOT}.self_attn.q_proj.lora_A.weight": (RANK, 7),
        f"{ROOT}.self_attn.q_proj.lora_B.weight": (5, RANK),
        f"{ROOT}.conv.lora_A.weight": (RANK, 2, 3, 3),
        f"{ROOT}.conv.lora_B.weight": (4, RANK, 1, 1),
        f"{ROOT}.conv.lora_B.bias": (4,),
        "base_model.model.embed.lora_embedding_A": (RANK, 11),
        "base_model.model.embed.lora_embedding_B": (6, RANK),
        "base_model.model.score.weight": (2, 6),
    }
    return {n: torch.randn(s, generator=source).to(dtype) for n, s in shapes.items()}


def adapter(folder: Path, found: dict[str, torch.Tensor], **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes), encoding="utf-8")
    save_file(found, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def mixed(found: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Return the same products in factors of another frame."""
    moved = dict(found)
    for name in found:
        inner = "lora_A" if "lora_A" in name else "lora_embedding_A" if "lora_embedding_A" in name else ""
        if inner:
            frame = torch.eye(RANK) + 0.5 * torch.randn(RANK, RANK, generator=generator(seed))
            outer = name.replace(inner, inner[:-1] + "B")
            moved[name] = (frame @ found[name].flatten(1)).reshape(found[name].shape)
            moved[outer] = (found[outer].flatten(1) @ torch.linalg.inv(frame)).reshape(found[outer].shape)
    return moved


def products(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        inner: found[outer].double().flatten(1) @ found[inner].double().flatten(1)
        for inner, outer in (
            (f"{ROOT}.self_attn.q_proj.lora_A.weight", f"{ROOT}.self_attn.q_proj.lora_B.weight"),
            (f"{ROOT}.conv.lora_A.weight", f"{ROOT}.conv.lora_B.weight"),
            ("base_model.model.embed.lora_embedding_A", "base_model.model.embed.lora_embedding_B"),
        )
    }


@pytest.mark.parametrize("way", ["svd", "aligned"])
def test_one_product_in_two_frames_stays(tmp_path: Path, way: Any) -> None:
    own = tensors(0)
    a = adapter(tmp_path / "a", own)
    b = adapter(tmp_path / "b", mixed(own, 1), target_modules=["v_proj", "q_proj"])
    found = merge_adapters([a, b], tmp_path / "out", way=way)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {n: (t.shape, t.dtype) for n, t in written.items()} == {
        n: (t.shape, t.dtype) for n, t in own.items()
    }
    for name, product in products(own).items():
        torch.testing.assert_close(products(written)[name], product, rtol=1e-5, atol=1e-5)
    assert found.errors[way] < 1e-7
    assert found.errors["as they are"] > 0.05
    assert len(found.by_module) == 3
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == CONFIG
    assert (tmp_path / "out" / "tokenizer.json").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'base_model: "org/base"' in card
    assert "library_name: peft" in card
    assert "3 pairs of factors averaged" in str(found)


def test_nothing_of_the_rank_is_nearer_than_the_cut_mean(tmp_path: Path) -> None:
    states = [tensors(seed) for seed in range(3)]
    folders = [adapter(tmp_path / str(k), state) for k, state in enumerate(states)]
    shares = [0.5, 0.3, 0.2]
    wanted = {
        name: sum(share * products(state)[name] for share, state in zip(shares, states, strict=True))
        for name in products(states[0])
    }
    for way in pretrained.ADAPTER_WAYS:
        found = merge_adapters(folders, tmp_path / way, [5, 3, 2], way=way)
        written = load_file(tmp_path / way / "adapter_model.safetensors")
        off = sum(float((products(written)[n] - w).square().sum()) for n, w in wanted.items()) ** 0.5
        size = sum(float(w.square().sum()) for w in wanted.values()) ** 0.5
        assert off / size == pytest.approx(found.errors[way], rel=1e-5)
        other = sum(
            share * state["base_model.model.score.weight"].double()
            for share, state in zip(shares, states, strict=True)
        )
        torch.testing.assert_close(
            written["base_model.model.score.weight"].double(), other, rtol=1e-6, atol=1e-6
        )
    assert found.errors["svd"] < found.errors["aligned"] < found.errors["as they are"]
    core = torch.linalg.svdvals(wanted[f"{ROOT}.conv.lora_A.weight"])
    best = float(core[RANK:].square().sum() ** 0.5 / core.square().sum() ** 0.5)
    assert found.by_module[f"{ROOT}.conv.lora_A.weight"]["svd"] == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_factors_that_vanish_and_ranks_above_the_sizes(rank: int) -> None:
    fresh = LowRank(
        torch.zeros(4, rank, dtype=torch.float64), torch.randn(rank, 3, generator=generator(1)).double()
    )
    other = LowRank(*(torch.randn(s, generator=generator(2)).double() for s in ((4, rank), (rank, 3))))
    for way in _low_rank.WAYS:
        nothing, errors = averaged_products([fresh, fresh], [0.5, 0.5], way)
        assert nothing.norm() == 0
        assert set(errors.values()) == {0.0}
    half, errors = averaged_products([fresh, other], [0.5, 0.5], "svd")
    torch.testing.assert_close(half.outer @ half.inner, 0.5 * other.outer @ other.inner)
    assert errors["svd"] < 1e-12
    assert half.outer.shape == (4, rank)


def test_half_precision_is_averaged_in_double_and_kept(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / str(k), tensors(k, torch.bfloat16)) for k in range(2)]
    merge_adapters(folders, tmp_path / "out")
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in written.values()} == {torch.bfloat16}
    huge = {n: torch.full_like(t, 6e4) for n, t in tensors(0, torch.float16).items()}
    huge["base_model.model.score.weight"] = torch.ones(2, 6)
    big = adapter(tmp_path / "big", huge)
    small = adapter(tmp_path / "small", {n: t.float() * 100 for n, t in huge.items()})
    with pytest.raises(CheckpointError, match=r"The average of '.*' is too large for float16"):
        merge_adapters([big, small], tmp_path / "over", [0.01, 0.99])
    assert not (tmp_path / "over").exists()


def without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda found: found.pop(name) and None


Q = f"{ROOT}.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, r"a has r = 3 and .*b 4: expected adapters of one rank, scale"),
        ({"lora_alpha": 16}, r"lora_alpha = 8 and .*b 16"),
        ({"use_rslora": True}, r"use_rslora = None and .*b True"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"peft_type": "IA3"}, r"expected an adapter of peft_type LORA, found 'IA3'"),
        ({"use_dora": True}, r"b: DoRA \(use_dora\), whose magnitudes"),
        ({"target_parameters": ["experts"]}, "adapters of stacked parameters"),
        ({"trainable_token_indices": [1]}, "trained tokens"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    a, b = adapter(tmp_path / "a", tensors(0)), adapter(tmp_path / "b", tensors(1), **changes)
    with pytest.raises(CheckpointError, match=message):
        merge_adapters([a, b], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("extra", "gone", "message"),
    [
        (f"{Q}.lora_magnitude_vector", "", r"lora_magnitude_vector' is a magnitude of DoRA: expected pairs"),
        (
            f"{Q}.lora_C.weight",
            "",
            r"lora_C\.weight' is not known: expected pairs of lora_A and lora_embedding_A",
        ),
        (
            "",
            f"{Q}.lora_B.weight",
            r"has no outer factor of its rank: expected .*lora_B\.weight' of shape \(outputs, 3\)",
        ),
        ("", f"{Q}.lora_A.weight", r"lora_B\.weight' is not known"),
    ],
)
def test_tensors_that_are_refused(tmp_path: Path, extra: str, gone: str, message: str) -> None:
    found = [{**{n: t for n, t in tensors(k).items() if n != gone}} for k in range(2)]
    folders = [
        adapter(tmp_path / str(k), {**f, **({extra: torch.ones(5)} if extra else {})})
        for k, f in enumerate(found)
    ]
    with pytest.raises(CheckpointError, match=message):
        merge_adapters(folders, tmp_path / "out")


def test_other_refusals(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", tensors(0))
    b = adapter(tmp_path / "b", tensors(1), base_model_name_or_path="org/other")
    with pytest.warns(IsthmusWarning, match="name different networks: org/base, org/other"):
        merge_adapters([a, b], tmp_path / "out")
    with pytest.raises(OutputError, match="is there already"):
        merge_adapters([a, b], tmp_path / "out")
    with pytest.raises(DataError, match="Averaging adapters by 'mean': expected one of 'svd', 'aligned'"):
        merge_adapters([a, b], tmp_path / "new", way="mean")  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no adapter_config\.json"):
        merge_adapters([a, tmp_path / "empty"], tmp_path / "new")
    (b / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        merge_adapters([a, b], tmp_path / "new")
    assert pretrained.are_adapters([a, b])
    assert not pretrained.are_adapters([a, tmp_path / "empty"])
