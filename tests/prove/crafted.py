"""A target and a head whose every token is known beforehand, run by the real engine.

The target's layers add nothing, so its next token depends on the last one only: x -> partner[x].
The head guesses x[i+2] = x[i], at every draft step. Hence, exactly:

- a token that is its own partner repeats: every draft is right;
- two tokens that are each other's partner alternate: the first draft is right, the second wrong;
- in a ring of three every draft is wrong.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests import tiny

HIDDEN = 64
DRAFT_VOCAB = 300
REPEATS = range(10, 100)
ALTERNATES = range(100, 200)
RINGS = range(200, 299)


def partners() -> torch.Tensor:
    """The next token of each: int64 [512]."""
    partner = torch.arange(tiny.VOCAB)
    for a in ALTERNATES[::2]:
        partner[a], partner[a + 1] = a + 1, a
    for a in RINGS[::3]:
        partner[a], partner[a + 1], partner[a + 2] = a + 1, a + 2, a
    return partner


def target(folder: Path, partner: torch.Tensor | None = None, scale: float = 1.0) -> Path:
    """Write the target, with a tokenizer, and return its folder. scale: of its logits; with less
    than 1 it is less sure, so that sampling and penalties change what it writes."""
    partner = partners() if partner is None else partner
    folder.mkdir(parents=True, exist_ok=True)
    tiny.tiny_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=tiny.VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=4,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = torch.randn(tiny.VOCAB, HIDDEN, generator=torch.Generator().manual_seed(0))
        embedding /= embedding.norm(dim=1, keepdim=True) / HIDDEN**0.5
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight[partner] = embedding * scale
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 4}))
    return folder


def head(folder: Path, target_folder: Path, scale: float = 1.0) -> Path:
    """Write the head for a target of :func:`target`, as vLLM reads it. scale: of its logits."""
    from safetensors import safe_open

    with safe_open(target_folder / "model.safetensors", "pt") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "attention_bias": False,
        "vocab_size": tiny.VOCAB,
        "draft_vocab_size": DRAFT_VOCAB,
        "tie_word_embeddings": False,
        "target_hidden_size": HIDDEN,
        "num_aux_hidden_states": 3,
        "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [0, 1, 2],
        },
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    zero = torch.zeros
    one = torch.ones(HIDDEN)
    save_file(
        {
            "fc.weight": torch.cat([torch.eye(HIDDEN), zero(HIDDEN, 2 * HIDDEN)], dim=1),
            "layers.0.self_attn.q_proj.weight": zero(64, 2 * HIDDEN),
            "layers.0.self_attn.k_proj.weight": zero(32, 2 * HIDDEN),
            "layers.0.self_attn.v_proj.weight": zero(32, 2 * HIDDEN),
            "layers.0.self_attn.o_proj.weight": zero(HIDDEN, 64),
            "layers.0.mlp.gate_proj.weight": zero(64, HIDDEN),
            "layers.0.mlp.up_proj.weight": zero(64, HIDDEN),
            "layers.0.mlp.down_proj.weight": zero(HIDDEN, 64),
            "layers.0.input_layernorm.weight": one.clone(),
            "layers.0.hidden_norm.weight": one.clone(),
            "layers.0.post_attention_layernorm.weight": one.clone(),
            "norm.weight": one.clone(),
            "lm_head.weight": embedding[:DRAFT_VOCAB] * scale,
            "d2t": zero(DRAFT_VOCAB, dtype=torch.int64),
            "t2d": torch.arange(tiny.VOCAB) < DRAFT_VOCAB,
        },
        folder / "model.safetensors",
    )
    return folder
