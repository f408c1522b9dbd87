"""The JSON files of a run, as far as report, card, publish, bench and doctor read them.

A file that lacks any of it, or has another type there, was altered or is another version's:
:func:`drafthead.fsio.read_json` says so. More may be in it.
"""

from typing import Annotated, Any, NotRequired

from pydantic import Field, StrictBool
from typing_extensions import TypedDict

from drafthead.fsio import Amount, Count, Natural

Interval = Annotated[list[Amount], Field(min_length=2, max_length=2)]
Curve = list[Amount]
"""Acceptance by position."""
Digits = Annotated[str, Field(pattern="^[0-9]{1,6}$")]
"""A number as a key: JSON has none but text."""


class Typical(TypedDict):
    p50: Amount


class Percentiles(Typical):
    p99: Amount


class Latency(TypedDict):
    first_token_s: Percentiles | None
    between_outputs_s: Percentiles | None
    tokens_per_s_of_a_user: Typical | None


class Latencies(TypedDict):
    drafted: Latency


class Measured(TypedDict):
    """Speed with the head against speed without."""

    speedup: Amount
    speedup_ci95: Interval
    verdict: str
    base_tokens_per_s: Amount
    drafted_tokens_per_s: Amount
    accepted_length: Amount | None
    drafts: NotRequired[Count]
    accepted_past_end: NotRequired[Count]
    latency: Latencies


class Headline(Measured):
    num_speculative_tokens: Natural
    concurrency: Natural
    max_new_tokens: Natural
    temperature: Amount
    tensor_parallel_size: Natural


class Steps(TypedDict):
    """Seconds of one, and of one with the head in those without."""

    base: Amount | None
    drafted: Amount | None
    plain_steps: Amount | None


class Point(Headline):
    """Of a grid."""

    step_s: Steps
    by_source: dict[str, Measured]


class Cell(Point):
    """A point of an unfinished bench."""

    pairs: list[dict[str, Any]]


class Compared(Point):
    """A point of the run's own head."""

    compared_speedup: Amount
    engines_at_once: Natural
    draft_sample_method: NotRequired[str]


class Stretch(TypedDict):
    """Of an answer, from the token ``begin`` on."""

    begin: Count
    accepted_length: Amount


class ExpectedSampling(TypedDict):
    """Acceptance predicted for one way to sample and one to draw drafts."""

    temperature: Amount
    draft_sample_method: str
    accepted_length: Amount
    acceptance_by_position: Curve
    by_answer_position: list[Stretch]


class Beside(TypedDict):
    """Another drafter."""

    grid: Annotated[list[Point], Field(min_length=1)]


class Gpu(TypedDict):
    name: str
    memory_bytes: Count


class Machine(TypedDict):
    summary: str
    cpu: str
    cores: Count
    memory_bytes: Count
    cpu_quota: NotRequired[Amount | None]
    memory_limit_bytes: NotRequired[Count | None]
    gpus: list[Gpu]
    system: str
    driver: str | None
    versions: dict[str, str]


class ProvedHead(TypedDict):
    sha256: dict[str, str]


class Contest(TypedDict):
    """``bench.json`` as far as other drafters go."""

    num_speculative_tokens: Natural
    beside: NotRequired[dict[str, Beside]]


class Bench(Headline, Contest):
    """``bench.json``."""

    head: ProvedHead
    pairs_timed: Count
    acceptance_by_position: Curve
    predicted_acceptance_by_position: Curve | None
    predicted_accepted_length: Amount | None
    predicted_sampling: NotRequired[list[ExpectedSampling]]
    grid: Annotated[list[Compared], Field(min_length=1)]
    commands: dict[Digits, str]
    command: str
    machine: Machine
    date: str


class Noise(TypedDict):
    """How often the target differs from itself."""

    answers: Count
    concurrency: list[Natural]
    parted: Annotated[list[Count], Field(min_length=1)]
    parted_at_once: Count


class Bounds(TypedDict):
    answers: Count
    widest: Amount
    limit: Amount


class Outcome(TypedDict):
    prompts: Count
    identical: Count
    ties: Count
    differences: Count
    tokens: Count
    lossless: StrictBool


class Run(Outcome):
    """Of one number of drafts over one set of prompts."""

    workload: str
    num_speculative_tokens: Natural
    concurrency: Natural
    noise: Noise | None
    bounds: Bounds | None
    wide: Count
    detectable_share: Amount | None
    detectable_wide_share: Amount | None


class Sampled(TypedDict):
    words: str
    contexts: Count
    samples: Count
    p_value: Amount
    detectable_shift: NotRequired[Amount | None]


class Verified(Outcome):
    """``verify.json``."""

    runs: list[Run]
    sampled: NotRequired[Sampled | None]
    command: str
    machine: Machine


class ProvedOutcome(TypedDict):
    tokens: Count


class Served(TypedDict):
    """How the head was served to be proved."""

    command: str
    draft_sample_methods: NotRequired[list[str]]


class Proof(TypedDict):
    """``proof.json``."""

    date: str

    lossless: StrictBool
    claim: Annotated[str, Field(min_length=1)]
    outcome: ProvedOutcome
    head: ProvedHead
    served: dict[Digits, Served]
    drafthead: str
    seal: str


class Expected(TypedDict):
    k: Natural
    acceptance_by_position: Curve


class Heldout(TypedDict):
    """``best.json`` of a training, without the training."""

    heldout: Annotated[list[Expected], Field(min_length=1)]


class Training(Heldout):
    """``best.json``."""

    steps: Count
    tokens: Count
    waiting: NotRequired[Amount | None]


class Covered(TypedDict):
    size: Count
    coverage: Amount


class Coverage(Covered):
    """``coverage.json``."""

    always_in: list[Count]
    curve: Annotated[list[Covered], Field(min_length=1)]
    heldout_coverage: NotRequired[Amount | None]


class Stored(TypedDict):
    """``meta.json`` of a state store, which has a reader of its own for all else."""

    aux_layers: list[Count]


class WrittenHead(TypedDict):
    """A head's ``config.json``."""

    num_hidden_layers: Natural
    hidden_size: Natural
    intermediate_size: Natural
    draft_vocab_size: Natural
    vocab_size: Natural


class Summary(TypedDict):
    """The summary of a finished stage."""

    seconds: NotRequired[Amount]


class Generated(Summary):
    conversations: Count
    heldout: Count
    answer_tokens: Count


class Captured(Summary):
    tokens: Count
    bytes: Count
    format: str
    greedy_agreement: NotRequired[Amount | None]


class Ended(TypedDict):
    """The record of a stage that ended."""

    summary: Summary


class GenerateEnded(TypedDict):
    summary: Generated


class CaptureEnded(TypedDict):
    summary: Captured


ENDED: dict[str, Any] = {"generate": GenerateEnded, "capture": CaptureEnded}
"""By stage, where a summary says more than any stage's."""

BENCH_AGAIN = "measure anew with `drafthead bench RECIPE --again`"
VERIFY_AGAIN = "prove anew with `drafthead verify RECIPE --again`"
