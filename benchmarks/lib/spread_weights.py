"""Made-up weights with which a mixture of experts routes as a real one does.

vLLM's `load_format="dummy"` draws every tensor, norms, router and expert bias among them, from
±1e-3 with one seed. The bias alone then decides, and every token goes to the same few experts: a
step that verifies k drafts reads no more weights than a plain one. With `load_format="spread"` the
weights are set after that, before vLLM packs them for its kernels. The loaded model then has to
show that its tokens part, or the engine does not start.

`lfm2_shapes.SPREAD` names the format and, as `worker_extension_cls`, the class `Spread`: every
worker imports this file for it, which registers the loader there.
"""

import zlib

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.mamba.short_conv import ShortConv
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from benchmarks.lib.step_probe import Probe

FORMAT = "spread"
E2M1_RMS = 2.926
"""Root of the mean square of the sixteen values of a 4-bit float: 0, ±0.5, 1, 1.5, 2, 3, 4, 6."""
TOKENS = (1, 4, 6, 8)
"""Tokens of the steps whose experts are counted: plain, and k = 3, 5 and 7."""
LEAST = 0.8
"""Share of the experts that independent tokens would reach, below which weights are refused."""


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Set the weights of ``model`` in place: norms 1, biases 0, each matrix [..., fan-in] normal
    with a deviation of 1/sqrt(fan-in). Packed NVFP4 bytes [..., fan-in / 2] are random, their block
    scales 1, and their tensor's scale gives the same deviation. A tensor's name is its seed."""
    tensors = dict(model.named_parameters())
    for name, tensor in tensors.items():
        seeded = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
        if name.endswith("weight_scale_2"):
            packed = tensors[name.removesuffix("_scale_2")]
            tensor.fill_((2 * packed.shape[-1]) ** -0.5 / E2M1_RMS)
        elif tensor.dtype == torch.uint8:
            tensor.random_(0, 256, generator=seeded)
        elif name.endswith(("weight_scale", "input_scale")):
            tensor.copy_(torch.ones_like(tensor, dtype=torch.float32))
        elif name.endswith("bias"):
            tensor.zero_()
        elif tensor.dim() < 2:
            tensor.fill_(1)
        else:
            tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=seeded)


@torch.inference_mode()
def distinct_experts(model: nn.Module, config: VllmConfig, tokens: int) -> list[int]:
    """How many experts of each sparse layer some different tokens reach together.

    Attention and short convolution have no cache yet, so they add zeros here; only the tokens' own
    states tell them apart.
    """
    hf = config.model_config.hf_text_config
    per_layer: list[int] = []

    def count(gate: nn.Module, _: tuple, output: tuple[Tensor, ...]) -> None:
        scores = output[0].float().sigmoid()  # [tokens, experts]
        bias = gate.e_score_correction_bias
        chosen = (scores if bias is None else scores + bias).topk(hf.num_experts_per_tok).indices
        per_layer.append(chosen.unique().numel())

    def zero_output(_: nn.Module, arguments: tuple[Tensor, ...], __: object) -> None:
        arguments[1].zero_()

    hooks = []
    for name, layer in model.named_modules():
        if name.endswith("feed_forward.gate"):
            hooks.append(layer.register_forward_hook(count))
        elif isinstance(layer, Attention):  # without metadata a CPU leaves its output unset
            hooks.append(layer.register_forward_hook(lambda *call: torch.zeros_like(call[-1])))
        elif isinstance(layer, ShortConv):  # and so does a GPU that of a short convolution
            hooks.append(layer.register_forward_hook(zero_output))
    device = next(model.parameters()).device
    ids = 1 + 31 * torch.arange(tokens, device=device) % (hf.vocab_size - 1)
    with set_forward_context(None, config, num_tokens=tokens, skip_compiled=True):
        model(input_ids=ids, positions=torch.arange(tokens, device=device))
    for hook in hooks:
        hook.remove()
    return per_layer


def check_routing(model: nn.Module, config: VllmConfig) -> dict[int, float]:
    """Mean distinct experts of a layer by the tokens of a step, printed into the engine's log.

    Raises:
        RuntimeError: they are far fewer than independent tokens would reach.
    """
    hf = config.model_config.hf_text_config
    experts, share = hf.num_experts, hf.num_experts_per_tok / hf.num_experts
    means = {}
    for tokens in TOKENS:
        per_layer = distinct_experts(model, config, tokens)
        means[tokens] = sum(per_layer) / len(per_layer)
        expected = experts * (1 - (1 - share) ** tokens)
        if means[tokens] < LEAST * expected:
            raise RuntimeError(
                f"{tokens} tokens reach {means[tokens]:.1f} of {experts} experts a layer, where "
                f"independent ones would reach {expected:.1f}: these weights do not route like a "
                "real model's, and what a step costs with them means nothing"
            )
    print("distinct experts a layer, by tokens of a step:", means, flush=True)
    return means


@register_model_loader(FORMAT)
class SpreadLoader(DummyModelLoader):
    """vLLM's dummy weights, then spread and held to route."""

    def load_weights(self, model: nn.Module, model_config) -> None:
        super().load_weights(model, model_config)
        spread(model)

    def load_model(self, vllm_config: VllmConfig, model_config, prefix: str = "") -> nn.Module:
        model = super().load_model(vllm_config, model_config, prefix)
        if getattr(vllm_config.model_config.hf_text_config, "num_experts", 0):
            model.routing = check_routing(model, vllm_config)
        return model


class Spread(Probe):
    """Mixed into vLLM's worker; its import registers the loader. It times steps, too."""

    def distinct_experts(self) -> dict[int, float]:
        """Mean distinct experts of a layer, by the tokens of a step."""
        return getattr(self.model_runner.get_model(), "routing", {})
