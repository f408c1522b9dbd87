"""Random targets of architectures for which vLLM has no EAGLE-3 hook, in fp32."""

from pathlib import Path

import torch
import transformers

from tests.tiny import SIZES

_SIZES = SIZES | {"eos_token_id": 2, "tie_word_embeddings": True, "dtype": "float32"}
_UNTIED = {"tie_word_embeddings": False}  # vLLM's class does not know tied ones
_WINDOWS = {
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_MIXED = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}
_GRANITE = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
# Architecture: what its configuration needs beside the sizes.
SETTINGS: dict[str, dict] = {
    "CohereForCausalLM": {"logit_scale": 0.5},
    "Exaone4ForCausalLM": _WINDOWS,
    "ExaoneMoeForCausalLM": _MIXED | _WINDOWS | {"num_experts": 4},
    "GemmaForCausalLM": {},
    # transformers' fast attention leaves the soft cap out.
    "Gemma2ForCausalLM": _WINDOWS | {"query_pre_attn_scalar": 32, "attn_logit_softcapping": None},
    "Gemma3ForCausalLM": _WINDOWS | {"query_pre_attn_scalar": 32},
    "Glm4ForCausalLM": {},
    "Glm4MoeForCausalLM": _MIXED
    | _UNTIED
    | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "GraniteMoeForCausalLM": _GRANITE,
    "GraniteMoeSharedForCausalLM": _GRANITE | {"shared_intermediate_size": 64},
    "MixtralForCausalLM": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "OlmoeForCausalLM": _UNTIED | {"num_experts": 4, "num_experts_per_tok": 2},
    "Qwen2MoeForCausalLM": _MIXED | {"num_experts": 4, "shared_expert_intermediate_size": 64},
}


def write(architecture: str, folder: Path, *, embedding_scale: float = 4.0, seed: int = 0) -> Path:
    """Write one, without a tokenizer, that repeats itself in runs; see ``models.write_target``."""
    torch.manual_seed(seed)
    name = architecture.removesuffix("ForCausalLM").replace("Gemma3", "Gemma3Text")
    config = getattr(transformers, f"{name}Config")(**_SIZES | SETTINGS[architecture])
    model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = embedding_scale if "embed_tokens" in parameter_name else 1.0
            torch.nn.init.normal_(parameter, std=0.15 * scale, generator=generator)
    if not config.tie_word_embeddings:  # the same for all that
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(folder)
    return folder
