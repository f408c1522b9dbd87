"""What train/step.py measures of DSpark: ours and speculators' on the same anchors."""

import torch

from benchmarks.lib.train_sides import update
from benchmarks.peers import speculators_side
from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.drafters.dspark.model import DSparkHead
from drafthead.drafters.dspark.packing import BlockBatch, pack_blocks
from drafthead.drafters.dspark.training import BlockObjective, BlockStep, operations
from drafthead.ops.losses import Teacher
from drafthead.train.optimizer import AdamW, AdamWSettings

BLOCK, RANK = 8, 256


class OursDSpark:
    """drafthead's DSpark step with its default optimizer, Muon; the LM head is frozen as theirs."""

    name = "drafthead-muon"
    muon = True

    def __init__(self, shape, layers: int, samples: list, device, options, like=None):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        mask = shape.vocab - 1
        config = DSparkConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab_size=shape.vocab,
            draft_vocab_size=shape.draft_vocab,
            target_hidden_size=shape.hidden,
            aux_layer_ids=tuple(range(1, shape.aux + 1)),
            max_position_embeddings=8192,
            block_size=BLOCK,
            mask_token_id=mask,
            markov_rank=min(RANK, shape.hidden // 2),
            rope_theta=5e6,
        )
        self.config = config
        with torch.device(device):
            head = DSparkHead(config).to(dtype)
            embedding = torch.randn(shape.vocab, shape.hidden).mul_(0.02).to(dtype)
        for name, p in head.named_parameters():
            if "norm" not in name:
                p.data.normal_(0, 0.02)
        rows, embedding = embedding[: shape.draft_vocab].clone(), embedding.cpu()
        head.lm_head.weight.data.copy_(rows)
        head.lm_head.requires_grad_(False)
        self.start = {name: t.cpu().clone() for name, t in head.state_dict().items()}
        teacher = Teacher(torch.ones(shape.hidden, device=device, dtype=dtype), 1e-6, rows)
        to_draft = torch.arange(shape.vocab)
        to_draft[shape.draft_vocab :] = -1
        self.embedding, self.batches, self.anchors = embedding, [], []
        anchors = options.anchors
        for number, documents in enumerate(samples):
            possible = sum(int(s.loss_mask[:-1].sum()) for s in documents)
            row = pack_blocks(
                documents, BLOCK, anchors / possible, to_draft, shape.tokens, embedding, (number,)
            )
            batch: BlockBatch = row.batch(device)
            self.batches.append(batch)
            self.anchors.append(batch.blocks.end.long())
        objective = BlockObjective("ce+tv", chunk_rows=options.chunk)
        mask_row = embedding[mask].to(device)
        self.step = BlockStep(head, teacher, objective, mask_row, compiled=options.compile)
        trained = [(n, p) for n, p in head.named_parameters() if p.requires_grad]
        self.optimizer = AdamW(trained, AdamWSettings(self.muon))
        self.operations = operations(head, self.batches[0])
        self.positions = len(self.batches[0].slot_of)

    def reserved(self) -> int:
        return 0

    def run(self, number: int) -> torch.Tensor:
        batch = self.batches[number % len(self.batches)]
        return update(self.step, self.optimizer, batch, len(batch.slots))


class OursDSparkAdamW(OursDSpark):
    """drafthead's DSpark step with AdamW, as speculators' trainer takes."""

    name = "drafthead"
    muon = False


class SpeculatorsDSpark:
    """speculators 0.9.0's DSpark step from the same weights and anchors: its published loss in the
    eager form (the fused one does not compile under PyTorch 2.11), torch.compile, autocast bf16,
    fused AdamW."""

    name = "speculators"

    def __init__(self, shape, layers: int, samples: list, device, options, like: OursDSpark):
        from speculators.losses.utils import resolve_loss_config
        from speculators.models.dflash import core
        from speculators.models.dspark.config import DSparkSpeculatorConfig
        from speculators.models.dspark.core import DSparkDraftModel
        from transformers.models.qwen3.modeling_qwen3 import Qwen3Config

        c = like.config
        layer = Qwen3Config(
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            vocab_size=c.vocab_size,
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        )
        layer._attn_implementation = "simple_flex_attention" if device.type == "cuda" else "eager"
        about = DSparkSpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=c.draft_vocab_size,
            block_size=c.block_size,
            aux_hidden_state_layer_ids=list(c.aux_layer_ids),
            mask_token_id=c.mask_token_id,
            markov_rank=c.markov_rank,
        )
        with torch.device(device):
            self.model = DSparkDraftModel(about).train()
        rows = like.embedding[: shape.draft_vocab]
        with torch.no_grad():
            speculators_side.give_target(
                self.model, like.embedding, torch.ones(shape.hidden), rows,
                torch.arange(shape.draft_vocab),
            )  # fmt: skip
        self.model.load_state_dict(like.start, strict=False)
        self.model.lm_head.requires_grad_(False)
        self.loss = resolve_loss_config('{"ce": 0.1, "tv": 0.9}', "eager")
        self.tv = resolve_loss_config("tv", "eager")["tv"][0]
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.device = device
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=1e-4, weight_decay=0.0, fused=device.type == "cuda"
        )
        self.batches = [self._batch(documents).to(device) for documents in samples]
        self.anchors = like.anchors
        self.most = len(self.anchors[0])
        core.select_anchors = lambda *_: (self.now, torch.ones_like(self.now, dtype=torch.bool))

    def _batch(self, samples: list) -> speculators_side.Row:
        lengths = [min(len(s.ids), len(s.last)) for s in samples]
        parts = list(zip(samples, lengths))
        join = lambda tensors: torch.cat(tensors)[None]
        return speculators_side.Row(
            hidden_states=join([s.aux[:n].flatten(1) for s, n in parts]),
            verifier_last_hidden_states=join([s.last[:n] for s, n in parts]),
            input_ids=join([s.ids[:n].long() for s, n in parts]),
            loss_mask=join([s.loss_mask[:n] for s, n in parts]),
            position_ids=join([torch.arange(n) for n in lengths]),
            document_ids=join([torch.full((n,), i) for i, n in enumerate(lengths)]),
        )

    def run(self, number: int) -> torch.Tensor:
        number %= len(self.batches)
        # The last anchors of a row leave no room for a whole block there.
        most = self.batches[number]["input_ids"].shape[1] - BLOCK
        self.now = self.anchors[number][: self.most].clamp(max=most)
        with torch.autocast(self.device.type, torch.bfloat16):
            _, loss, _ = self.model(
                **self.batches[number], loss_config=self.loss, tv_loss_fn=self.tv,
                max_anchors=self.most,
            )  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.detach()


DSPARK_SIDES = (OursDSparkAdamW, OursDSpark, SpeculatorsDSpark)
