"""Model folders of diffusers: opened, verified, aligned, relabelled, merged."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers_models import NETWORKS, output, tiny
from safetensors.torch import load_file, save_file

import isthmus
from isthmus import pretrained
from isthmus.couplings import random_permutation
from isthmus.errors import (
    CheckpointError,
    DataError,
    IsthmusWarning,
    MissingExtraError,
    ModelError,
    OutputError,
)
from isthmus.pretrained import LazyState, check_inputs, inspect_input, open_model
from isthmus.symmetry import apply as apply_spec

diffusers.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore:.Transformer2DModelOutput. is deprecated:FutureWarning")


def saved(kind: str, folder: Path, seed: int = 0, **how: Any) -> Path:
    tiny(kind, seed).save_pretrained(folder, **how)
    return folder


def loaded(kind: str, folder: Path) -> Any:
    return getattr(diffusers, NETWORKS[kind][0]).from_pretrained(folder).eval()


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def quickly(*kinds: str) -> list[Any]:
    """Return all kinds of networks; the others are tested with the slow ones."""
    return [k if k in kinds else pytest.param(k, marks=pytest.mark.slow) for k in NETWORKS]


@pytest.mark.parametrize(
    "kind",
    quickly("unet-fourier", "text-xl", "image-hint", "vae", "dit", "pixart-plain", "transformer-codes"),
)
def test_the_function_is_that_of_from_pretrained(kind: str, tmp_path: Path) -> None:
    """With the inputs that are made, which reach every condition: none of the weights is without an effect."""
    saved(kind, tmp_path / "m")
    drawn = torch.get_rng_state()
    opened = open_model(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(t.is_meta for t in opened.model.state_dict().values())
    assert opened.library.name == "diffusers"
    reference = loaded(kind, tmp_path / "m")
    assert type(opened.load()).__name__ == type(reference).__name__
    expected, found = (output(m, opened.example.kwargs) for m in (reference, opened.load()))
    assert bool(expected.isfinite().all())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    result = reference.train().requires_grad_()(**opened.example.kwargs).sample
    result.square().sum().backward()
    dead = [n for n, p in reference.named_parameters() if p.grad is None and p.requires_grad]
    assert dead == {"transformer": [], "vq": ["quantize.embedding.weight"]}.get(kind, [])


@pytest.mark.parametrize("kind", quickly("unet-small"))
def test_a_planted_relabelling_is_found(kind: str, tmp_path: Path) -> None:
    opened = open_model(saved(kind, tmp_path / "a"))
    spec = opened.discover()
    assert pretrained.verify(spec, opened).passed
    generator = torch.Generator().manual_seed(3)
    planted = {name: random_permutation(g.size, generator) for name, g in spec.groups.items()}
    assert len(planted) >= 5
    other = opened.load()
    state = apply_spec(spec, planted, {n: opened.state[n] for n in opened.state})
    other.load_state_dict(state)
    other.save_pretrained(tmp_path / "b", max_shard_size="4KB")
    b = open_model(tmp_path / "b")
    alignment = pretrained.align(opened, b)
    assert alignment.verification_error is not None
    assert alignment.verification_error < 1e-10
    pretrained.apply(alignment, b, tmp_path / "back")
    back = open_model(tmp_path / "back")
    assert (tmp_path / "back" / "diffusion_pytorch_model.safetensors").exists()
    assert all(torch.equal(back.state[n], opened.state[n]) for n in opened.state)
    torch.testing.assert_close(
        output(loaded(kind, tmp_path / "back"), opened.example.kwargs),
        output(loaded(kind, tmp_path / "a"), opened.example.kwargs),
        rtol=0,
        atol=1e-6,
    )


def _latent_axes(kind: str) -> set[tuple[str, int]]:
    if kind == "vae":
        return {("quant_conv.weight", 0), ("quant_conv.bias", 0), ("post_quant_conv.weight", 1)}
    return {("encoder.conv_out.weight", 0), ("encoder.conv_out.bias", 0), ("decoder.conv_in.weight", 1)}


@pytest.mark.parametrize("kind", ["vae", pytest.param("vae-bare", marks=pytest.mark.slow)])
def test_latents_keep_their_order(kind: str, tmp_path: Path) -> None:
    """The plain forward leaves them free, but other networks are trained on them: encode alone must not change."""
    opened = open_model(saved(kind, tmp_path / "m"))
    spec, plain = opened.discover(), isthmus.discover(tiny(kind), kwargs=opened.example.kwargs)

    def moved(spec: Any) -> set[tuple[str, int]]:
        return {(s.tensor, s.axis) for g in spec.groups.values() for s in g.slots}

    assert _latent_axes(kind) & moved(plain)
    assert not _latent_axes(kind) & moved(spec)
    generator = torch.Generator().manual_seed(0)
    planted = {name: random_permutation(g.size, generator) for name, g in spec.groups.items()}
    a, b = opened.load(), opened.load()
    b.load_state_dict(apply_spec(spec, planted, a.state_dict()))
    images = opened.example.kwargs["sample"]
    with torch.no_grad():
        for own in ("mean", "logvar"):
            x, y = (getattr(m.encode(images).latent_dist, own) for m in (a, b))
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
        latent = a.encode(images).latent_dist.mode()
        torch.testing.assert_close(b.decode(latent).sample, a.decode(latent).sample, rtol=1e-4, atol=1e-4)
        both = a(images)
        parts = a(images, return_dict=False)
    assert torch.equal(both.latents[0], a.encode(images).latent_dist.parameters)
    assert torch.equal(parts[0], both.sample)
    assert torch.equal(parts[1][0], both.latents[0])
    assert torch.equal(pickle.loads(pickle.dumps(a))(images).latents[0], both.latents[0])
    a.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["_class_name"] == "AutoencoderKL"


def test_an_autoencoder_that_does_not_encode_in_its_forward(tmp_path: Path) -> None:
    from isthmus.pretrained._latents import with_latents

    class Odd(torch.nn.Module):
        def encode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def decode(self, x: torch.Tensor) -> torch.Tensor:
            return x

        def forward(self, x: torch.Tensor, through: bool = True) -> torch.Tensor:
            return self.decode(self.encode(x)) if through else x

    assert with_latents(Odd())(torch.ones(1))["latents"] == (torch.ones(1),)
    with pytest.raises(
        ModelError, match=r"Odd does not encode in its forward, so its latents.*cannot be told"
    ):
        with_latents(Odd())(torch.ones(1), through=False)


def test_merged_folders_load(tmp_path: Path) -> None:
    a = open_model(saved("vae", tmp_path / "a"))
    b = open_model(saved("vae", tmp_path / "b", 1, max_shard_size="4KB"))
    (tmp_path / "a" / "diffusion_pytorch_model.bin").write_bytes(b"old")
    (tmp_path / "a" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"old")
    with pytest.warns(IsthmusWarning, match="almost nothing in common"):
        written = pretrained.merge([a, b], tmp_path / "m", [1, 3], max_shard_size="4KB")
    assert written.left_out == ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors")
    assert written.shards[0] == f"diffusion_pytorch_model-00001-of-{len(written.shards):05}.safetensors"
    assert (tmp_path / "m" / "diffusion_pytorch_model.safetensors.index.json").exists()
    assert (tmp_path / "m" / "config.json").read_text() == (tmp_path / "a" / "config.json").read_text()
    assert "library_name: diffusers" in (tmp_path / "m" / "README.md").read_text()
    one, other, found = (loaded("vae", tmp_path / n).state_dict() for n in ("a", "b", "m"))
    for name, value in found.items():
        expected = (0.25 * one[name].double() + 0.75 * other[name].double()).float()
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


_OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def _with_old_names(folder: Path) -> None:
    """Write the attention of an autoencoder under the names that the files of Stable Diffusion 1 have."""
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    renamed = {}
    for key, value in tensors.items():
        head, dot, end = key.rpartition(".")
        for new, old in _OLD.items():
            if head.endswith(f"attentions.0.{new}"):
                head = head.removesuffix(new) + old
        renamed[head + dot + end] = value
    assert len(renamed.keys() - tensors.keys()) == 16
    save_file(renamed, path, {"format": "pt"})


def test_old_names_of_attention(tmp_path: Path) -> None:
    saved("vae", tmp_path / "m")
    expected = output(loaded("vae", tmp_path / "m"), open_model(tmp_path / "m").example.kwargs)
    _with_old_names(tmp_path / "m")
    opened = open_model(tmp_path / "m")
    stored = opened.state.stored("decoder.mid_block.attentions.0.to_q.weight")
    assert stored.key == "decoder.mid_block.attentions.0.query.weight"
    assert torch.equal(output(opened.load(), opened.example.kwargs), expected)
    pretrained.merge([opened, opened], tmp_path / "whole")
    torch.testing.assert_close(
        output(loaded("vae", tmp_path / "whole"), opened.example.kwargs), expected, rtol=0, atol=1e-6
    )
    with pytest.raises(
        OutputError, match=r"diffusers reads the old name .*attentions.* only where all.* larger shard"
    ):
        pretrained.merge([opened, opened], tmp_path / "many", max_shard_size="4KB")
    assert not (tmp_path / "many").exists()


def test_what_is_found_under_a_path(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    for kind in ("unet", "vae"):
        saved(kind, pipeline / kind)
    (pipeline / "model_index.json").write_text("{}")
    assert check_inputs([pipeline / "unet", pipeline / "vae"])
    with pytest.raises(
        CheckpointError, match=r"a pipeline .*: unet, vae\. Give the folder of one of them: .*unet, "
    ):
        open_model(pipeline)
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").rename(
        pipeline / "vae" / "diffusion_pytorch_model.fp16.safetensors"
    )
    assert "neither diffusion_pytorch_model.safetensors nor" in inspect_input(pipeline / "vae").what
    with pytest.raises(
        CheckpointError, match=r"It holds diffusion_pytorch_model\.fp16\.safetensors, a variant"
    ):
        open_model(pipeline / "vae")
    shutil.copy(
        pipeline / "unet" / "diffusion_pytorch_model.safetensors", pipeline / "unet" / "model.safetensors"
    )
    with pytest.raises(
        CheckpointError, match="holds weights of two networks, model and diffusion_pytorch_model"
    ):
        LazyState.open(pipeline / "unet")
    assert open_model(pipeline / "unet").file.stored("conv_in.weight").file.name.startswith("diffusion")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"_class_name": ["x", "Y"]}, CheckpointError, "_class_name of config.json is .*, expected the name"),
        ({"_class_name": "Telepathy"}, ModelError, "diffusers has no network 'Telepathy'.*is not run"),
        ({"_class_name": "DDPMScheduler"}, ModelError, "diffusers has no network 'DDPMScheduler'"),
        ({"_class_name": "ModelMixin"}, ModelError, "diffusers has no network 'ModelMixin'"),
        ({"_class_name": "DDPMPipeline"}, ModelError, "diffusers has no network 'DDPMPipeline'"),
        (
            {"block_out_channels": [4]},
            ModelError,
            "building UNet2DModel from config.json failed with ValueError",
        ),
        ({"block_out_channels": [4, 16]}, CheckpointError, "Weights and configuration do not match"),
        ({"layers_per_block": 10**7}, ModelError, "asks for layers_per_block = 10,000,000"),
        (
            {"block_out_channels": [40000, 80000]},
            ModelError,
            "describes a network of .* numbers in one tensor",
        ),
        ({"quantization_config": {"bits": 4}}, ModelError, "holds quantised weights"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: Any, error: type[Exception], message: str) -> None:
    edit_config(saved("unet", tmp_path / "m"), **changes)
    with pytest.raises(error, match=message):
        open_model(tmp_path / "m", trust_remote_code=True)


def test_networks_without_known_inputs(tmp_path: Path) -> None:
    model = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1)
    )  # fmt: skip
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(
        DataError, match=r"No example inputs are known for diffusers' AutoencoderTiny\. Pass example"
    ):
        open_model(tmp_path / "m")
    opened = open_model(tmp_path / "m", example={"sample": torch.randn(2, 3, 8, 8)})
    spec = opened.discover()
    assert pretrained.verify(spec, opened).passed
    last = [n for n in opened.state if n.startswith("encoder") and n.endswith("weight")][-1]
    assert opened.state[last].shape[0] == 4
    assert (last, 0) not in {(s.tensor, s.axis) for g in spec.groups.values() for s in g.slots}


def test_a_class_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("needs telepathy")

    saved("dit", tmp_path / "m")
    monkeypatch.setitem(sys.modules, "diffusers", Broken())
    with pytest.raises(
        ModelError, match=r"importing diffusers' DiT.* failed with RuntimeError: needs telepathy"
    ):
        open_model(tmp_path / "m")


def test_without_diffusers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("dit", tmp_path / "m")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(MissingExtraError, match=r'needs diffusers: pip install "isthmus\[diffusers\]"'):
        open_model(tmp_path / "m")
