"""Architectures whose vLLM class has no hook for EAGLE-3: the plugin brings it (any_target.py).

Apart from that file, which imports vLLM, so that a card can tell who needs the plugin.
"""

# Class: module of vLLM. In each, XForCausalLM has an XModel as `model`, which calls its layers one
# after the other as layer(positions, hidden_states, ...).
# A layer returns (hidden, residual), and the stream is their sum: the next norm adds them.
IN_TWO_PARTS = {
    "ExaoneMoeForCausalLM": "exaone_moe",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Glm4ForCausalLM": "glm4",
    "Glm4MoeForCausalLM": "glm4_moe",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
}
# A layer returns the whole stream; what some return beside it nobody adds.
WHOLE = {
    "CohereForCausalLM": "commandr",
    "Exaone4ForCausalLM": "exaone4",
    "GraniteMoeForCausalLM": "granitemoe",
    "GraniteMoeSharedForCausalLM": "granitemoeshared",
}
# Multimodal, around one of the above: its forward hands on what the text model's returns.
AROUND = {"Gemma3ForConditionalGeneration": "gemma3_mm"}
MODULES = IN_TWO_PARTS | WHOLE | AROUND

ARCHITECTURES = MODULES.keys() | {
    "Cohere2ForCausalLM",
    "ExaoneMoEForCausalLM",
    "GraniteMoeSWAForCausalLM",
}
"""As checkpoints name them; the last three are served by a class of another name."""
