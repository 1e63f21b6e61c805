"""Example inputs for the networks of diffusers, made from their configurations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.errors import DataError, printable

__all__ = ["example_for"]

_EXAMPLES = 2
_TOKENS = 7
_SMALLEST = 2
"""Height and width at the bottom of a U-Net or autoencoder, whose weights fit images of any size: enough for
convolution and attention to see neighbours, little enough to run networks of any width."""
_MOST_ENTRIES = 10**8
"""Of one input: a configuration may ask for anything, and inputs are made whatever the weights are."""
_TIME_IDS = 6
"""Numbers that say how an image was cropped (SDXL); its refiner has one less, and wider texts."""


def example_for(model: nn.Module) -> Batch:
    """Make two example inputs for a network of diffusers, with every condition that its configuration asks for.

    Values are drawn at random, from seed 0. Images are as small as the network allows.

    Raises:
        DataError: no inputs are known for networks of this class, or its configuration asks for none that can be made.
    """
    name = type(model).__name__
    if name not in _MAKERS:
        raise DataError(
            f"No example inputs are known for diffusers' {name}. Pass example={{...}}: keyword inputs as the network's "
            "forward takes them."
        )
    try:
        made = _MAKERS[name](_Draw(), model.config)
    except Exception as error:  # whatever stands in the configuration
        raise DataError(
            f"Example inputs for diffusers' {name} cannot be made from its configuration ({type(error).__name__}: "
            f"{printable(error)}). Pass example={{...}}: keyword inputs as the network's forward takes them."
        ) from error
    return Batch((), {key: value for key, value in made.items() if value is not None})


class _Draw:
    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(_within_bounds(shape), generator=self._generator)

    def positive(self, *shape: int) -> Tensor:
        return 0.5 + torch.rand(_within_bounds(shape), generator=self._generator)

    def whole(self, below: int, *shape: int, least: int = 0) -> Tensor:
        return torch.randint(least, max(below, least + 1), _within_bounds(shape), generator=self._generator)


def _within_bounds(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a batch of examples.

    Raises:
        DataError: it has far more entries than an input of any network.
    """
    if math.prod(shape) > _MOST_ENTRIES:
        raise DataError(f"an example would have shape {shape}")
    return (_EXAMPLES, *shape)


def _size_of(config: Any) -> int:
    return _SMALLEST * 2 ** (len(config.down_block_types) - 1)


def _classes(draw: _Draw, config: Any, wide: int = 4) -> Tensor | None:
    """Draw class labels, or what stands in their place.

    Args:
        draw: the source.
        config: of the network.
        wide: width of the embedding of times, in first channels.
    """
    kind = config.class_embed_type
    if kind == "timestep":
        return draw.whole(1000, least=1)  # of which the logarithm may be taken
    if kind == "identity":
        return draw.noise(config.time_embedding_dim or wide * config.block_out_channels[0])
    if kind in ("projection", "simple_projection"):
        return draw.noise(config.projection_class_embeddings_input_dim)
    return None if config.num_class_embeds is None else draw.whole(config.num_class_embeds)


def _unet(draw: _Draw, config: Any) -> dict[str, Any]:
    size = _size_of(config)
    continuous = config.time_embedding_type == "fourier"  # whose logarithm is taken
    times = draw.positive() if continuous else draw.whole(config.num_train_timesteps or 1000)
    return {
        "sample": draw.noise(config.in_channels, size, size),
        "timestep": times,
        "class_labels": _classes(draw, config),
    }


def _conditional_unet(draw: _Draw, config: Any) -> dict[str, Any]:
    size = _size_of(config)
    hint = 4 if config.addition_embed_type == "image_hint" else 0  # channels that the network appends itself
    width = config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]
    own = config.encoder_hid_dim if config.encoder_hid_dim_type in ("text_proj", "text_image_proj") else width
    continuous = config.time_embedding_type == "fourier"
    return {
        "sample": draw.noise(config.in_channels - hint, size, size),
        "timestep": draw.positive() if continuous else draw.whole(1000),
        "encoder_hidden_states": draw.noise(_TOKENS, own),
        "class_labels": _classes(draw, config, 2 if continuous else 4),
        "timestep_cond": draw.noise(config.time_cond_proj_dim) if config.time_cond_proj_dim else None,
        "added_cond_kwargs": _added(draw, config, width, size) or None,
    }


def _added(draw: _Draw, config: Any, width: int, size: int) -> dict[str, Tensor]:
    """Draw the further conditions of a U-Net: pooled texts, images, sizes and crops."""
    kind, made = config.addition_embed_type, {}
    if kind == "text_time":
        step = config.addition_time_embed_dim
        count = min(_TIME_IDS, (config.projection_class_embeddings_input_dim - 1) // step)
        made["time_ids"] = draw.whole(1024, count)
        made["text_embeds"] = draw.noise(config.projection_class_embeddings_input_dim - count * step)
    if kind == "text_image":
        made |= {"image_embeds": draw.noise(width), "text_embeds": draw.noise(width)}
    if config.encoder_hid_dim_type == "text_image_proj":
        made["image_embeds"] = draw.noise(width)
    if kind in ("image", "image_hint") or config.encoder_hid_dim_type == "image_proj":
        made["image_embeds"] = draw.noise(config.encoder_hid_dim)
    if kind == "image_hint":
        made["hint"] = draw.noise(3, 8 * size, 8 * size)
    return made


def _autoencoder(draw: _Draw, config: Any) -> dict[str, Any]:
    size = _size_of(config)
    return {"sample": draw.noise(config.in_channels, size, size)}


def _patches(draw: _Draw, config: Any) -> Tensor:
    """Draw images of few patches: tables of positions are cropped, or made anew for other sizes."""
    side = (config.patch_size or 1) * _SMALLEST
    return draw.noise(config.in_channels, side, side)


def _class_transformer(draw: _Draw, config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _patches(draw, config),
        "timestep": draw.whole(1000),
        "class_labels": draw.whole(config.num_embeds_ada_norm),
    }


def _text_transformer(draw: _Draw, config: Any) -> dict[str, Any]:
    more = (
        config.sample_size == 128
        if config.use_additional_conditions is None
        else config.use_additional_conditions
    )
    resolutions = {"resolution": draw.positive(2), "aspect_ratio": draw.positive(1)}
    return {
        "hidden_states": _patches(draw, config),
        "encoder_hidden_states": draw.noise(_TOKENS, config.caption_channels or config.cross_attention_dim),
        "timestep": draw.whole(1000),
        "added_cond_kwargs": resolutions if more else {"resolution": None, "aspect_ratio": None},
    }


def _transformer(draw: _Draw, config: Any) -> dict[str, Any]:
    if config.num_vector_embeds:  # the last of which stands for masked places
        hidden = draw.whole(config.num_vector_embeds - 1, config.sample_size**2)
    else:
        hidden = _patches(draw, config)
    text = config.caption_channels or config.cross_attention_dim
    times = draw.whole(config.num_embeds_ada_norm) if config.num_embeds_ada_norm else None
    if config.norm_type == "ada_norm" and times is not None:
        times = times[0]  # one for all examples: the network takes no others
    return {
        "hidden_states": hidden,
        "encoder_hidden_states": draw.noise(_TOKENS, text) if text else None,
        "timestep": times,
    }


def _joint_transformer(draw: _Draw, config: Any) -> dict[str, Any]:
    return {
        "hidden_states": _patches(draw, config),
        "encoder_hidden_states": draw.noise(_TOKENS, config.joint_attention_dim),
        "pooled_projections": draw.noise(config.pooled_projection_dim),
        "timestep": draw.whole(1000),
    }


_MAKERS: dict[str, Callable[[_Draw, Any], dict[str, Any]]] = {
    "UNet2DModel": _unet,
    "UNet2DConditionModel": _conditional_unet,
    "AutoencoderKL": _autoencoder,
    "VQModel": _autoencoder,
    "DiTTransformer2DModel": _class_transformer,
    "PixArtTransformer2DModel": _text_transformer,
    "Transformer2DModel": _transformer,
    "SD3Transformer2DModel": _joint_transformer,
}
