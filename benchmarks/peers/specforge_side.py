"""SpecForge 0.2.0 as another side of train/step.py: its draft model, its loss, its optimizer.

What its trainer makes for offline EAGLE-3 at its defaults: bf16 model, flex attention, loss over
the whole vocabulary's logits, fp32 masters under AdamW. In one process, so without its FSDP wrapper
(which would only add to its time). Nothing of it is replaced: neither SGLang nor yunchang is
imported on this path. On a CPU (to rehearse) its attention is its `sdpa`, and its Triton loss needs
TRITON_INTERPRET=1.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers.speculators_side import llama_config
from drafthead.head.config import HeadConfig
from drafthead.states import Sample


def make_model(config: HeadConfig, ttt_steps: int, device: torch.device) -> Any:
    """Its trained model in the shape of `config`, weights as it initialises them."""
    attention = "flex_attention" if device.type == "cuda" else "sdpa"  # flex: no backward on a CPU
    from specforge.algorithms.eagle3.model import OnlineEagle3Model
    from specforge.modeling.draft import LlamaForCausalLMEagle3

    layer = llama_config(config)
    layer.draft_vocab_size = config.draft_vocab_size
    with torch.device(device):
        draft = LlamaForCausalLMEagle3(layer, attention_backend=attention)
    draft.freeze_embedding()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return OnlineEagle3Model(draft.to(dtype), ttt_steps, attention).train()


@torch.no_grad()
def give_weights(model: Any, head: dict[str, Tensor], embedding: Tensor) -> None:
    """A head's weights by vLLM's names, and the target's embedding [V, H]; the draft vocabulary is
    the first Vd ids."""
    draft = model.draft_model
    renamed = {name.replace("layers.0.", "midlayer."): t for name, t in head.items()}
    draft.load_state_dict({**renamed, "embed_tokens.weight": embedding})


def make_batch(samples: list[Sample], norm: Tensor, eps: float) -> dict[str, Tensor]:
    """Documents of one length, a row each, as its collator stacks them and its target head shifts
    them: token i+1 and the target's last state i+1 at position i, which predicts token i+2.

    norm [Ht] and eps: the target's final norm, behind which its store has last states; floats take
    the norm's type. Returns input_ids and attention_mask int64 [B, S]; loss_mask int64 [B, S, 1],
    that of token i+2, so that it takes the rows that the other sides take; hidden_state
    [B, S, A Ht]; last [B, S, Ht].
    """
    (length,) = {len(s.last) - 1 for s in samples}
    ids = torch.stack([s.ids[1 : length + 1].long() for s in samples])
    last = torch.stack([s.last[1 : length + 1] for s in samples]).to(norm.dtype)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "loss_mask": torch.stack([s.loss_mask[2 : length + 2].long() for s in samples])[..., None],
        "hidden_state": torch.stack([s.aux[:length].flatten(1) for s in samples]).to(norm.dtype),
        "last": F.rms_norm(last, norm.shape, norm, eps),
    }


class Side:
    """Its training step: the target's LM head, its strategy's loss, backward, its BF16Optimizer.

    target_head [V, Ht]: the target's whole LM head. Gradients are clipped at 1 and TTT steps weigh
    the same, as on the other sides (its defaults are 0.5 and 0.8 ** t; no difference in time).
    """

    def __init__(self, model: Any, target_head: Tensor, learning_rate: float):
        from specforge.optimizer import BF16Optimizer
        from specforge.runtime.contracts import TrainBatch
        from specforge.training.strategies.base import Eagle3TrainStrategy

        self.batch_type, self.target_head = TrainBatch, target_head
        self.strategy = Eagle3TrainStrategy(model, ploss_decay=1.0)
        self.optimizer = BF16Optimizer(
            model.draft_model,
            learning_rate,
            max_grad_norm=1.0,
            warmup_ratio=0.0,
            lr_scheduler="constant",
        )

    def step(self, batch: dict[str, Tensor]) -> Tensor:
        """One step on a batch of `make_batch`; returns its loss: for each TTT step the sum of the
        supervised rows' cross-entropies over the number of all positions, and these added."""
        tensors = {name: t for name, t in batch.items() if name != "last"}
        tensors["target"] = F.linear(batch["last"], self.target_head)
        given = self.batch_type([], "eagle3", tensors, {"target_repr": "logits"})
        loss = self.strategy.forward_loss(given).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()


@torch.no_grad()
def entropy(batch: dict[str, Tensor], rows: Tensor, ttt_steps: int) -> Tensor:
    """The teacher's entropy over the draft vocabulary (LM-head rows [Vd, Ht]), summed over
    supervised rows and TTT steps: by how much cross-entropy exceeds KL divergence."""
    logp = F.linear(batch["last"], rows).float().log_softmax(-1)
    entropies = -(logp.exp() * logp).sum(-1) * batch["loss_mask"][..., 0]
    return torch.stack([entropies[:, step:].sum() for step in range(ttt_steps)]).sum()
