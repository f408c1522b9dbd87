"""Tiny random multimodal checkpoints, in fp32: a text model beside a tower for images."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForMultimodalLM

from tests.tiny import SIZES, tiny_tokenizer

_TEXT = SIZES | {"eos_token_id": 4}
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_TOWER = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 1,
    "intermediate_size": 64,
    "out_hidden_size": 64,
}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
SETTINGS: dict[str, dict] = {
    "mistral3": {
        "text_config": {"model_type": "mistral"},
        "vision_config": {"model_type": "pixtral", **_TOWER},
        "image_token_index": 5,
    },
    "qwen2_5_vl": {
        "text_config": {"rope_parameters": _MROPE},
        "vision_config": _QWEN_TOWER,
        "image_token_id": 5,
    },
    "qwen3_vl": {
        "text_config": {"rope_parameters": _MROPE | {"mrope_interleaved": True}},
        "vision_config": {
            **_QWEN_TOWER,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": 5,
    },
    "qwen3_5": {
        "text_config": {
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
        },
        "vision_config": _QWEN_TOWER | {"num_position_embeddings": 16},
        "image_token_id": 5,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **_TOWER},
        "image_token_index": 5,
    },
    "llama4": {
        "text_config": {
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 512,
        },
        "vision_config": _TOWER | {"vision_output_dim": 64, "projector_input_dim": 64},
        "image_token_index": 5,
    },
    "gemma4": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 16,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 32,
            "final_logit_softcapping": 2.0,
        },
        "vision_config": _TOWER | {"num_key_value_heads": 1, "head_dim": 32},
        "audio_config": None,
        "image_token_id": 5,
    },
    "gemma3": {
        "text_config": {
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 32,
        },
        "vision_config": {"model_type": "siglip_vision_model", **_TOWER},
        "image_token_index": 5,
    },
}
"""By `model_type`: what the configuration needs beside the text model's sizes."""


def write(
    kind: str, folder: Path, *, tied: bool = True, embedding_scale: float = 1.0, seed: int = 0
) -> Path:
    """One of ``SETTINGS``, with a tokenizer. See ``tests.vllm.models.write_target`` for the scale
    of the embedding."""
    settings = SETTINGS[kind]
    text = _TEXT | settings["text_config"] | {"tie_word_embeddings": tied}
    config = AutoConfig.for_model(
        kind,
        **settings | {"text_config": text},
        tie_word_embeddings=tied,
        dtype="float32",
    )
    torch.manual_seed(seed)
    model = AutoModelForMultimodalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = embedding_scale if "embed_tokens" in name else 1.0
            torch.nn.init.normal_(parameter, std=0.15 * scale, generator=generator)
        elif "norm" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder
