"""Tiny random targets, made in a second, with a real tokenizer and a chat template."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Lfm2MoeConfig,
    Lfm2MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VOCAB = 512
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
"""Of a transformer as tiny as vLLM's attention takes it."""
CHATML = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_TEXT = [
    "The quick brown fox jumps over the lazy dog while the sun sets behind the old stone house.",
    "Write a function that returns the sum of two numbers: def add(a, b): return a + b",
    "What is the capital of France? The capital of France is Paris, a city on the river Seine.",
    "Once upon a time there was a small model that wanted to speak as fast as the large one.",
]


def tiny_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens with ChatML's own, saved into ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return fast


def _save(model, folder: Path, seed: int) -> Path:
    tokenizer = tiny_tokenizer(folder)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            # Larger than transformers' 0.02, so that random models do not repeat one token.
            torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": tokenizer.eos_token_id})
    )
    return folder


def _tiny(layers: int) -> dict:
    """Fields that all tiny targets share."""
    return SIZES | {
        "num_hidden_layers": layers,
        "max_position_embeddings": 512,
        "eos_token_id": 4,
        "dtype": "float32",
    }


def tiny_llama(folder: Path, seed: int = 0, tied: bool = False, layers: int = 6) -> Path:
    """A Llama of hidden size 64 in fp32."""
    config = LlamaConfig(**_tiny(layers), rms_norm_eps=1e-5, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    return _save(LlamaForCausalLM(config), folder, seed)


def _hybrid_layers(layers: int) -> list[str]:
    return ["full_attention" if i % 3 == 2 else "conv" for i in range(layers)]


def tiny_lfm2_moe(folder: Path, seed: int = 0, layers: int = 6) -> Path:
    """An LFM2-MoE (short convolution, attention, experts with a bias) of hidden size 64, fp32."""
    config = Lfm2MoeConfig(
        **_tiny(layers),
        moe_intermediate_size=64,
        num_dense_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        layer_types=_hybrid_layers(layers),
    )
    torch.manual_seed(seed)
    model = Lfm2MoeForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
    return _save(model, folder, seed)


def tiny_lfm2(folder: Path, seed: int = 0, layers: int = 6) -> Path:
    """A dense LFM2 of hidden size 64, fp32."""
    config = Lfm2Config(
        **_tiny(layers), block_auto_adjust_ff_dim=False, layer_types=_hybrid_layers(layers)
    )
    torch.manual_seed(seed)
    return _save(Lfm2ForCausalLM(config), folder, seed)


OTHER_LOGITS = {
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 2.0},
    "gemma4_text": {
        "final_logit_softcapping": 2.0,
        "hidden_size_per_layer_input": 0,
        "global_head_dim": 32,
    },
    "granite": {"logits_scaling": 6.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    "granitemoe": {"logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "minicpm3": {
        "dim_model_base": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
    },
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_5_text": {},
}
"""Architectures that make logits of the last hidden state in ways of their own."""


def tiny_other(folder: Path, kind: str, seed: int = 0) -> Path:
    """One of ``OTHER_LOGITS`` of hidden size 64, fp32, its norms' weights at random too."""
    config = AutoConfig.for_model(kind, **_tiny(6), **OTHER_LOGITS[kind])
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return _save(model, folder, seed)
