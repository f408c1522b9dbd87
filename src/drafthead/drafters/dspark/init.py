"""Where training of a DSpark head starts: the target's vocabulary side, the rest at random."""

import torch
from torch import Tensor, nn

from drafthead.drafters.dspark.checkpoint import mask_token
from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.drafters.dspark.model import DSparkHead
from drafthead.errors import DraftheadError
from drafthead.recipe import HeadSection
from drafthead.targets import Target

STD, MARKOV_STD = 0.02, 0.01  # of the layers (Llama's initializer_range), of the Markov embedding


def head_config(
    section: HeadSection, target: Target, aux_layers: tuple[int, ...], draft_vocab_size: int
) -> DSparkConfig:
    """The head that a recipe's `head` section asks for. What it leaves open is the target's own
    figure.

    Raises:
        DraftheadError: a width or a layer that such a head cannot have.
    """
    hidden = section.hidden_size or target.hidden_size
    if hidden != target.hidden_size:
        raise DraftheadError(
            f"recipe: head.hidden_size is {hidden}, the target's is {target.hidden_size}; the head "
            "reads the target's embedding, so leave it out",
            field="head.hidden_size",
        )
    if 0 in aux_layers:
        raise DraftheadError(
            "recipe: head.aux_layers names layer 0; DSpark's formats name layers by their outputs, "
            "and nothing comes before layer 0",
            field="head.aux_layers",
        )
    vocab = target.vocab_size
    return DSparkConfig(
        hidden_size=hidden,
        intermediate_size=section.intermediate_size or -(-4 * hidden // 128) * 128,
        num_hidden_layers=section.layers,
        num_attention_heads=section.num_attention_heads or target.num_attention_heads,
        num_key_value_heads=section.num_key_value_heads or target.num_key_value_heads,
        head_dim=target.head_dim,
        vocab_size=vocab,
        draft_vocab_size=draft_vocab_size,
        target_hidden_size=target.hidden_size,
        num_target_layers=target.num_layers,
        aux_layer_ids=aux_layers,
        max_position_embeddings=target.max_position_embeddings,
        block_size=section.block_size,
        mask_token_id=_mask_token(section, target),
        markov_rank=section.markov_rank,
        causal=section.causal,
        rms_norm_eps=target.rms_norm_eps,
        rope_theta=target.rope_theta,
    )


def _mask_token(section: HeadSection, target: Target) -> int:
    if section.mask_token is not None:
        if section.mask_token >= target.vocab_size:
            raise DraftheadError(
                f"recipe: head.mask_token is {section.mask_token}, the target's vocabulary has "
                f"{target.vocab_size} rows",
                field="head.mask_token",
            )
        return section.mask_token
    tokenizer = target.tokenizer()
    template = str(getattr(tokenizer, "chat_template", "") or "")
    text = lambda token: tokenizer.convert_ids_to_tokens(token)
    ends = set(target.eos_token_ids)
    used = lambda token: token in ends or text(token) in template
    return mask_token(tokenizer, target.vocab_size, used)


@torch.no_grad()
def new_head(
    section: HeadSection, target: Target, aux_layers: tuple[int, ...], d2t: Tensor, seed: int
) -> DSparkHead:
    """The head that a recipe's `head` section asks for, before its first step; float32.

    d2t int64 [Vd]: the draft vocabulary. Its LM head and last norm are the target's; Raises
    `DraftheadError` where recipe and target do not fit together.
    """
    head = DSparkHead(head_config(section, target, aux_layers, len(d2t)))
    head.d2t.copy_(d2t)
    generator = torch.Generator().manual_seed(seed)
    for module in head.modules():
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, STD, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    head.markov_head.markov_w1.weight.normal_(0.0, MARKOV_STD, generator=generator)
    assert head.lm_head is not None
    rows = target.lm_head()[head.target_ids()].float()
    head.lm_head.weight.copy_(rows * target.logits.scale)  # nothing scales the head's own logits
    head.norm.weight.copy_(target.final_norm()[0])
    return head
