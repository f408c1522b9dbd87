"""Where training starts: a head made from the target's own weights."""

import torch
from torch import Tensor, nn

from drafthead.errors import DraftheadError
from drafthead.head.config import HeadConfig, head_config
from drafthead.head.model import Eagle3Head
from drafthead.recipe import HeadSection
from drafthead.targets import Target
from drafthead.targets.logits import PLAIN

STD = 0.02  # Llama's initializer_range
LLAMA_LAYER = {
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
}


def new_head(
    section: HeadSection, target: Target, aux_layer_ids: tuple[int, ...], d2t: Tensor, seed: int
) -> Eagle3Head:
    """The head that a recipe's `head` section asks for, before its first step; float32.

    d2t int64 [Vd]: the draft vocabulary. Raises `DraftheadError` where recipe and target do not
    fit together.
    """
    head = init_from_target(
        head_config(section, target, aux_layer_ids, len(d2t)),
        d2t,
        target.lm_head(),
        target.final_norm()[0],
        layer=target_layer(target) if section.layer_from_target else None,
        seed=seed,
    )
    with torch.no_grad():  # nothing scales the head's logits, as the target's may be
        head.lm_head.weight *= target.logits.scale
    return head


@torch.no_grad()
def init_from_target(
    config: HeadConfig,
    d2t: Tensor,
    lm_head: Tensor,
    final_norm: Tensor,
    *,
    fc: str = "deepest",
    layer: dict[str, Tensor] | None = None,
    seed: int = 0,
) -> Eagle3Head:
    """A float32 head whose vocabulary side is the target's.

    d2t int64 [Vd]: the draft vocabulary. lm_head [V, Ht]: the target's; its rows at the draft
    vocabulary become the head's. final_norm [Ht]: weight of the target's last norm.
    fc: "deepest" passes the deepest aux state through and adds small random weights from the
    others, "random" draws all of it. layer: tensors of one Llama-like layer of the target (see
    `target_layer`); those whose shape fits take the place of random ones, q, k and v on the side
    of the hidden state.

    Raises `DraftheadError` on widths that do not fit.
    """
    h, ht, a = config.hidden_size, config.target_hidden_size, config.num_aux_hidden_states
    if lm_head.shape != (config.vocab_size, h) or final_norm.shape != (h,):
        raise DraftheadError(
            f"the target's LM head {list(lm_head.shape)} and norm {list(final_norm.shape)} do not "
            f"fit a head of hidden_size {h} and vocab_size {config.vocab_size}"
        )
    head = Eagle3Head(config)
    head.set_vocab(d2t)
    generator = torch.Generator().manual_seed(seed)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, STD, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    if fc == "deepest":
        if h != ht:
            raise DraftheadError(f"fc init 'deepest' needs equal widths, head {h}, target {ht}")
        # A fan-in of (A-1) * Ht random inputs would drown the state passed through at full STD.
        head.fc.weight[:, : (a - 1) * ht] *= 0.1
        head.fc.weight[:, (a - 1) * ht :] = torch.eye(h)
    elif fc != "random":
        raise DraftheadError(f"fc init {fc!r}; known are 'deepest' and 'random'")
    head.lm_head.weight.copy_(lm_head[head.target_ids()])
    head.norm.weight.copy_(final_norm)
    if layer is not None:
        _copy_layer(head, layer)
    return head


def target_layer(target: Target) -> dict[str, Tensor]:
    """The target's last attention layer, for `init_from_target`: names without prefix, float32.

    Only layers laid out as Llama's can be taken (no norms on queries and keys, one MLP, not
    quantized); raises `DraftheadError` for others, saying what is different. Gemma's and Granite's
    have Llama's names, but factors of their own.
    """
    if target.logits != PLAIN:
        raise DraftheadError(
            f"{target.path}: {target.config.model_type}'s layers compute otherwise than Llama's; "
            "leave head.layer_from_target out"
        )
    attending = [i for i, kind in enumerate(target.layer_types) if kind == "full_attention"]
    if not attending:
        raise DraftheadError(f"{target.path}: no full-attention layer to start the head from")
    start = f"{target.decoder}layers.{attending[-1]}."
    names = {n.removeprefix(start): n for n in target.tensors.where if n.startswith(start)}
    odd = sorted(set(names) ^ LLAMA_LAYER)
    if odd:
        differs = ", ".join(odd[:4])
        raise DraftheadError(
            f"{target.path}: layer {attending[-1]} is not laid out as Llama's ({differs})"
        )
    return {short: target.tensors.tensor(name).float() for short, name in names.items()}


def _copy_layer(head: Eagle3Head, tensors: dict[str, Tensor]) -> None:
    """Copy what fits of a target layer into the head's first one; raise if nothing does."""
    parameters = dict(head.layers[0].named_parameters())
    renamed = {"input_layernorm.weight": "hidden_norm.weight"}  # it normed the hidden state there
    taken = 0
    for name, tensor in tensors.items():
        parameter = parameters.get(renamed.get(name, name))
        if parameter is None:
            continue
        if name.split(".")[1] in ("q_proj", "k_proj", "v_proj") and tensor.dim() == 2:
            wide = (parameter.shape[0], parameter.shape[1] // 2)
            if tensor.shape == wide:
                parameter[:, wide[1] :] = tensor
                taken += 1
        elif tensor.shape == parameter.shape:
            parameter.copy_(tensor)
            taken += 1
    if not taken:
        raise DraftheadError(
            "no tensor of the target's layer has a shape that fits the head",
            field="head.layer_from_target",
        )
