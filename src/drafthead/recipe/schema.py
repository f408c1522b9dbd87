"""One typed description of a whole run. Every default says why it is what it is.

A recipe is a YAML file, and what is said of its keys is in YAML's words: `null` is Python's None.
Unknown or misspelt keys are refused, with the nearest right one.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

Loss = Literal["kl", "ce+smoothl1", "acceptance", "ce+tv"]
Decay = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]  # what NumPy takes, and vLLM hands on to it
Drafts = Annotated[int, Field(ge=1, le=128)]  # vLLM's rejection sampler checks 128 at most


def _listed(value: Any) -> Any:
    """A number alone as a list of it: before it was an axis of the grid, recipes gave one."""
    return [value] if isinstance(value, int) else value


def _numeric(annotation: Any) -> bool:
    """Whether a field's type is a number, or holds some."""
    return annotation in (int, float) or any(map(_numeric, get_args(annotation)))


class Section(BaseModel):
    """A part of the recipe: unknown keys are refused, values do not change once read."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic would take `true` (in YAML also `yes` and `on`) for the number 1."""
        if isinstance(value, bool) and _numeric(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("should be a number")
        return value


class TargetSection(Section):
    """The model being sped up."""

    path: Annotated[str, Field(min_length=1)]
    """Folder or hub id of the target, exactly as you serve it (quantized if you serve it so)."""
    revision: str | None = None
    """Hub revision; null is the default branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the target. Off: say so by name if you mean it."""
    chat_template: str | None = None
    """Jinja file (or the Jinja itself) that the target is served with, as in vLLM's
    `--chat-template`; null is the target's own. Base models have none: name one."""
    chat_template_kwargs: dict[str, JsonValue] = Field(default_factory=dict)
    """Variables of the chat template that the target is served with, such as
    `{enable_thinking: false}`: vLLM's `--default-chat-template-kwargs`. The head learns what the
    target writes with them."""


class Source(Section):
    """One place that prompts come from: exactly one of ``path`` and ``dataset``."""

    path: str | None = None
    """A JSONL or Parquet file, or a JSON array. Records hold `messages`, `conversations` or a plain
    `prompt`, or are of another form of docs/your-own-model.md."""
    dataset: str | None = None
    """A data set on the hub (or a folder that `datasets` reads)."""
    split: str = "train"
    """Split of `dataset`."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """At most this many conversations of this source; null takes all."""
    name: str | None = None
    """What reports call this source (chat, code, maths, …); null takes the file's name."""

    @model_validator(mode="after")
    def _one_place(self) -> "Source":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of `path` and `dataset`")
        return self


class PromptsSection(Section):
    """What the target is asked."""

    sources: Annotated[list[Source], Field(min_length=1)]
    """Where the prompts come from. Use what your users ask: a head learns your traffic."""
    heldout: Annotated[int, Field(gt=0)] = 64
    """Conversations kept out of training, for evaluation, verify and bench. 64 gives the
    acceptance a standard error of about one point with answers of 100 tokens; of few prompts
    `init` holds out a fifth."""
    seed: Seed = 0
    """Seed of the split. The split is by conversation, by a hash of its text: adding prompts
    later never moves an old one from training to the held-out side."""


class GenerateSection(Section):
    """The target writes the answers itself: a head learns the target's own words."""

    max_new_tokens: Annotated[int, Field(gt=0)] = 512
    """Longest answer. Long enough for the model's usual answer; a cut one is still used."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0 is greedy: the words that greedy serving will see. Raise it (0.7) for more variety
    when prompts are few."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus of sampling; only matters when `temperature` > 0."""
    seed: Seed = 0
    """Seed of sampling, a request's own seed follows from it and the conversation."""
    chunk: Annotated[int, Field(gt=0)] = 256
    """Conversations in one unit of work: a unit is finished or redone whole, so that a killed
    run ends with the same bytes. Larger keeps the engine busier, smaller loses less."""


class CaptureSection(Section):
    """Hidden states of the target, taken out of the running engine."""

    aux_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Ids of the auxiliary layers: id i is the residual stream that enters layer i. null is
    vLLM's own default (2, n//2, n-3), for a `dspark` head with those half-way between."""
    format: Literal["bf16", "fp8-aux", "fp8", "fp32"] = "bf16"
    """How states lie on disk: bf16 (exact for a bf16 target), fp8-aux (the auxiliary layers in e4m3
    with a scale for each token and layer, the last one, which the teacher reads, in bf16; five
    eighths of the disk with three auxiliary layers), fp8 (all in e4m3; half the disk, and another
    teacher at some positions), fp32 (exact for an fp32 target)."""
    shard_bytes: Annotated[int, Field(ge=1 << 16)] = 1 << 30
    """Size of a shard: a gigabyte is large enough to stream and small enough to redo."""
    mode: Literal["generate", "prefill", "online"] = "generate"
    """`generate`: one pass writes answers and states, the states are those of decoding.
    `prefill`: a second pass over the finished answers; use it for answers you already have.
    `online`: no store; an engine computes states, by prefill, while training asks for them."""
    max_unusable: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Largest share of the conversations whose states may be unusable (not finite, or all zero);
    above it the run stops. Those below it are named, counted and left out: a token that makes a
    target overflow is in a few prompts of a thousand, more says that the target or its
    `engine.dtype` is wrong."""
    online_bytes: Annotated[int, Field(gt=0)] = 2 << 30
    """Shared memory for states on their way to training, for each training process: some ten rows
    of 8192 tokens of a target 2048 wide."""
    online_devices: list[Annotated[int, Field(ge=0)]] | None = None
    """GPUs of the engines that compute states online, by CUDA's numbers, in the order of the
    training processes. null: each shares its training process's GPU; then lower
    `engine.gpu_memory_utilization`, to leave room for training."""


class ClusterSection(Section):
    """Generation and capture on many machines, through Ray."""

    address: str | None = None
    """A Ray cluster (`auto` finds the one that this machine is in; `local` starts one here).
    null: this machine, without Ray. `drafthead generate --ray ADDRESS` sets it."""
    workers: Annotated[int, Field(gt=0)] | None = None
    """Engines at once, each on `engine.tensor_parallel_size` GPUs, or a CPU core in a cluster
    without GPUs; null is as many as the cluster has room for."""
    location: str | None = None
    """A URL that fsspec knows (s3://…, gs://…, file://…): workers put finished units there, and
    training brings the states from there. null: the run's folder, which all machines must share."""


class VocabSection(Section):
    """The tokens that the head may draft."""

    size: Annotated[int, Field(gt=0)] = 32000
    """Rows of the head's LM head. Each row is read at every draft step; 32,000 cover about
    99.8 % of what a model with 128,000 tokens writes."""


class HeadSection(Section):
    """The shape of the draft head. null takes the target's own figure. "The published head" is the
    one on the hub for LFM2.5-8B-A1B."""

    kind: str | list[str] = "eagle3"
    """`eagle3`: one layer drafts token after token; with little data far ahead (docs/dspark.md).
    `dspark`: a few layers draft a block in one pass. `[eagle3, dspark]`: one of each from the same
    states, to serve the faster one."""
    aux_layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Which of the captured auxiliary layers the head reads; null is all, for an `eagle3` head made
    beside another kind vLLM's own three if they are among them. Capture more once, and heads that
    read different ones can be compared on the same states."""
    hidden_size: Annotated[int, Field(gt=0)] | None = None
    """Width. vLLM shares the target's embedding, so it must be the target's unless the head
    brings its own."""
    intermediate_size: Annotated[int, Field(gt=0)] | None = None
    """Width of the MLP; null is 4 x hidden, rounded to 128 (the published head's ratio)."""
    num_attention_heads: Annotated[int, Field(gt=0)] | None = None
    """Query heads; null is the target's, or the most below that divide the width."""
    num_key_value_heads: Annotated[int, Field(gt=0)] | None = None
    """Key and value heads; null is the target's."""
    norm_before_residual: bool = True
    """Take the residual after the norm of the hidden state rather than before. The norms are the
    largest single gain that was measured: a few dimensions of a target's states are hundreds of
    times the others, and drown what a head adds to them (docs/heads.md). The published head has
    none of the three: false here, in `fc_norm` and in `norm_output`."""
    norm_before_fc: bool = False
    """RMS-norm the joined auxiliary states before `fc`."""
    fc_norm: bool = True
    """RMS-norm each auxiliary state by itself before `fc`: 2.47 tokens a step at five drafts where
    `norm_before_fc` gave 2.40 (three seeds each), and a step no longer with the plugin's patch
    `aux_norm`."""
    norm_output: bool = True
    """Feed the state after the final norm, not before it, to the next draft step: positions beyond
    `train.ttt_steps` then stay useful."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=8)] | None = None
    """Decoder layers; null is 1 for `eagle3`, where each one more is read again at every draft, and
    3 for `dspark`."""
    block_size: Annotated[int, Field(ge=1, le=16)] = 8
    """`dspark`: positions of a block, the most drafts a step."""
    markov_rank: Annotated[int, Field(ge=1)] = 256
    """`dspark`: width of the Markov head, which tells a draft of the one before; the paper's."""
    causal: bool = False
    """`dspark`: let a position of a block see only the earlier ones. Off, as in the paper."""
    mask_token: Annotated[int, Field(ge=0)] | None = None
    """`dspark`: the token id that stands for tokens not drafted yet, one that no text has. null
    takes a row of the embedding behind the tokenizer's last token, or an unused special token."""
    layer_from_target: bool = False
    """Start the first layer from the target's last attention layer instead of at random; only
    for targets laid out as Llama."""

    @property
    def layers(self) -> int:
        """`num_hidden_layers`, or what it is by default."""
        return self.num_hidden_layers or {"dspark": 3}.get(self.only_kind, 1)

    @property
    def kinds(self) -> list[str]:
        """The kinds of head to make."""
        return [self.kind] if isinstance(self.kind, str) else self.kind

    @property
    def only_kind(self) -> str:
        """The kind of head of a recipe for one; `kinds.each_kind` makes such of one for several."""
        (kind,) = self.kinds
        return kind

    @field_validator("kind")
    @classmethod
    def _each_once(cls, kind: str | list[str]) -> str | list[str]:
        if isinstance(kind, str):
            return kind
        if not kind or len(set(kind)) < len(kind):
            raise ValueError("names each kind once, such as `[eagle3, dspark]`")
        return kind if len(kind) > 1 else kind[0]


KEYS_OF_KIND = {
    "eagle3": {
        "head.norm_before_residual",
        "head.norm_before_fc",
        "head.fc_norm",
        "head.norm_output",
        "head.layer_from_target",
        "train.ttt_steps",
        "train.ttt_decay",
        "train.regression_weight",
    },
    "dspark": {
        "head.block_size",
        "head.markov_rank",
        "head.causal",
        "head.mask_token",
        "train.anchors",
        "train.slot_decay",
    },
}
"""Keys that only one kind of head has, as `section.key`."""
SECTIONS_OF_KIND = ("head", "train", "export", "serve", "verify", "bench")
"""Sections that may differ between heads made of the same states."""

ENOUGH_STEPS = 3
"""Of training-time test, for a head with `norm_output`: one trained for 5 drafts five no better."""


class TrainSection(Section):
    """Training of the head."""

    epochs: Annotated[float, Field(gt=0, le=1000)] = 3
    """Passes over the training states; the published head took 3."""
    start_from: str | None = None
    """A head to go on from, in vLLM's or speculators' format (`drafthead train --from HEAD`); null
    starts from the target's own weights."""
    ttt_steps: Annotated[int, Field(ge=1, le=8)] | None = None
    """Steps of training-time test: the head learns from its own states as it will at draft
    position 1..n. null: as many as may be drafted a step, at most 3 with `head.norm_output` (or
    that of the head in `start_from`), where more made no head better (docs/heads.md) and cost time,
    and at most 8 without it, where positions beyond are as good as lost: such a head, trained for
    3, got 30 % right at positions 1 to 3 and 5 % at the fourth. 1 is the published head's recipe
    (fit for k=1 only)."""
    ttt_decay: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Weight of step t is decay**t: later drafts count only if earlier ones were accepted."""
    loss: Loss = "kl"
    """`kl`: against the target's distribution over the draft vocabulary. `acceptance`: the
    negative logarithm of how much of a draft speculative sampling would accept. `ce+smoothl1`:
    the published EAGLE-3 head's. `ce+tv`: 0.1 cross-entropy and 0.9 total variation, DSpark's."""
    anchors: Annotated[float, Field(gt=0, le=1)] = 0.25
    """`dspark`: share of the supervised positions that get a block in an epoch, drawn anew."""
    slot_decay: Annotated[float, Field(gt=0)] = 4.0
    """`dspark`: slot j of a block weighs exp(-j / slot_decay); the paper's 4."""
    regression_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of SmoothL1 beside cross-entropy in `ce+smoothl1`; the published page names none."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """`muon` steps the matrices of the layers and `fc` by Muon, the LM head and norms by AdamW: for
    the same tokens the demo's head accepts 1.71 tokens a step where AdamW alone makes it 1.56. Its
    products cost time; `adamw` is for speed alone."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate, of all weights (Muon's steps are scaled to the size of AdamW's). null is
    2e-3 with `muon`, 1e-3 with `adamw`: of a normed head trained by AdamW alone half and twice that
    made a worse one (docs/heads.md)."""
    lm_head_rate: Annotated[float, Field(ge=0)] = 1.0
    """The LM head's learning rate as a share of the others': it starts from the target's own, and
    with 0 it stays that."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """A head sees each token a few times only: no decay needed."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's moments; 0.95 forgets spikes faster than 0.999."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps that the learning rate rises over, before the cosine."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    row_tokens: Annotated[int, Field(gt=0)] = 8192
    """Tokens of one packed row, which runs through the head at once: fills a large GPU; a longer
    conversation is cut there."""
    rows_per_step: Annotated[int, Field(ge=1)] | None = None
    """Packed rows of an optimizer step over all processes together; more than processes means
    accumulation. null: one for each process of the first start. The result does not depend on how
    many processes share the work."""
    eval_every: Annotated[int, Field(gt=0)] | None = None
    """Steps between held-out evaluations; null is ten times in a run."""
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many evaluations without a better accepted length; null never stops."""
    track: list[Literal["wandb"]] = Field(default_factory=list)
    """Trackers to report to beside JSON lines and TensorBoard, if installed."""
    seed: Seed = 0
    """Seed of initialisation and of the order of the data."""

    @property
    def peak_learning_rate(self) -> float:
        """`learning_rate`, or what it is by default."""
        return self.learning_rate or {"muon": 2e-3, "adamw": 1e-3}[self.optimizer]


# Arguments of vLLM that the recipe has a key for; vLLM's short names and shortcuts too.
_RECIPE_KEYS = {
    "model": "target.path",
    "model_tag": "target.path",
    "revision": "target.revision",
    "trust_remote_code": "target.trust_remote_code",
    "dtype": "engine.dtype",
    "max_model_len": "engine.max_model_len",
    "max_num_seqs": "engine.max_num_seqs",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "tp": "engine.tensor_parallel_size",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "kv_cache_memory_bytes": "engine.kv_cache_memory_bytes",
    "kv_cache_memory": "engine.kv_cache_memory_bytes",
    "speculative_config": "serve.num_speculative_tokens",
    "sc": "serve.num_speculative_tokens",
    "spec_method": "serve.num_speculative_tokens",
    "spec_model": "serve.num_speculative_tokens",
    "spec_tokens": "serve.num_speculative_tokens",
    "num_speculative_tokens": "serve.num_speculative_tokens",
    "chat_template": "target.chat_template",
    "chat_template_kwargs": "target.chat_template_kwargs",
    "default_chat_template_kwargs": "target.chat_template_kwargs",
}


class EngineSection(Section):
    """How vLLM runs the target, the same for capture, verify, bench and serve."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Computation type. On a CPU float32 makes greedy outputs exact."""
    max_model_len: Annotated[int, Field(gt=0)] | None = None
    """Longest sequence; null is the target's own."""
    max_num_seqs: Annotated[int, Field(gt=0)] = 64
    """Sequences at once when generating."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that share the target."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Share of a GPU's memory that an engine may take."""
    kv_cache_memory_bytes: Annotated[int, Field(gt=0)] | None = None
    """KV cache in bytes; null lets vLLM decide on a GPU and takes 1 GiB on a CPU."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of vLLM's `LLM`, by their own names. An argument that the recipe has a key
    for is refused here: drafthead would plan with one value and vLLM run with the other. Secrets
    among them (`hf_token`) are never published."""

    @field_validator("extra")
    @classmethod
    def _only_further_arguments(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for key in extra:
            # As `vllm serve` takes it: `--max-model-len`, and `--speculative-config.method`.
            name = key.lstrip("-").replace("-", "_")
            recipe_key = _RECIPE_KEYS.get(name.split(".")[0])
            if recipe_key:
                raise ValueError(f"`{key}` has a key of its own; set `{recipe_key}` instead")
            if name != key:
                raise ValueError(f"`{key}` is a flag; write the name of LLM's argument, `{name}`")
        return extra


class ExportSection(Section):
    """What is written besides the head as vLLM reads it."""

    speculators: bool = False
    """Also write the head in the speculators library's format, beside the other."""


class ServeSection(Section):
    """How the head is served."""

    drafts_by_load: (
        Annotated[
            list[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0, le=128)]]],
            Field(min_length=1),
        ]
        | None
    ) = None
    """Fewer drafts the more requests run at once, 0 for none: `[[1, 7], [17, 3], [65, 0]]` drafts 7
    for up to 16, 3 for 17 to 64, none for more. Proved, measured and served so. null drafts as many
    at any load. With several loads in `bench.concurrency`, bench says what was fastest at each."""
    num_speculative_tokens: Annotated[Drafts | None, Field(validate_default=True)] = None
    """Tokens drafted a step (k). null: 1 to 5 are proved and measured, and the fastest of those is
    served. More than five hardly ever pay, and each k is an engine to start twice. Name one to
    prove, measure and serve that one alone."""
    draft_sample_method: Literal["auto", "greedy", "probabilistic"] = "auto"
    """How drafts are drawn for sampled requests: vLLM's argument of that name. `greedy` takes the
    likeliest token: it is kept as often as the target would have drawn it. `probabilistic` draws
    from the head's distribution at the request's temperature: kept more often the hotter, for a
    longer draft step. Greedy requests get the same drafts either way. auto: `greedy`, unless
    `bench.temperature` begins above 0 and bench found `probabilistic` faster there."""
    tensor_parallel_size: Annotated[int, Field(ge=1)] | None = None
    """GPUs to serve on; null is the engine's if it is above 1, else the fewest that hold the
    weights."""

    @field_validator("drafts_by_load")
    @classmethod
    def _every_load(cls, ranges: list[tuple[int, int]] | None) -> list[tuple[int, int]] | None:
        starts = [start for start, _ in ranges or [(1, 1)]]
        if starts[0] != 1 or starts != sorted(set(starts)):
            found = ", ".join(map(str, starts))
            raise ValueError(f"begins at {found} requests; it must begin at 1 and ascend")
        if ranges and not any(drafts for _, drafts in ranges):
            raise ValueError("drafts nothing at any load; serve the target alone instead")
        return ranges

    @field_validator("num_speculative_tokens", mode="before")
    @classmethod
    def _k_by_load(cls, value: Any, info: ValidationInfo) -> Any:
        """The most drafts of `drafts_by_load`, where that is given."""
        ranges = info.data.get("drafts_by_load")
        most = max((drafts for _, drafts in ranges), default=0) if ranges else value
        if value not in (None, most):
            raise ValueError(f"drafts_by_load drafts {most} at most, not {value}; leave this out")
        return most

    @property
    def k(self) -> int:
        """Tokens drafted a step as far as the recipe says."""
        return self.num_speculative_tokens or 3

    @property
    def named_method(self) -> str:
        """`draft_sample_method` as far as the recipe says; vLLM's default where it does not."""
        return "greedy" if self.draft_sample_method == "auto" else self.draft_sample_method

    @property
    def candidates(self) -> list[int]:
        """Each k to prove and measure where verify and bench name none."""
        named = self.num_speculative_tokens
        return [named] if named else [1, 2, 3, 4, 5]


class VerifySection(Section):
    """The proof that the head changes no token."""

    prompts: Annotated[int, Field(gt=0)] | None = None
    """Prompts to check; null is all that are held out. More than those takes training prompts too:
    the claim is of every prompt, seen or not."""
    max_new_tokens: Annotated[int, Field(gt=0)] = 128
    """Tokens of each answer."""
    num_speculative_tokens: list[Drafts] | None = None
    """Each k to prove; null is the one that serve names, else 1 to 5."""
    concurrency: Annotated[int, Field(ge=1)] | None = None
    """Requests at once; null is the engine's `max_num_seqs`, so that the proof is under load."""
    prefix_cache: bool = False
    """Also ask every prompt again, and prompts that begin as others do: answers that start from
    cached blocks."""
    max_num_batched_tokens: Annotated[int, Field(gt=0)] | None = None
    """Tokens of one engine step; a small number (64) cuts prompts into chunks that share steps with
    drafts. null is vLLM's own, which few prompts exceed."""
    mixed_lengths: bool = False
    """Also cut prompts and answers to random lengths, from one token up: the batches in which
    faults of speculation have hidden."""
    samples: Annotated[int, Field(ge=0)] = 0
    """Answers sampled at each context, with and without the head, to compare their distributions,
    at each temperature of `bench.temperature` (1 if that has none); 0 leaves that test out. 500
    detect a shift of a tenth of the probability."""


class BenchSection(Section):
    """The measurement of speed."""

    prompts: Annotated[int, Field(gt=0)] = 24
    """Prompts timed, each with and without the head."""
    sources: Annotated[list[Source], Field(min_length=1)] | None = None
    """Prompt sets of your own to time (chat, code, maths, …), each with figures of its own; null
    takes the held-out prompts, by the sources that they came from."""
    max_new_tokens: Annotated[
        list[Annotated[int, Field(gt=0)]], Field(min_length=1), BeforeValidator(_listed)
    ] = [128]
    """Tokens of each answer; each number is a row of the grid, the first is the headline's. The
    shorter, the more prompts are read for each token, which moves the gain either way
    (docs/notes). The published page took 256."""
    warmup: Annotated[int, Field(ge=0)] = 2
    """Prompts run first on both engines and not counted."""
    repeats: Annotated[int, Field(ge=1)] = 1
    """Times each pair is run."""
    num_speculative_tokens: list[Drafts] | None = None
    """Each k to measure, on all prompts. null is the one that serve names, else 1 to 5: each on 8
    pairs, which is enough to choose by, then the fastest on the other prompts, by which it was not
    chosen. The headline is the k to serve."""
    concurrency: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1]
    """Requests at once, each that ends replaced by the next; each number is a row of the grid, the
    first is the headline's."""
    temperature: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] = [0.0]
    """Sampling temperatures of the grid; the first is the headline's, by which k and
    `serve.draft_sample_method` are chosen: begin with the one that your users have."""
    tensor_parallel_size: (
        Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None
    ) = None
    """Numbers of GPUs to spread the target over, each measured; null is the one that is served."""
    engines_at_once: Annotated[int, Field(ge=1)] | None = None
    """Engines held in memory while they are timed. 1: the target alone and with the head in turn,
    each started twice (A B A B); what drifts in the minutes between is then in the ratio. 2: side
    by side, one k after the other. One more than there are k: all side by side. null counts what
    fits (on a GPU two at most, unless `engine.kv_cache_memory_bytes` says what a cache takes)."""
    over: Literal["engine", "http"] = "engine"
    """`engine`: vLLM's engine itself. `http`: two servers asked by streaming, so that what the
    server adds is in the times."""


class PublishSection(Section):
    """Where the head goes on the hub, and what its model card cannot read from the run."""

    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """OWNER/NAME; the model card's examples use it."""
    base_model: str | None = None
    """Hub id of the target when `target.path` is a folder: what the model card calls it."""
    license: str | None = None
    """The target's licence as the hub names it (apache-2.0); null reads its card or LICENSE."""
    private: bool = False
    """Whether a repository that publish makes is private."""


class Recipe(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """The run's name: its folder is `runs/NAME`."""
    target: TargetSection
    prompts: PromptsSection
    generate: GenerateSection = GenerateSection()
    capture: CaptureSection = CaptureSection()
    cluster: ClusterSection = ClusterSection()
    vocab: VocabSection = VocabSection()
    head: HeadSection = HeadSection()
    train: TrainSection = TrainSection()
    export: ExportSection = ExportSection()
    engine: EngineSection = EngineSection()
    serve: ServeSection = ServeSection()
    verify: VerifySection = VerifySection()
    bench: BenchSection = BenchSection()
    publish: PublishSection = PublishSection()
    for_kind: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    """With several kinds in `head.kind`: what differs for one of them, as
    `dspark: {train: {epochs: 9}}`; head, train, export, serve, verify and bench may."""

    @model_validator(mode="after")
    def _fits_the_kinds(self) -> "Recipe":
        kinds = self.head.kinds
        if kinds == ["dspark"] and self.train.loss == "ce+smoothl1":
            raise ValueError("`train.loss`: ce+smoothl1 is for heads of kind eagle3")
        for kind, keys in KEYS_OF_KIND.items():
            for section, _, key in (name.partition(".") for name in sorted(keys)):
                values = getattr(self, section)
                default = type(values).model_fields[key].default
                if kind not in kinds and getattr(values, key) != default:
                    raise ValueError(
                        f"`{section}.{key}` is for heads of kind {kind}, and head.kind is "
                        f"{', '.join(kinds)}; leave it out"
                    )
        for kind, sections in self.for_kind.items():
            if len(kinds) < 2 or kind not in kinds:
                raise ValueError(
                    f"`for_kind.{kind}` is for one of several kinds in head.kind, which is "
                    f"{', '.join(kinds)}"
                )
            if unknown := sorted(sections.keys() - set(SECTIONS_OF_KIND)):
                raise ValueError(
                    f"`for_kind.{kind}.{unknown[0]}`: heads of the same states may differ in "
                    f"{', '.join(SECTIONS_OF_KIND)}"
                )
        return self

    @property
    def draft_methods(self) -> list[str]:
        """Each `serve.draft_sample_method` to prove and measure, vLLM's default first."""
        if self.serve.draft_sample_method == "auto" and self.bench.temperature[0]:
            return ["greedy", "probabilistic"]
        return [self.serve.named_method]

    @property
    def ttt_steps(self) -> int:
        """Steps of training-time test: the recipe's, or as many as are drafted and of use."""
        most = ENOUGH_STEPS if self.head.norm_output else 8
        return self.train.ttt_steps or min(most, max(self.serve.candidates))
