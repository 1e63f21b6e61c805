"""Tiny random networks built from ``transformers`` configurations: nothing is downloaded."""

from __future__ import annotations

import os
from typing import Any

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

Built = tuple[Any, tuple[Any, ...], dict[str, Any], Any]

LENGTH = 7
TOKENS = torch.tensor([[5, 9, 11, 3, 20, 17, 8], [2, 30, 6, 12, 4, 21, 13]])
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
WIDE = {**SMALL, "intermediate_size": 24}
GROUPED = {**WIDE, "hidden_size": 32, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
PIXELS = (
    torch.linspace(-1.0, 1.0, 2 * 3 * 16 * 16).sin().reshape(2, 3, 16, 16) + torch.linspace(0, 9, 16).cos()
)
WAVE = torch.linspace(0, 60, 2 * 1200).sin().reshape(2, 1200)


def _tokens(**more: Any) -> dict[str, Any]:
    return {"input_ids": TOKENS, **more}


def _seq2seq(**more: Any) -> dict[str, Any]:
    return {"input_ids": TOKENS, "decoder_input_ids": TOKENS[:, :5], "use_cache": False, **more}


CAUSAL = {"use_cache": False}
_BART: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "bos_token_id": 0,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 40,
}
_BERT: dict[str, Any] = {**WIDE, "max_position_embeddings": 32, "type_vocab_size": 2}
VIDEO = PIXELS[:, None].repeat(1, 2, 1, 1, 1) + torch.linspace(0, 3, 2).reshape(1, 2, 1, 1, 1)
SERIES = WAVE[:, :64].reshape(2, 32, 2)

# fmt: off
# name: (config class, model class, settings, inputs, outputs that count)
CONFIGS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], Any]] = {
    # decoders
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32}, _tokens(**CAUSAL), "logits"),
    "gpt_neo": ("GPTNeoConfig", "GPTNeoForCausalLM", {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "intermediate_size": 24, "vocab_size": 40, "max_position_embeddings": 32, "window_size": 4}, _tokens(**CAUSAL), "logits"),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 40, "n_positions": 32}, _tokens(**CAUSAL), "logits"),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**WIDE, "hidden_size": 32, "max_position_embeddings": 32, "rotary_pct": 0.5}, _tokens(**CAUSAL), "logits"),
    "opt": ("OPTConfig", "OPTForCausalLM", {"hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "vocab_size": 40, "max_position_embeddings": 32}, _tokens(**CAUSAL), "logits"),
    "bloom": ("BloomConfig", "BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40}, _tokens(**CAUSAL), "logits"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED}, _tokens(**CAUSAL), "logits"),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GROUPED, "sliding_window": 4}, _tokens(**CAUSAL), "logits"),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, _tokens(**CAUSAL), "logits"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**GROUPED}, _tokens(**CAUSAL), "logits"),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**GROUPED, "num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts_per_tok": 2}, _tokens(**CAUSAL), "logits"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED}, _tokens(**CAUSAL), "logits"),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {**GROUPED, "num_experts": 4, "moe_intermediate_size": 12, "num_experts_per_tok": 2}, _tokens(**CAUSAL), "logits"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GROUPED}, _tokens(**CAUSAL), "logits"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "sliding_window": 4}, _tokens(**CAUSAL), "logits"),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GROUPED, "sliding_window": 4}, _tokens(**CAUSAL), "logits"),
    "phi": ("PhiConfig", "PhiForCausalLM", {**WIDE, "hidden_size": 32}, _tokens(**CAUSAL), "logits"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**GROUPED, "pad_token_id": 0}, _tokens(**CAUSAL), "logits"),
    "falcon": ("FalconConfig", "FalconForCausalLM", {**SMALL, "hidden_size": 32, "ffn_hidden_size": 24}, _tokens(**CAUSAL), "logits"),
    "falcon_alibi": ("FalconConfig", "FalconForCausalLM", {**SMALL, "hidden_size": 32, "alibi": True, "multi_query": False, "parallel_attn": False}, _tokens(**CAUSAL), "logits"),
    "falcon_new": ("FalconConfig", "FalconForCausalLM", {**SMALL, "hidden_size": 32, "new_decoder_architecture": True, "num_kv_heads": 2}, _tokens(**CAUSAL), "logits"),
    "mpt": ("MptConfig", "MptForCausalLM", {"d_model": 16, "n_heads": 4, "n_layers": 2, "vocab_size": 40, "max_seq_len": 32}, _tokens(**CAUSAL), "logits"),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {**WIDE, "hidden_size": 32, "num_key_value_heads": 2}, _tokens(**CAUSAL), "logits"),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {**WIDE, "hidden_size": 32, "num_key_value_heads": 2}, _tokens(**CAUSAL), "logits"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {**WIDE, "hidden_size": 32, "num_key_value_heads": 2}, _tokens(**CAUSAL), "logits"),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {**GROUPED}, _tokens(**CAUSAL), "logits"),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "vocab_size": 40, "n_positions": 32}, _tokens(**CAUSAL), "logits"),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**GROUPED}, _tokens(**CAUSAL), "logits"),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**GROUPED}, _tokens(**CAUSAL), "logits"),
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}, _tokens(**CAUSAL), "logits"),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {**WIDE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1}, _tokens(**CAUSAL), "logits"),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32}, _tokens(**CAUSAL), "logits"),
    "mamba": ("MambaConfig", "MambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 5, "time_step_rank": 3}, _tokens(**CAUSAL), "logits"),
    "mamba2": ("Mamba2Config", "Mamba2ForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 6, "num_heads": 4, "head_dim": 8, "n_groups": 2, "chunk_size": 4}, _tokens(**CAUSAL), "logits"),
    "xglm": ("XGLMConfig", "XGLMForCausalLM", {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 4, "vocab_size": 40, "max_position_embeddings": 32}, _tokens(**CAUSAL), "logits"),
    # encoders
    "bert": ("BertConfig", "BertForMaskedLM", _BERT, _tokens(), "logits"),
    "bert_classifier": ("BertConfig", "BertForSequenceClassification", _BERT, _tokens(attention_mask=torch.tensor([[1] * 7, [1] * 5 + [0] * 2])), "logits"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _BERT, _tokens(), "logits"),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**_BERT, "embedding_size": 8}, _tokens(), "logits"),
    "distilbert": ("DistilBertConfig", "DistilBertForMaskedLM", {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "vocab_size": 40, "max_position_embeddings": 32}, _tokens(), "logits"),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {**_BERT, "embedding_size": 8}, _tokens(), "logits"),
    "deberta": ("DebertaConfig", "DebertaForMaskedLM", {**_BERT, "relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False}, _tokens(), "logits"),
    "deberta_v2": ("DebertaV2Config", "DebertaV2ForMaskedLM", {**_BERT, "relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False}, _tokens(), "logits"),
    "mpnet": ("MPNetConfig", "MPNetForMaskedLM", _BERT, _tokens(), "logits"),
    "xlnet": ("XLNetConfig", "XLNetLMHeadModel", {"d_model": 16, "n_layer": 2, "n_head": 4, "d_inner": 24, "vocab_size": 40}, _tokens(), "logits"),
    "fnet": ("FNetConfig", "FNetForMaskedLM", _BERT, _tokens(), "logits"),
    "convbert": ("ConvBertConfig", "ConvBertForMaskedLM", {**_BERT, "embedding_size": 16}, _tokens(), "logits"),
    "squeezebert": ("SqueezeBertConfig", "SqueezeBertForMaskedLM", {**_BERT, "embedding_size": 16}, _tokens(), "logits"),
    "mobilebert": ("MobileBertConfig", "MobileBertForMaskedLM", {**_BERT, "embedding_size": 16, "intra_bottleneck_size": 12}, _tokens(), "logits"),
    "nystromformer": ("NystromformerConfig", "NystromformerForMaskedLM", {**_BERT, "segment_means_seq_len": 7, "num_landmarks": 7}, _tokens(), "logits"),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", {**WIDE, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}, _tokens(), "logits"),
    "roformer": ("RoFormerConfig", "RoFormerForMaskedLM", {**_BERT, "embedding_size": 16}, _tokens(), "logits"),
    "ibert": ("IBertConfig", "IBertForMaskedLM", _BERT, _tokens(), "logits"),
    # encoder-decoders
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5, _seq2seq(), "logits"),
    "t5_gated": ("T5Config", "T5ForConditionalGeneration", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, _seq2seq(), "logits"),
    "umt5": ("UMT5Config", "UMT5ForConditionalGeneration", _T5, _seq2seq(), "logits"),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART, _seq2seq(), "logits"),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", _BART, _seq2seq(), "logits"),
    "marian": ("MarianConfig", "MarianMTModel", {**_BART, "decoder_vocab_size": 40}, _seq2seq(), "logits"),
    "m2m100": ("M2M100Config", "M2M100ForConditionalGeneration", _BART, _seq2seq(), "logits"),
    "blenderbot": ("BlenderbotConfig", "BlenderbotForConditionalGeneration", _BART, _seq2seq(), "logits"),
    # vision
    "vit": ("ViTConfig", "ViTForImageClassification", {**WIDE, **IMAGE}, {"pixel_values": PIXELS}, "logits"),
    "deit": ("DeiTConfig", "DeiTForImageClassification", {**WIDE, **IMAGE}, {"pixel_values": PIXELS}, "logits"),
    "beit": ("BeitConfig", "BeitForImageClassification", {**WIDE, **IMAGE, "use_relative_position_bias": True, "out_indices": [1, 2]}, {"pixel_values": PIXELS}, "logits"),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**WIDE, **IMAGE}, {"pixel_values": PIXELS}, "logits"),
    "swin": ("SwinConfig", "SwinForImageClassification", {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "num_labels": 3}, {"pixel_values": PIXELS}, "logits"),
    "swinv2": ("Swinv2Config", "Swinv2ForImageClassification", {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 2, "num_labels": 3}, {"pixel_values": PIXELS}, "logits"),
    "convnext": ("ConvNextConfig", "ConvNextForImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "patch_size": 2}, {"pixel_values": PIXELS}, "logits"),
    "convnextv2": ("ConvNextV2Config", "ConvNextV2ForImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2, "patch_size": 2}, {"pixel_values": PIXELS}, "logits"),
    "resnet": ("ResNetConfig", "ResNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}, {"pixel_values": PIXELS}, "logits"),
    "regnet": ("RegNetConfig", "RegNetForImageClassification", {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2], "groups_width": 8}, {"pixel_values": PIXELS}, "logits"),
    "mobilenet_v1": ("MobileNetV1Config", "MobileNetV1ForImageClassification", {"image_size": 32, "depth_multiplier": 0.25, "min_depth": 4}, {"pixel_values": PIXELS}, "logits"),
    "mobilenet_v2": ("MobileNetV2Config", "MobileNetV2ForImageClassification", {"image_size": 32, "depth_multiplier": 0.25}, {"pixel_values": PIXELS}, "logits"),
    "mobilevit": ("MobileViTConfig", "MobileViTForImageClassification", {"image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 8, 8, 12, 16, 20, 24], "num_attention_heads": 4}, {"pixel_values": torch.nn.functional.interpolate(PIXELS, size=64)}, "logits"),
    "efficientnet": ("EfficientNetConfig", "EfficientNetForImageClassification", {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}, {"pixel_values": torch.nn.functional.interpolate(PIXELS, size=64)}, "logits"),
    "levit": ("LevitConfig", "LevitForImageClassification", {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1], "key_dim": [4, 4, 4]}, {"pixel_values": torch.nn.functional.interpolate(PIXELS, size=64)}, "logits"),
    "poolformer": ("PoolFormerConfig", "PoolFormerForImageClassification", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [3, 3], "strides": [2, 2], "padding": [1, 1]}, {"pixel_values": PIXELS}, "logits"),
    "segformer": ("SegformerConfig", "SegformerForSemanticSegmentation", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [2, 4], "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 12}, {"pixel_values": PIXELS}, "logits"),
    "pvt": ("PvtConfig", "PvtForImageClassification", {"image_size": 32, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 3, 4], "sequence_reduction_ratios": [2, 2, 1, 1], "mlp_ratios": [2, 2, 2, 2]}, {"pixel_values": torch.nn.functional.interpolate(PIXELS, size=32)}, "logits"),
    "cvt": ("CvtConfig", "CvtForImageClassification", {"embed_dim": [8, 16], "num_heads": [2, 4], "depth": [1, 2], "patch_sizes": [3, 3], "patch_stride": [2, 2], "patch_padding": [1, 1], "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0], "qkv_bias": [True, True], "cls_token": [False, True], "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3], "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1]}, {"pixel_values": PIXELS}, "logits"),
    "focalnet": ("FocalNetConfig", "FocalNetForImageClassification", {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "focal_levels": [2, 2], "focal_windows": [3, 3], "hidden_sizes": [8, 16]}, {"pixel_values": PIXELS}, "logits"),
    "bit": ("BitConfig", "BitForImageClassification", {"embedding_size": 8, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 4}, {"pixel_values": PIXELS}, "logits"),
    "dpt": ("DPTConfig", "DPTForDepthEstimation", {**WIDE, **IMAGE, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [4, 8, 12, 16], "fusion_hidden_size": 8, "is_hybrid": False}, {"pixel_values": PIXELS}, "predicted_depth"),
    # audio and time
    "wav2vec2": ("Wav2Vec2Config", "Wav2Vec2ForCTC", {**WIDE, "conv_dim": [8, 8, 8], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}, {"input_values": WAVE}, "logits"),
    "hubert": ("HubertConfig", "HubertForCTC", {**WIDE, "conv_dim": [8, 8, 8], "conv_kernel": [10, 3, 3], "conv_stride": [5, 2, 2], "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}, {"input_values": WAVE}, "logits"),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", {**_BART, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 16}, {"input_features": WAVE[:, :320].reshape(2, 8, 40), "decoder_input_ids": TOKENS[:, :5], "use_cache": False}, "logits"),
    "ast": ("ASTConfig", "ASTForAudioClassification", {**WIDE, "patch_size": 4, "num_mel_bins": 16, "max_length": 24, "time_stride": 4, "frequency_stride": 4}, {"input_values": WAVE[:, :384].reshape(2, 24, 16)}, "logits"),
    # several modalities
    "clip": ("CLIPConfig", "CLIPModel", {"text_config": {**WIDE, "max_position_embeddings": 32, "eos_token_id": 2}, "vision_config": {**WIDE, **IMAGE}, "projection_dim": 12}, {"input_ids": TOKENS, "pixel_values": PIXELS}, ["logits_per_image", "logits_per_text"]),
    "siglip": ("SiglipConfig", "SiglipModel", {"text_config": {**WIDE, "max_position_embeddings": 32}, "vision_config": {**WIDE, **IMAGE}}, {"input_ids": TOKENS, "pixel_values": PIXELS}, ["logits_per_image", "logits_per_text"]),
    "layoutlm": ("LayoutLMConfig", "LayoutLMForMaskedLM", {**_BERT, "max_2d_position_embeddings": 32}, _tokens(bbox=torch.arange(56).reshape(2, 7, 4) % 5 + torch.tensor([0, 0, 9, 9])), "logits"),
    "perceiver": ("PerceiverConfig", "PerceiverForMaskedLM", {"num_latents": 6, "d_latents": 16, "d_model": 16, "num_blocks": 1, "num_self_attends_per_block": 2, "num_self_attention_heads": 4, "num_cross_attention_heads": 4, "vocab_size": 40, "max_position_embeddings": 7, "qk_channels": 16, "v_channels": 16}, {"inputs": TOKENS}, "logits"),
    "decision_transformer": ("DecisionTransformerConfig", "DecisionTransformerModel", {"state_dim": 5, "act_dim": 3, "hidden_size": 16, "n_layer": 2, "n_head": 4, "max_ep_len": 20}, {"states": WAVE[:, :20].reshape(2, 4, 5), "actions": WAVE[:, 20:32].reshape(2, 4, 3), "rewards": WAVE[:, 32:36].reshape(2, 4, 1), "returns_to_go": WAVE[:, 36:40].reshape(2, 4, 1), "timesteps": torch.arange(4).expand(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}, ["action_preds"]),
    # more of each kind
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**WIDE, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "kv_lora_rank": 8, "q_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}, _tokens(**CAUSAL), "logits"),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {**WIDE, "hidden_size": 32, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}, _tokens(**CAUSAL), "logits"),
    "granitemoe": ("GraniteMoeConfig", "GraniteMoeForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, _tokens(**CAUSAL), "logits"),
    "llama4": ("Llama4TextConfig", "Llama4ForCausalLM", {**GROUPED, "intermediate_size_mlp": 20, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, _tokens(**CAUSAL), "logits"),
    "phimoe": ("PhimoeConfig", "PhimoeForCausalLM", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, _tokens(**CAUSAL), "logits"),
    "jamba": ("JambaConfig", "JambaForCausalLM", {**WIDE, "hidden_size": 32, "num_key_value_heads": 2, "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 5, "mamba_dt_rank": 3, "use_mamba_kernels": False}, _tokens(**CAUSAL), "logits"),
    "falcon_mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 40, "state_size": 5, "time_step_rank": 3}, _tokens(**CAUSAL), "logits"),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", {"hidden_size": 16, "attention_hidden_size": 12, "num_hidden_layers": 2, "vocab_size": 40, "intermediate_size": 24}, _tokens(use_cache=False), "logits"),
    "recurrent_gemma": ("RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", {**WIDE, "hidden_size": 32, "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 20, "head_dim": 8}, _tokens(**CAUSAL), "logits"),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {**GROUPED, "pad_token_id": 0}, _tokens(**CAUSAL), "logits"),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", {**GROUPED}, _tokens(**CAUSAL), "logits"),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", {**WIDE, "hidden_size": 32}, _tokens(**CAUSAL), "logits"),
    "biogpt": ("BioGptConfig", "BioGptForCausalLM", {**WIDE, "max_position_embeddings": 32}, _tokens(**CAUSAL), "logits"),
    "ctrl": ("CTRLConfig", "CTRLLMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "dff": 24, "vocab_size": 40, "n_positions": 32}, _tokens(**CAUSAL), "logits"),
    "openai_gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 40, "n_positions": 32}, _tokens(), "logits"),
    "diffllama": ("DiffLlamaConfig", "DiffLlamaForCausalLM", {**GROUPED}, _tokens(**CAUSAL), "logits"),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {**GROUPED, "sliding_window": 4}, _tokens(**CAUSAL), "logits"),
    "xlm": ("XLMConfig", "XLMWithLMHeadModel", {"emb_dim": 16, "n_layers": 2, "n_heads": 4, "vocab_size": 40, "n_words": 40, "max_position_embeddings": 32}, _tokens(), "logits"),
    "rembert": ("RemBertConfig", "RemBertForMaskedLM", {**_BERT, "input_embedding_size": 8, "output_embedding_size": 12}, _tokens(), "logits"),
    "big_bird": ("BigBirdConfig", "BigBirdForMaskedLM", {**_BERT, "attention_type": "original_full"}, _tokens(), "logits"),
    "funnel": ("FunnelConfig", "FunnelForMaskedLM", {"d_model": 16, "n_head": 4, "d_head": 4, "d_inner": 24, "block_sizes": [1, 1], "num_decoder_layers": 1, "vocab_size": 40}, _tokens(), "logits"),
    "yoso": ("YosoConfig", "YosoForMaskedLM", {**_BERT, "use_expectation": True}, _tokens(), "logits"),
    "esm": ("EsmConfig", "EsmForMaskedLM", {**WIDE, "max_position_embeddings": 32, "pad_token_id": 1, "mask_token_id": 39, "position_embedding_type": "rotary", "token_dropout": False}, _tokens(), "logits"),
    "data2vec_text": ("Data2VecTextConfig", "Data2VecTextForMaskedLM", _BERT, _tokens(), "logits"),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", _T5, _seq2seq(), "logits"),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _BART, _seq2seq(), "logits"),
    "prophetnet": ("ProphetNetConfig", "ProphetNetForConditionalGeneration", {"hidden_size": 16, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40, "max_position_embeddings": 32}, _seq2seq(), "logits"),
    "swiftformer": ("SwiftFormerConfig", "SwiftFormerForImageClassification", {"image_size": 32, "embed_dims": [8, 12], "depths": [1, 1], "downsamples": [True, True]}, {"pixel_values": PIXELS.repeat(1, 1, 2, 2)}, "logits"),
    "pvt_v2": ("PvtV2Config", "PvtV2ForImageClassification", {"image_size": 32, "hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}, {"pixel_values": PIXELS.repeat(1, 1, 2, 2)}, "logits"),
    "dinov2_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", {**WIDE, **IMAGE}, {"pixel_values": PIXELS}, "logits"),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel", {**WIDE, **IMAGE}, {"pixel_values": PIXELS}, "last_hidden_state"),
    "yolos": ("YolosConfig", "YolosForObjectDetection", {**WIDE, "image_size": [16, 16], "patch_size": 4, "num_detection_tokens": 3}, {"pixel_values": PIXELS}, ["logits", "pred_boxes"]),
    "vit_msn": ("ViTMSNConfig", "ViTMSNForImageClassification", {**WIDE, **IMAGE}, {"pixel_values": PIXELS}, "logits"),
    "data2vec_vision": ("Data2VecVisionConfig", "Data2VecVisionForImageClassification", {**WIDE, **IMAGE, "use_shared_relative_position_bias": True}, {"pixel_values": PIXELS}, "logits"),
    "videomae": ("VideoMAEConfig", "VideoMAEForVideoClassification", {**WIDE, **IMAGE, "num_frames": 2, "tubelet_size": 2}, {"pixel_values": VIDEO}, "logits"),
    "timesformer": ("TimesformerConfig", "TimesformerForVideoClassification", {**WIDE, **IMAGE, "num_frames": 2}, {"pixel_values": VIDEO}, "logits"),
    "vivit": ("VivitConfig", "VivitForVideoClassification", {**WIDE, "image_size": 16, "num_frames": 2, "tubelet_size": [2, 4, 4]}, {"pixel_values": VIDEO}, "logits"),
    "swin2sr": ("Swin2SRConfig", "Swin2SRForImageSuperResolution", {"image_size": 16, "embed_dim": 8, "depths": [2], "num_heads": [2], "window_size": 4, "upscale": 2, "num_channels": 3}, {"pixel_values": PIXELS}, "reconstruction"),
    "blip": ("BlipConfig", "BlipForImageTextRetrieval", {"text_config": {**WIDE, "encoder_hidden_size": 16, "max_position_embeddings": 32, "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2, "sep_token_id": 2}, "vision_config": {**WIDE, **IMAGE}, "image_text_hidden_size": 12}, {"input_ids": TOKENS, "pixel_values": PIXELS, "attention_mask": torch.ones_like(TOKENS)}, "itm_score"),
    "git": ("GitConfig", "GitForCausalLM", {**WIDE, "max_position_embeddings": 32, "vision_config": {**WIDE, **IMAGE}}, {"input_ids": TOKENS, "pixel_values": PIXELS, "use_cache": False}, "logits"),
    "siglip2_text": ("Siglip2TextConfig", "Siglip2TextModel", {**WIDE, "max_position_embeddings": 32, "projection_size": 12}, _tokens(), "pooler_output"),
    "wav2vec2_conformer": ("Wav2Vec2ConformerConfig", "Wav2Vec2ConformerForCTC", {**WIDE, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "conv_depthwise_kernel_size": 3, "position_embeddings_type": "relative"}, {"input_values": WAVE[:, :400]}, "logits"),
    "wavlm": ("WavLMConfig", "WavLMForCTC", {**WIDE, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}, {"input_values": WAVE[:, :400]}, "logits"),
    "wav2vec2_masked": ("Wav2Vec2Config", "Wav2Vec2ForCTC", {**WIDE, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "do_stable_layer_norm": True}, {"input_values": WAVE[:, :400], "attention_mask": torch.cat([torch.ones(2, 300, dtype=torch.long), torch.tensor([[1], [0]]).expand(2, 100)], 1)}, "logits"),
    "sew": ("SEWConfig", "SEWForCTC", {**WIDE, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}, {"input_values": WAVE[:, :400]}, "logits"),
    "data2vec_audio": ("Data2VecAudioConfig", "Data2VecAudioForCTC", {**WIDE, "conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2, "conv_pos_kernel_size": 3}, {"input_values": WAVE[:, :400]}, "logits"),
    "musicgen_decoder": ("MusicgenDecoderConfig", "MusicgenForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "vocab_size": 40, "num_codebooks": 2, "pad_token_id": 39, "bos_token_id": 39}, {"input_ids": TOKENS.repeat(2, 1), "use_cache": False}, "logits"),
    "patchtst": ("PatchTSTConfig", "PatchTSTForRegression", {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 24, "num_targets": 2}, {"past_values": SERIES}, "regression_outputs"),
    "patchtsmixer": ("PatchTSMixerConfig", "PatchTSMixerForPrediction", {"num_input_channels": 2, "context_length": 32, "patch_length": 8, "patch_stride": 8, "d_model": 8, "num_layers": 2, "expansion_factor": 2, "prediction_length": 4, "loss": "mse"}, {"past_values": SERIES}, "prediction_outputs"),
    "layoutlmv3": ("LayoutLMv3Config", "LayoutLMv3ForTokenClassification", {**_BERT, "coordinate_size": 3, "shape_size": 2, "max_2d_position_embeddings": 16, "visual_embed": False, "has_relative_attention_bias": True, "has_spatial_attention_bias": True, "max_position_embeddings": 32, "pad_token_id": 1}, _tokens(bbox=torch.arange(4).expand(2, 7, 4).contiguous()), "logits"),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**GROUPED, "num_experts": 4, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 4, "linear_value_head_dim": 4, "layer_types": ["linear_attention", "full_attention"]}, _tokens(**CAUSAL), "logits"),
    "mixtral_grouped": ("MixtralConfig", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}, _tokens(**CAUSAL), "logits"),
}
# fmt: on


def build(name: str) -> Built:
    """Return model, positional and keyword inputs, and the outputs that count."""
    import transformers

    transformers.logging.set_verbosity_error()
    config_class, model_class, settings, inputs, outputs = CONFIGS[name]
    config = getattr(transformers, config_class)(**settings)
    if "experts" in str(settings) and "grouped" not in name:
        config._experts_implementation = (
            "batched_mm"  # the grouped product needs float32 and sorts the tokens
        )
    model = getattr(transformers, model_class)(config)
    return model.eval(), (), inputs, outputs
