"""Which engine serves which head, why not, and with what command: one table, each line with its
source.

`inspect`, `export`, the card, `serve --print` and the page docs/engines.md are made from it. An
engine that drafts wrong tokens of a head without a word does not serve it: the answers stay the
target's own, but hardly a draft is accepted.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from drafthead.drafters.base import architecture
from drafthead.drafters.dspark.checkpoint import vllm_name
from drafthead.drafters.dspark.formats import ARCHITECTURE
from drafthead.head.formats import AUX_IDS
from drafthead.targets import Target

KINDS = {"eagle3": "EAGLE-3", "dspark": "DSpark"}
LLAMA_CPP_EAGLE3 = {
    *("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel"),
    "LlamaForCausalLM",
}
PORTABLE, SPECFORGE, LIQUID = "LlamaForCausalLMEagle3", "DSparkDraftModel", "Lfm2DSparkDraftModel"


@dataclass(frozen=True)
class Engine:
    """An engine that serves heads."""

    title: str
    versions: str
    source: str
    """What the statements about it come from."""
    notes: tuple[str, ...] = ()
    """What to know where it serves a head."""
    hooks: bool = False
    """Only some of its targets' classes hand their states to a head."""


ENGINES = {
    "vllm": Engine(
        "vLLM",
        "0.32.0, 0.33.0",
        "run: tests/vllm (0.32.0); its wheels",
        ("targets without a hook, such as LFM2, need drafthead's plugin",),
    ),
    "sglang": Engine("SGLang", "0.5.23", "read: its wheel", hooks=True),
    "llama.cpp": Engine(
        "llama.cpp",
        "b11549",
        "run: tests/engines (in xllamacpp 2026.10.11549); its source",
        ("head and target are converted to GGUF first",),
    ),
    "mlx": Engine(
        "mlx-vlm",
        "0.7.10",
        "run: tests/engines; its wheel",
        (
            "an LFM2-MoE target answers otherwise there, with a head and without: "
            "findings/mlx-vlm-lfm2-moe-routing.sh",
        ),
        hooks=True,
    ),
    "tensorrt-llm": Engine(
        "TensorRT-LLM", "1.4.0rc4", "read: its repository at 00679c6; its documentation"
    ),
}


@dataclass(frozen=True)
class Head:
    """What of a head the limits look at."""

    kind: str
    config: dict[str, Any]
    """As `inspect_head` gives it."""
    raw: dict[str, Any]
    """`config.json`."""
    names: frozenset[str]
    """Tensors, as stored."""
    own_embedding: bool
    target: Target | None = None

    @property
    def speculators(self) -> bool:
        return "speculators_model_type" in self.raw

    @property
    def nested(self) -> dict[str, Any]:
        """The part of `config.json` that is about drafting."""
        return self.raw.get("dflash_config" if self.kind == "dspark" else "eagle_config") or {}


@dataclass(frozen=True)
class Limit:
    """Heads that an engine does not serve."""

    engine: str
    kinds: tuple[str, ...]
    says: str
    source: str
    applies: Callable[[Head], Any]
    silent: bool = False
    """The engine takes the head and drafts other tokens than it should."""
    fix: str = ""
    """What makes another head that the engine serves."""
    layout: bool = False
    """It is about how the head is written, not about what it computes: `convert` fixes it."""

    @property
    def words(self) -> str:
        """For people, with what becomes of the head and what to do."""
        words = self.says + ("; it would draft wrong tokens, without a word" if self.silent else "")
        return words + (f"; train with {self.fix}" if self.fix else "")


def _window(head: Head) -> bool:
    return "sliding_attention" in (head.config.get("layer_types") or ())


def _mute_rope(head: Head) -> bool:
    """Whether only vLLM's key says that RoPE is interleaved."""
    return head.config["is_neox_style"] is not head.raw.get("rope_is_neox_style", True)


def _reduced(head: Head) -> bool:
    return bool(head.config["draft_vocab_size"] < head.config["vocab_size"])


def _narrow(head: Head) -> bool:
    return bool(head.config["hidden_size"] != head.config["target_hidden_size"])


def _other_layers(head: Head) -> bool:
    """Whether SGLang takes other layers than the head means."""
    inner = head.nested.get(AUX_IDS)
    if inner:
        return [i + 1 for i in inner] != head.config["aux_layer_ids"]
    return head.target is None or _not_default(head)


def _not_default(head: Head) -> bool:
    target, layers = head.target, head.config["aux_layer_ids"]
    return target is not None and layers != list(target.default_aux_layers())


_SGLANG_EAGLE3 = """
ApertusForCausalLM BailingMoEForCausalLM BailingMoeForCausalLM BailingMoeV2ForCausalLM
DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM ExaoneMoEForCausalLM
Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration
Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM GptOssForCausalLM
InternLM3ForCausalLM KimiK25ForConditionalGeneration Llama4ForCausalLM
Llama4ForConditionalGeneration LlamaForCausalLM LongcatFlashForCausalLM MellumForCausalLM
MiniMaxM2ForCausalLM MiniMaxM3SparseForCausalLM Ministral3ForCausalLM MistralForCausalLM
MistralLarge3ForCausalLM Phi3ForCausalLM Qwen2ForCausalLM Qwen2MoeForCausalLM
Qwen2_5_VLForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM
Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
SarvamMoEForCausalLM TeleFLMForCausalLM
"""
_SGLANG_DSPARK = """
DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM Gemma4ForCausalLM
Gemma4ForConditionalGeneration Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM GptOssForCausalLM
InternLM3ForCausalLM KimiK25ForConditionalGeneration LagunaForCausalLM Lfm2ForCausalLM
Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration Llama4ForCausalLM LlamaForCausalLM
MellumForCausalLM MiMoV2FlashForCausalLM Ministral3ForCausalLM MistralForCausalLM
MistralLarge3ForCausalLM NanbeigeForCausalLM NemotronHForCausalLM Phi3ForCausalLM Qwen3ForCausalLM
Qwen3MoeForCausalLM Qwen3NextForCausalLM Qwen3VLForConditionalGeneration
Qwen3VLMoeForConditionalGeneration Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration
Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration TeleFLMForCausalLM
"""
# Classes of targets in 0.5.23 with set_eagle3_layers_to_capture, set_dflash_layers_to_capture.
# Those of them that also hand over what leaves the last layer.
_SGLANG_LAST = """
GptOssForCausalLM LagunaForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM MiMoV2FlashForCausalLM
MiniMaxM3SparseForCausalLM NemotronHForCausalLM
"""
_MLX = (
    *("gemma4", "gemma4_text", "glm_moe_dsa", "laguna", "lfm2", "lfm2_moe", "lfm2_vl"),
    *("minimax_m3", "muse_glimmer", "nemotron_h", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"),
    *("qwen3_5_text", "qwen4_exp"),
)
_EAGLE3, _DSPARK, _BOTH = ("eagle3",), ("dspark",), ("eagle3", "dspark")

LIMITS = (
    # vLLM. What it computes drafthead's own readers know; these are places in the files.
    Limit(
        "vllm",
        _EAGLE3,
        f"{AUX_IDS} stands in eagle_config alone: the older model runner takes outputs of layers "
        "for inputs, the newer one its default",
        "v1/worker/gpu_model_runner.py, v1/worker/gpu/spec_decode/eagle/eagle3_utils.py; run: "
        "findings/vllm-sglang-aux-layer-ids.sh",
        lambda h: not h.speculators and not h.raw.get(AUX_IDS) and h.nested.get(AUX_IDS),
        silent=True,
        layout=True,
    ),
    Limit(
        "vllm",
        _DSPARK,
        "markov_rank does not stand at the top of config.json",
        "model_executor/models/qwen3_dspark.py",
        lambda h: not h.raw.get("markov_rank"),
        layout=True,
    ),
    Limit(
        "vllm",
        _DSPARK,
        f"architectures is not {ARCHITECTURE}: the head is taken for one of DeepSeek-V4",
        "config/speculative.py",
        lambda h: not h.speculators and architecture(h.raw) not in (ARCHITECTURE, SPECFORGE),
        layout=True,
    ),
    Limit(
        "vllm",
        _DSPARK,
        "tensors have names that it does not load (`model.` in front, or ModelOpt's)",
        "model_executor/models/qwen3_dspark.py",
        lambda h: any(vllm_name(name) != name for name in h.names),
        layout=True,
    ),
    Limit(
        "vllm",
        _DSPARK,
        "rope_is_neox_style is false, and is_neox_style, its own key, is left out",
        "model_executor/models/qwen3_dflash.py",
        lambda h: h.config["is_neox_style"] is not h.raw.get("is_neox_style", True),
        silent=True,
        layout=True,
    ),
    Limit(
        "vllm",
        _DSPARK,
        "confidence_head_with_markov is left out, which means false, and the weights say true",
        "model_executor/models/qwen3_dspark.py",
        lambda h: (
            h.raw.get("enable_confidence_head")
            and h.config["confidence_with_markov"]
            and not h.raw.get("confidence_head_with_markov")
        ),
        layout=True,
    ),
    # SGLang.
    Limit(
        "sglang",
        _BOTH,
        "config.json is in speculators' format, which it does not read",
        "no mention of it in srt/",
        lambda h: h.speculators,
        layout=True,
    ),
    Limit(
        "sglang",
        _EAGLE3,
        "architectures is not LlamaForCausalLMEagle3, its one class of Llama-like heads",
        "srt/models/llama_eagle3.py",
        lambda h: not h.speculators and architecture(h.raw) != PORTABLE,
        layout=True,
    ),
    Limit(
        "sglang",
        _EAGLE3,
        f"it reads layers from eagle_config.{AUX_IDS} alone, as outputs, else takes its default: "
        "here other ones than the head was trained on",
        "run: findings/vllm-sglang-aux-layer-ids.sh",
        _other_layers,
        silent=True,
        layout=True,
    ),
    Limit(
        "sglang",
        _EAGLE3,
        "norm_before_residual, which it does not know",
        "srt/models/llama_eagle3.py; run: findings/sglang-norm-before-residual.sh",
        lambda h: h.config["norm_before_residual"],
        silent=True,
        fix="head.norm_before_residual: false",
    ),
    Limit(
        "sglang",
        _EAGLE3,
        "more than one layer: the further ones are computed in another way",
        "srt/models/llama_eagle3.py",
        lambda h: h.config["num_hidden_layers"] > 1,
        silent=True,
        fix="head.num_hidden_layers: 1",
    ),
    Limit(
        "sglang",
        _EAGLE3,
        "attention_bias: it drops the biases of q, k and v",
        "srt/models/llama_eagle3.py",
        lambda h: h.config["attention_bias"],
        silent=True,
    ),
    Limit(
        "sglang",
        _EAGLE3,
        "the target's class has no EAGLE-3 hook (LFM2 and LFM2-MoE have none)",
        "set_eagle3_layers_to_capture in srt/models/",
        lambda h: h.target and not {*h.target.architectures} & {*_SGLANG_EAGLE3.split()},
        fix="head.kind: dspark",
    ),
    Limit(
        "sglang",
        _BOTH,
        "the output of the target's last layer, which the target's class does not hand over",
        "forward in srt/models/",
        lambda h: (
            h.target
            and max(h.config["aux_layer_ids"]) == h.target.num_layers
            and not {*h.target.architectures} & {*_SGLANG_LAST.split()}
        ),
        fix="head.aux_layers",
    ),
    Limit(
        "sglang",
        _DSPARK,
        "architectures is none of its own (Qwen3DSparkModel, DSparkDraftModel, Liquid's)",
        "srt/models/dspark.py, srt/models/lfm2_dspark.py",
        lambda h: (
            not h.speculators and architecture(h.raw) not in (ARCHITECTURE, SPECFORGE, LIQUID)
        ),
        layout=True,
    ),
    Limit(
        "sglang",
        _DSPARK,
        "a reduced draft vocabulary: its Markov head has a row for each token of the target",
        "srt/models/dspark.py",
        _reduced,
        fix="vocab.size: the target's vocab_size",
    ),
    Limit(
        "sglang",
        _DSPARK,
        "an LM head of its own, which it leaves out in favour of the target's",
        "srt/models/dspark.py",
        lambda h: h.config["own_lm_head"] and not _reduced(h),
        silent=True,
        fix="train.lm_head_rate: 0",
    ),
    Limit(
        "sglang",
        _DSPARK,
        "another width than the target's, or an embedding of its own",
        "srt/models/dflash.py, srt/models/dspark.py",
        lambda h: _narrow(h) or h.own_embedding,
    ),
    Limit(
        "sglang",
        _DSPARK,
        "the target's class has no DFlash hook",
        "set_dflash_layers_to_capture in srt/models/",
        lambda h: h.target and not {*h.target.architectures} & {*_SGLANG_DSPARK.split()},
    ),
    # llama.cpp.
    Limit(
        "llama.cpp",
        _EAGLE3,
        "its converter does not know the architecture, or misses draft_vocab_size",
        "conversion/llama.py",
        lambda h: (
            architecture(h.raw) not in LLAMA_CPP_EAGLE3 or h.raw.get("draft_vocab_size") is None
        ),
        layout=True,
    ),
    Limit(
        "llama.cpp",
        _EAGLE3,
        f"{AUX_IDS} does not stand at the top of config.json: it takes 2, n/2 and n - 3",
        "conversion/llama.py",
        lambda h: not h.raw.get(AUX_IDS) and (h.target is None or _not_default(h)),
        silent=True,
        layout=True,
    ),
    Limit(
        "llama.cpp",
        _EAGLE3,
        "more than one layer, or other than three aux layers",
        "models/eagle3.cpp",
        lambda h: h.config["num_hidden_layers"] > 1 or len(h.config["aux_layer_ids"]) != 3,
    ),
    Limit(
        "llama.cpp",
        _EAGLE3,
        "fc_norm, attention_bias: tensors that its converter does not know",
        "conversion/llama.py",
        lambda h: h.config["fc_norm"] or h.config["attention_bias"],
        fix="head.fc_norm: false",
    ),
    Limit(
        "llama.cpp",
        _EAGLE3,
        "norm_output, or a sliding window, which it does not know",
        "models/eagle3.cpp",
        lambda h: h.config["norm_output"] or _window(h),
        silent=True,
        fix="head.norm_output: false",
    ),
    Limit(
        "llama.cpp",
        _DSPARK,
        "its converter does not know the architecture",
        "conversion/qwen.py",
        lambda h: architecture(h.raw) not in (ARCHITECTURE, SPECFORGE, LIQUID, "DSparkSpeculator"),
        layout=True,
    ),
    Limit(
        "llama.cpp",
        _DSPARK,
        "is_neox_style is false, and rope_is_neox_style, its own key, is left out",
        "conversion/qwen.py",
        _mute_rope,
        silent=True,
        layout=True,
    ),
    Limit(
        "llama.cpp",
        _DSPARK,
        "an LM head of its own for the whole vocabulary, which its converter leaves out",
        "conversion/qwen.py; run: findings/llama-cpp-dspark-lm-head.sh",
        lambda h: h.config["own_lm_head"] and not _reduced(h),
        silent=True,
        fix="train.lm_head_rate: 0",
    ),
    Limit("llama.cpp", _DSPARK, "another width than the target's", "models/dflash.cpp", _narrow),
    Limit(
        "llama.cpp",
        _DSPARK,
        "a confidence head that does not read the Markov embedding",
        "models/dflash.cpp",
        lambda h: h.config["confidence_head"] and not h.config["confidence_with_markov"],
    ),
    # mlx-vlm.
    Limit(
        "mlx",
        _EAGLE3,
        "it reads EAGLE-3 in speculators' format alone, with the embedding among the weights",
        "speculative/drafters/eagle3/, utils.py",
        lambda h: not (h.speculators and h.own_embedding),
        layout=True,
    ),
    Limit(
        "mlx",
        _EAGLE3,
        "other than three aux layers",
        "speculative/drafters/eagle3/eagle3.py",
        lambda h: len(h.config["aux_layer_ids"]) != 3,
    ),
    Limit(
        "mlx",
        _EAGLE3,
        "the embedding's output as an aux layer (0): it takes the first layer's in its place",
        "speculative/drafters/eagle3/config.py",
        lambda h: 0 in h.config["aux_layer_ids"],
        silent=True,
        fix="head.aux_layers",
    ),
    Limit(
        "mlx",
        _EAGLE3,
        "fc_norm: tensors that it does not know",
        "speculative/drafters/eagle3/eagle3.py",
        lambda h: h.config["fc_norm"],
        fix="head.fc_norm: false",
    ),
    Limit(
        "mlx",
        _EAGLE3,
        "norm_output, scaled RoPE or a sliding window, which it does not know",
        "speculative/drafters/eagle3/",
        lambda h: h.config["norm_output"] or h.config["rope_scaling"] or _window(h),
        silent=True,
        fix="head.norm_output: false",
    ),
    Limit(
        "mlx",
        _DSPARK,
        "no dflash_config with num_target_layers, which has to be the target's",
        "speculative/drafters/dspark/config.py, compatibility.py; run: "
        "findings/mlx-vlm-dspark-config.sh",
        lambda h: (
            not (h.nested and h.config["num_target_layers"])
            or (h.target and h.config["num_target_layers"] != h.target.num_layers)
        ),
        layout=True,
    ),
    Limit(
        "mlx",
        _DSPARK,
        "is_neox_style is false, and rope_is_neox_style, its own key, is left out",
        "run: findings/mlx-vlm-dspark-config.sh",
        _mute_rope,
        silent=True,
        layout=True,
    ),
    Limit(
        "mlx",
        _DSPARK,
        "a reduced draft vocabulary: its Markov head has a row for each token of the target",
        "speculative/drafters/dspark/dspark.py",
        _reduced,
        fix="vocab.size: the target's vocab_size",
    ),
    Limit(
        "mlx",
        _DSPARK,
        "an LM head of its own: a tensor that it does not know",
        "speculative/drafters/qwen3_dflash/dflash.py",
        lambda h: h.config["own_lm_head"] and not _reduced(h),
        fix="train.lm_head_rate: 0",
    ),
    Limit(
        "mlx",
        _DSPARK,
        "another width than the target's",
        "speculative/drafters/compatibility.py",
        _narrow,
    ),
    Limit(
        "mlx",
        _BOTH,
        "the target's class cannot take drafts back (Llama and Qwen3 among them; LFM2 can)",
        "rollback_speculative_cache and capture_layer_ids in models/",
        lambda h: h.target and h.target.config.model_type not in _MLX,
    ),
    # TensorRT-LLM. It is told the layers in its options, not by the head.
    Limit(
        "tensorrt-llm",
        _EAGLE3,
        "config.json is in speculators' format, or has norm_before_fc outside of eagle_config",
        "_torch/models/modeling_speculative.py",
        lambda h: (
            h.speculators or (h.config["norm_before_fc"] and not h.nested.get("norm_before_fc"))
        ),
        layout=True,
    ),
    Limit(
        "tensorrt-llm",
        _EAGLE3,
        "norm_before_residual, which it does not know",
        "_torch/models/modeling_speculative.py",
        lambda h: h.config["norm_before_residual"],
        silent=True,
        fix="head.norm_before_residual: false",
    ),
    Limit(
        "tensorrt-llm",
        _EAGLE3,
        "more than one layer: the further ones have other norms",
        "_torch/models/modeling_speculative.py",
        lambda h: h.config["num_hidden_layers"] > 1,
        fix="head.num_hidden_layers: 1",
    ),
    Limit(
        "tensorrt-llm",
        _DSPARK,
        "not known: it has DSpark, and whether it reads this format was not found out",
        "_torch/models/modeling_speculative.py",
        lambda h: True,
    ),
)
