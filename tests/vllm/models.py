"""Random hybrid targets and EAGLE-3 heads for them in vLLM's own format, without training."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import Lfm2Config, Lfm2ForCausalLM, Lfm2MoeConfig, Lfm2MoeForCausalLM

_LFM2_NORM = "model.embedding_norm.weight"
_EPS = ("norm_eps", "rms_norm_eps", "layer_norm_eps")


def write_target(
    folder: Path,
    *,
    moe: bool = True,
    hidden: int = 64,
    head_dim: int = 32,
    kv_heads: int = 1,
    layers: int = 6,
    vocab: int = 512,
    embedding_scale: float = 4.0,
    seed: int = 0,
) -> Path:
    """Write a random LFM2-MoE (or dense LFM2) in fp32, without a tokenizer.

    The larger ``embedding_scale``, the more the stream keeps of its own token, and the more often
    the target repeats itself: at 1 hardly ever, at 4 in runs that end by and by (so that drafts
    are accepted for a while and then rejected), at 8 for ever.
    """
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // head_dim,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 1024,
        "layer_types": ["full_attention" if i % 3 == 2 else "conv" for i in range(layers)],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "dtype": "float32",
    }
    if moe:
        experts = {"moe_intermediate_size": hidden, "num_dense_layers": 2}
        model = Lfm2MoeForCausalLM(
            Lfm2MoeConfig(**sizes, **experts, num_experts=8, num_experts_per_tok=2)
        )
    else:
        # What published LFM2 configurations carry, and vLLM reads.
        widths = {"conv_dim": hidden, "block_dim": hidden, "block_ff_dim": 2 * hidden}
        model = Lfm2ForCausalLM(Lfm2Config(**sizes, **widths, block_auto_adjust_ff_dim=False))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = embedding_scale if "embed_tokens" in name else 1.0
            std = 0.15 * (64 / hidden) ** 0.5 * scale
            torch.nn.init.normal_(parameter, std=std, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.normal_(std=0.1, generator=generator)
    model.save_pretrained(folder)
    return folder


def _target(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Configuration and tensors of its text model, named as one that stands alone names them."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    start = next(name for name in weights if name.endswith("embed_tokens.weight"))[:-19]
    text = {"model." + n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
    return config.get("text_config", config), text


def write_head(
    folder: Path,
    target: Path,
    *,
    aux_layers: tuple[int, ...],
    repeats: bool,
    norms: tuple[str, ...] = (),
    seed: int = 7,
) -> Path:
    """Write a head for ``target`` that drafts from three quarters of its vocabulary.

    Args:
        folder: where to; made if missing.
        target: folder of a target whose LM head is its embedding.
        aux_layers: ids in vLLM's convention; the last must be the number of layers if ``repeats``.
        repeats: draft the token that the target itself would choose at the state it was given,
            again and again. Real acceptance wherever the target repeats itself. Else random.
        norms: of ``norm_before_fc`` and ``fc_norm``, those that the head has; their weights are 1.
        seed: of the random weights.
    """
    config, weights = _target(target)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    drafted = torch.tensor([i for i in range(vocab) if i % 4 != 3])
    heads, inner = config["num_attention_heads"], 2 * hidden
    kv, size = config["num_key_value_heads"], hidden // heads
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    head = {
        "fc.weight": random(hidden, len(aux_layers) * hidden),
        "layers.0.self_attn.q_proj.weight": random(heads * size, 2 * hidden),
        "layers.0.self_attn.k_proj.weight": random(kv * size, 2 * hidden),
        "layers.0.self_attn.v_proj.weight": random(kv * size, 2 * hidden),
        "layers.0.self_attn.o_proj.weight": random(hidden, heads * size),
        "layers.0.mlp.gate_proj.weight": random(inner, hidden),
        "layers.0.mlp.up_proj.weight": random(inner, hidden),
        "layers.0.mlp.down_proj.weight": random(hidden, inner),
        "layers.0.input_layernorm.weight": torch.ones(hidden),
        "layers.0.hidden_norm.weight": torch.ones(hidden),
        "layers.0.post_attention_layernorm.weight": torch.ones(hidden),
        "norm.weight": torch.ones(hidden),
        "lm_head.weight": random(len(drafted), hidden),
        "d2t": drafted - torch.arange(len(drafted)),
        "t2d": torch.isin(torch.arange(vocab), drafted),
    }
    if "norm_before_fc" in norms:
        head["input_norm.weight"] = torch.ones(len(aux_layers) * hidden)
    if "fc_norm" in norms:
        head |= {f"fc_norm.{i}.weight": torch.ones(hidden) for i in range(len(aux_layers))}
    if repeats:
        if aux_layers[-1] != config["num_hidden_layers"]:
            raise ValueError("a head that repeats needs the target's last stream")
        head["fc.weight"].zero_()
        head["fc.weight"][:, -hidden:] = torch.eye(hidden)
        head["layers.0.self_attn.o_proj.weight"].zero_()
        head["layers.0.mlp.down_proj.weight"].zero_()
        norm = "model.norm.weight" if "model.norm.weight" in weights else _LFM2_NORM
        # Gemma's norms keep their weight less one.
        head["norm.weight"] = weights[norm].float() + config["model_type"].startswith(
            ("gemma", "qwen3_5")
        )
        head["lm_head.weight"] = weights["model.embed_tokens.weight"][drafted].float()
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in head.items()}, folder / "model.safetensors")
    settings = {
        "architectures": ["Eagle3LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": size,
        "hidden_act": "silu",
        "rms_norm_eps": next(config[name] for name in _EPS if name in config),
        "rope_theta": 10000.0,
        "max_position_embeddings": config["max_position_embeddings"],
        "attention_bias": False,
        "vocab_size": vocab,
        "draft_vocab_size": len(drafted),
        "tie_word_embeddings": False,
        "target_hidden_size": hidden,
        "num_aux_hidden_states": len(aux_layers),
        "eagle_aux_hidden_state_layer_ids": list(aux_layers),
        "dtype": "float32",
        **dict.fromkeys(norms, True),
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
