"""Tiny networks of diffusers, with nothing left at its initial symmetry."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from pretrained_models import randomised

_UNET = {
    "block_out_channels": (4, 8),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}
_PLAIN = {
    **_UNET,
    "sample_size": 8,
    "in_channels": 2,
    "out_channels": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
_TEXT = {
    **_UNET,
    "attention_head_dim": 2,
    "cross_attention_dim": 6,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_SMALL = {**_TEXT, "block_out_channels": (4,), "down_block_types": ("CrossAttnDownBlock2D",),
          "up_block_types": ("CrossAttnUpBlock2D",)}  # fmt: skip
_VAE = {"block_out_channels": (4,), "norm_num_groups": 2, "latent_channels": 3}
_DEEP_VAE = {
    **_VAE,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
}
_ATTENTION = {
    "num_attention_heads": 2,
    "attention_head_dim": 4,
    "num_layers": 1,
    "in_channels": 2,
    "sample_size": 4,
}
_PATCHES = {**_ATTENTION, "patch_size": 2, "norm_elementwise_affine": False}

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet": ("UNet2DModel", _PLAIN),
    "unet-small": (
        "UNet2DModel",
        {
            **_PLAIN,
            "block_out_channels": (4,),
            "down_block_types": ("AttnDownBlock2D",),
            "up_block_types": ("AttnUpBlock2D",),
            "mid_block_type": None,
        },
    ),
    "unet-classes": ("UNet2DModel", {**_PLAIN, "num_class_embeds": 5}),
    "unet-class-times": ("UNet2DModel", {**_PLAIN, "class_embed_type": "timestep"}),
    "unet-class-vectors": ("UNet2DModel", {**_PLAIN, "class_embed_type": "identity"}),
    "unet-fourier": (
        "UNet2DModel",
        {**_PLAIN, "time_embedding_type": "fourier", "class_embed_type": "timestep"},
    ),
    "unet-learned-times": (
        "UNet2DModel",
        {**_PLAIN, "time_embedding_type": "learned", "num_train_timesteps": 9},
    ),
    "text": ("UNet2DConditionModel", _TEXT),
    "text-xl": (
        "UNet2DConditionModel",
        {
            **_SMALL,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 2,
            "projection_class_embeddings_input_dim": 17,
            "use_linear_projection": True,
        },
    ),
    "text-classes": ("UNet2DConditionModel", {**_SMALL, "num_class_embeds": 3, "time_cond_proj_dim": 5}),
    "text-projected-classes": (
        "UNet2DConditionModel",
        {**_SMALL, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 7},
    ),
    "text-fourier": (
        "UNet2DConditionModel",
        {**_SMALL, "time_embedding_type": "fourier", "class_embed_type": "identity"},
    ),
    "text-projected": (
        "UNet2DConditionModel",
        {**_SMALL, "encoder_hid_dim": 5, "addition_embed_type": "text", "addition_embed_type_num_heads": 1},
    ),
    "text-image": (
        "UNet2DConditionModel",
        {
            **_SMALL,
            "encoder_hid_dim": 5,
            "encoder_hid_dim_type": "text_image_proj",
            "addition_embed_type": "text_image",
        },
    ),
    "image": (
        "UNet2DConditionModel",
        {
            **_SMALL,
            "encoder_hid_dim": 5,
            "encoder_hid_dim_type": "image_proj",
            "addition_embed_type": "image",
        },
    ),
    "image-hint": (
        "UNet2DConditionModel",
        {
            **_SMALL,
            "in_channels": 8,
            "encoder_hid_dim": 5,
            "encoder_hid_dim_type": "image_proj",
            "addition_embed_type": "image_hint",
        },
    ),
    "vae": ("AutoencoderKL", _VAE),
    "vae-bare": ("AutoencoderKL", {**_DEEP_VAE, "use_quant_conv": False, "use_post_quant_conv": False}),
    "vq": ("VQModel", {**_VAE, "num_vq_embeddings": 6}),
    "dit": ("DiTTransformer2DModel", {**_PATCHES, "num_embeds_ada_norm": 5}),
    "dit-old": (
        "Transformer2DModel",
        {**_PATCHES, "num_embeds_ada_norm": 5, "norm_type": "ada_norm_zero", "attention_bias": True},
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {
            **_PATCHES,
            "num_attention_heads": 3,
            "cross_attention_dim": 12,
            "caption_channels": 5,
            "use_additional_conditions": True,
        },
    ),
    "pixart-plain": (
        "PixArtTransformer2DModel",
        {**_PATCHES, "sample_size": 16, "cross_attention_dim": 8, "caption_channels": 5},
    ),
    "transformer": ("Transformer2DModel", {**_ATTENTION, "norm_num_groups": 2, "cross_attention_dim": 6}),
    "transformer-codes": (
        "Transformer2DModel",
        {
            **_ATTENTION,
            "in_channels": None,
            "num_vector_embeds": 5,
            "norm_type": "ada_norm",
            "num_embeds_ada_norm": 9,
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            **_ATTENTION,
            "patch_size": 2,
            "joint_attention_dim": 6,
            "caption_projection_dim": 8,
            "pooled_projection_dim": 5,
            "out_channels": 2,
            "pos_embed_max_size": 4,
        },
    ),
}


def tiny(kind: str, seed: int = 0, **changes: Any) -> Any:
    """Build a network with random weights, gains and biases."""
    name, config = NETWORKS[kind]
    torch.manual_seed(seed)
    model = randomised(getattr(diffusers, name)(**config | changes), seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.4)  # deep networks without it saturate
    return model.eval()


def output(model: Any, kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**kwargs).sample
