"""Small models for text with images or sound, two layers of each part, built from transformers' configurations."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 273
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
}  # fmt: skip
SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2,
          "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 1}
LLAMA = {"model_type": "llama", **TEXT}
QWEN2 = {"model_type": "qwen2", **TEXT}
SIGLIP = {"model_type": "siglip_vision_model", **VISION}
CLIP = {"model_type": "clip_vision_model", **VISION, "projection_dim": 16}

COMPOSITES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3Config", "Gemma3ForConditionalGeneration",
        {"text_config": {**TEXT, "query_pre_attn_scalar": 8, "sliding_window": 8}, "vision_config": VISION,
         "mm_tokens_per_image": 4, "image_token_index": 100},
    ),
    "gemma4": (
        "Gemma4Config", "Gemma4ForConditionalGeneration",
        {"text_config": {**TEXT, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY,
                         "global_head_dim": 8, "num_kv_shared_layers": 0, "final_logit_softcapping": 30.0,
                         "layer_types": ["sliding_attention", "full_attention"]},
         "vision_config": {**VISION, "head_dim": 8, "num_key_value_heads": 2},
         "audio_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "subsampling_conv_channels": [4, 4], "output_proj_dims": 16},
         "image_token_id": 100, "audio_token_id": 101, "video_token_id": 102},
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {**TEXT, "rope_parameters": SECTIONS}, "vision_config": {**QWEN, "fullatt_block_indexes": [1]}},
    ),
    "qwen2-vl": (
        "Qwen2VLConfig", "Qwen2VLForConditionalGeneration",
        {"text_config": {**TEXT, "rope_parameters": SECTIONS},
         "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}},
    ),
    "qwen3-vl": (
        "Qwen3VLConfig", "Qwen3VLForConditionalGeneration",
        {"text_config": {**TEXT, "rope_parameters": SECTIONS},
         "vision_config": {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration",
        {"text_config": {**TEXT, **EXPERTS, "rope_parameters": SECTIONS},
         "vision_config": {**QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}},
    ),
    "qwen3.5": (
        "Qwen3_5Config", "Qwen3_5ForConditionalGeneration",
        {"text_config": {**TEXT, **LINEAR, "rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0}},
         "vision_config": {**QWEN, "num_position_embeddings": 16}},
    ),
    "llava": (
        "LlavaConfig", "LlavaForConditionalGeneration",
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 100},
    ),
    "llava-next": (
        "LlavaNextConfig", "LlavaNextForConditionalGeneration",
        {"text_config": LLAMA, "vision_config": CLIP, "image_token_index": 100},
    ),
    "llava-onevision": (
        "LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration",
        {"text_config": QWEN2, "vision_config": SIGLIP, "image_token_index": 100},
    ),
    "mistral3": (
        "Mistral3Config", "Mistral3ForConditionalGeneration",
        {"text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
         "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8}, "image_token_index": 100},
    ),
    "llama4": (
        "Llama4Config", "Llama4ForConditionalGeneration",
        {"text_config": {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2,
                         "attention_chunk_size": 64},
         "vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16,
                           "intermediate_size": 64}},
    ),
    "smolvlm": (
        "SmolVLMConfig", "SmolVLMForConditionalGeneration",
        {"text_config": LLAMA, "vision_config": VISION, "scale_factor": 2, "image_token_id": 100, "pad_token_id": 0},
    ),
    "idefics3": (
        "Idefics3Config", "Idefics3ForConditionalGeneration",
        {"text_config": LLAMA, "vision_config": VISION, "scale_factor": 2, "image_token_id": 100, "pad_token_id": 0},
    ),
    "paligemma": (
        "PaliGemmaConfig", "PaliGemmaForConditionalGeneration",
        {"text_config": {"model_type": "gemma", **TEXT}, "vision_config": SIGLIP, "image_token_index": 100,
         "projection_dim": 32},
    ),
    "internvl": (
        "InternVLConfig", "InternVLForConditionalGeneration",
        {"text_config": QWEN2, "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
         "image_token_id": 100},
    ),
    "glm4v": (
        "Glm4vConfig", "Glm4vForConditionalGeneration",
        {"text_config": {**TEXT, "rope_parameters": {**SECTIONS, "partial_rotary_factor": 1.0}},
         "vision_config": {**QWEN, "image_size": 28, "patch_size": 14}},
    ),
    "aya-vision": (
        "AyaVisionConfig", "AyaVisionForConditionalGeneration",
        {"text_config": {"model_type": "cohere2", **TEXT, "sliding_window": 8}, "vision_config": SIGLIP,
         "image_token_index": 100, "downsample_factor": 2},
    ),
    "cohere2-vision": (
        "Cohere2VisionConfig", "Cohere2VisionForConditionalGeneration",
        {"text_config": {"model_type": "cohere2", **TEXT, "sliding_window": 8}, "vision_config": SIGLIP},
    ),
    "lfm2-vl": (
        "Lfm2VlConfig", "Lfm2VlForConditionalGeneration",
        {"text_config": {"model_type": "lfm2", **TEXT, "layer_types": ["conv", "full_attention"]},
         "vision_config": {"model_type": "siglip2_vision_model", **VISION}},
    ),
    "qwen2-audio": (
        "Qwen2AudioConfig", "Qwen2AudioForConditionalGeneration",
        {"text_config": QWEN2, "audio_config": {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
                                                "encoder_ffn_dim": 24, "num_mel_bins": 8}, "audio_token_index": 100},
    ),
    "voxtral": (
        "VoxtralConfig", "VoxtralForConditionalGeneration",
        {"text_config": LLAMA, "audio_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                                                "intermediate_size": 64, "num_mel_bins": 8}, "audio_token_id": 100},
    ),
}  # fmt: skip


def composite(name: str, **changed: Any) -> PreTrainedModel:
    """Build a model with random weights; `changed` are settings of its language model."""
    config, kind, settings = COMPOSITES[name]
    settings = {**settings, "text_config": {**settings["text_config"], **changed}}
    torch.manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():  # or all ids would be about as likely
        for weight in model.get_decoder().parameters():
            weight.mul_(2.0)
    return model
