"""Diagnose a live server: compare its counters with the run's predictions.

The run's own held-out prompts are put to the server as token ids, greedily, while its counters
are read. That separates the causes: prompts given as ids bypass the server's chat template, and
they are prompts whose acceptance training has predicted.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path

from drafthead.data.template import Message, Template
from drafthead.finding import Finding
from drafthead.fsio import read_json
from drafthead.head.acceptance import Acceptance
from drafthead.prove.choice import to_serve
from drafthead.prove.prediction import predicted_by_training
from drafthead.prove.prompts import heldout_prompts
from drafthead.prove.records import BENCH_AGAIN, Bench, Stored
from drafthead.prove.served import recommended_k, served_k
from drafthead.prove.server import Client, Sample, total
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir

PROBES = 16
NEAR_ZERO = 0.1
"""Acceptance at the first position below which a head may as well be random: published heads
reach 0.5 to 0.8, and a fault of wiring leaves a few percent."""
POINTS = 0.05
"""Distance from the prediction that 16 answers do not explain."""
ENOUGH_DRAFTS = 200
_SOME_LONGER = 0.1
_NO_DRAFTS = (
    "with structured outputs vLLM drops drafts that the grammar does not allow: compare with a "
    "request that has no response_format; else look for a failed patch in the server's log"
)


@dataclass(frozen=True)
class LiveFacts:
    """Observations of a server; None is unknown."""

    traffic: Acceptance
    """Counters before the probes: what its users sent."""
    configured: bool = True
    """It was started to draft: without a speculative config vLLM has no counters of drafts."""
    answers: int = 0
    """Answers that its users got before the probes."""
    tokens: int = 0
    """Tokens of those answers."""
    longer: float | None = None
    """Share of those answers that are longer than any that the head was trained on."""
    trained_tokens: int = 0
    """Tokens of the longest answer that it may have been trained on."""
    probe: Acceptance | None = None
    """Counters of the run's held-out prompts, given as token ids."""
    predicted: list[float] | None = None
    """Acceptance by position that training predicts for them."""
    template_agrees: bool | None = None
    """The server's chat template gives the token ids that the run's answers began with, or those of
    today if it prints a date."""
    needs_arguments: bool = False
    """It does so only for requests that bring the recipe's `chat_template_kwargs`."""
    head_aux_layers: list[int] | None = None
    trained_aux_layers: list[int] | None = None
    """Layers that the states in the run were captured at."""
    head_problems: tuple[str, ...] = ()
    """What ``drafthead inspect`` finds wrong between head and target."""
    head_notes: tuple[str, ...] = ()
    probe_tokens_per_s: float | None = None
    base_tokens_per_s: float | None = None
    """Target alone, one request at a time as the probes are, from bench."""
    best_k: int | None = None

    @property
    def undrafted(self) -> int:
        """Tokens of its users' answers that came without a draft, the first of each aside: the
        prompt's own step yields that one. Below 0 it is how many drafts the counters have as
        accepted that nobody got: they stood beyond `max_tokens` or a stop."""
        return self.tokens - self.answers - self.traffic.drafts - sum(self.traffic.accepted)


def conclude(facts: LiveFacts) -> list[Finding]:
    """Findings and their likely causes, the most certain cause first."""
    if not facts.configured:
        return [
            Finding(
                "speculation",
                "fault",
                "the server does not draft: it was started without a speculative config",
                "start it with `drafthead serve RECIPE`, which passes --speculative-config",
            )
        ]
    if facts.traffic.drafts and facts.probe and not facts.probe.drafts:
        # No held-out prompt fits this server, or answers are of one token: they say nothing.
        facts = replace(facts, probe=None, probe_tokens_per_s=None)
    if not facts.traffic.drafts and not (facts.probe and facts.probe.drafts):
        return [_nothing_drafted(facts)]
    findings = []
    if facts.template_agrees is False:
        findings.append(
            Finding(
                "chat template",
                "fault",
                "the server's chat template gives other tokens than the one that the head was "
                "trained with",
                "serve with the recipe's target.chat_template and target.chat_template_kwargs, as "
                "`drafthead serve RECIPE` does; in the recipe, null is the target's own template",
            )
        )
    elif facts.needs_arguments:
        findings.append(
            Finding(
                "chat template",
                "warning",
                "the server has other default arguments of the chat template than the recipe's "
                "target.chat_template_kwargs: only requests that bring them get the prompts that "
                "the head was trained with",
                "start it with `drafthead serve RECIPE`, or send chat_template_kwargs with each "
                "request",
            )
        )
    counters = facts.probe or facts.traffic
    findings.append(_acceptance(facts, counters))
    findings += _traffic(facts)
    if facts.probe_tokens_per_s and facts.base_tokens_per_s:
        findings.append(_speed(facts.probe_tokens_per_s, facts.base_tokens_per_s, facts.best_k))
    return findings


def _nothing_drafted(facts: LiveFacts) -> Finding:
    """Of a server that could draft and did not, so far."""
    if facts.undrafted > 0:
        return Finding(
            "speculation",
            "warning",
            f"none of {facts.tokens:,} tokens was drafted",
            _NO_DRAFTS,
        )
    if facts.tokens:
        return Finding(
            "speculation",
            "warning",
            f"all {facts.answers:,} answers so far were of one token, which needs no draft",
            "ask for longer answers",
        )
    if facts.probe:
        return Finding(
            "speculation",
            "fault",
            "no held-out prompt of the run was drafted for",
            "raise --max-model-len or bench.max_new_tokens: an answer needs two tokens at least",
        )
    return Finding(
        "speculation",
        "warning",
        "the server has answered nothing yet",
        "send it some requests, or name the recipe here",
    )


def _acceptance(facts: LiveFacts, counters: Acceptance) -> Finding:
    rates = counters.by_position
    words = (
        f"{', '.join(f'{rate:.1%}' for rate in rates)} by position, "
        f"{counters.accepted_length:.2f} tokens a step"
    )
    expected = facts.predicted[0] if facts.predicted and facts.probe else None
    if expected is not None:
        words += f"; predicted at position 1: {expected:.1%}"
    low = expected is not None and rates[0] < expected - POINTS
    if rates[0] >= NEAR_ZERO and not low:
        return Finding("acceptance", "ok", words)
    state = "fault" if rates[0] < NEAR_ZERO else "warning"
    return Finding("acceptance", state, words, _cause(facts, expected is not None and not low))


def _cause(facts: LiveFacts, as_predicted: bool) -> str:
    """The likeliest cause of poor acceptance that there is evidence for."""
    if facts.head_problems:
        return "the head does not fit: " + "; ".join(facts.head_problems)
    head, trained = facts.head_aux_layers, facts.trained_aux_layers
    if head is not None and trained is not None and head != trained:
        moved = {a - b for a, b in zip(head, trained, strict=False)}
        by = f" (moved by {moved.pop():+d})" if len(moved) == 1 else ""
        return (
            f"the head is served states of layers {head}, and was trained on those of {trained}"
            f"{by}: write {trained} as eagle_aux_hidden_state_layer_ids into its config.json"
        )
    if as_predicted:
        return (
            "it is served as training predicts: the head has learnt too little. Take more steps "
            "(lower train.row_tokens) or more prompts"
        )
    if facts.head_notes:
        return "likely: " + "; ".join(facts.head_notes)
    return (
        "no cause is to be seen in the files. Check that the server runs the target of the recipe "
        "(same quantization), that its log names no failed patch of drafthead's plugin, and that "
        "`drafthead verify` and `drafthead bench` agree on this machine"
    )


def _traffic(facts: LiveFacts) -> list[Finding]:
    """Users' answers: whether they are drafted for, and their acceptance against that of the
    held-out prompts."""
    traffic, found = facts.traffic, []
    if facts.longer and facts.longer > _SOME_LONGER:
        words = (
            f"{facts.longer:.0%} of the answers are longer than {facts.trained_tokens:,} tokens, "
            "and the head was trained on none so long"
        )
        fix = (
            "see in bench how acceptance goes on with the position in an answer (bench.json, "
            "predicted_sampling); raise generate.max_new_tokens and train on"
        )
        found.append(Finding("traffic", "warning", words, fix))
    if traffic.drafts >= ENOUGH_DRAFTS and facts.tokens and facts.undrafted < 0:
        beyond = -facts.undrafted
        length = (facts.tokens - facts.answers) / traffic.drafts
        words = (
            f"{beyond:,} of {sum(traffic.accepted):,} drafts that the counters have as accepted "
            f"stood beyond the end of an answer; users got {length:.2f} tokens a step at most"
        )
        found.append(Finding("traffic", "ok", words))
    cut = traffic.drafts * traffic.k - traffic.draft_tokens
    if facts.tokens >= ENOUGH_DRAFTS and facts.undrafted > facts.tokens / 2:
        share = facts.undrafted / facts.tokens
        words = f"{share:.0%} of the {facts.tokens:,} tokens that users got came without a draft"
        found.append(Finding("traffic", "warning", words, _NO_DRAFTS))
    elif traffic.drafts >= ENOUGH_DRAFTS and cut > traffic.draft_tokens:
        words = f"{cut / (traffic.drafts * traffic.k):.0%} of users' drafts were cut off"
        found.append(Finding("traffic", "warning", words, _NO_DRAFTS))
    if facts.probe is None or traffic.drafts < ENOUGH_DRAFTS:
        return found
    users, heldout = (c.by_position[0] for c in (traffic, facts.probe))
    words = f"{users:.1%} at position 1 for what users sent, {heldout:.1%} for held-out prompts"
    if users >= heldout - 2 * POINTS:
        return [*found, Finding("traffic", "ok", words)]
    if facts.template_agrees is False:
        fix = "the chat template is the likely cause, see above"
    else:
        fix = (
            "users ask other things than the head was trained on (or sample at a temperature): "
            "put their prompts into prompts.sources and train on"
        )
    return [*found, Finding("traffic", "warning", words, fix)]


def _speed(probe: float, base: float, best_k: int | None) -> Finding:
    words = f"{probe:.1f} tokens/s one at a time; the target alone made {base:.1f} in bench"
    if probe >= base:
        return Finding("speed", "ok", words)
    k = f"k = {best_k} was the fastest in bench; " if best_k else ""
    return Finding(
        "speed",
        "warning",
        words + ": slower than without the head, unless the server is busy",
        f"{k}compare on an idle server, without --enforce-eager; drafting does not pay on every "
        "machine",
    )


def observe(client: Client, recipe: Recipe | None, runs: Path) -> LiveFacts:
    """Look at a server; with a recipe, put its held-out prompts to it.

    Raises:
        DraftheadError: the server does not answer.
    """
    traffic = client.counters()
    samples = client.metrics()
    seen = LiveFacts(
        traffic,
        configured=any(s.name == "vllm:spec_decode_num_drafts_total" for s in samples),
        answers=total(samples, "request_success"),
        tokens=total(samples, "generation_tokens"),
    )
    if recipe is None:
        return seen
    trained = recipe.generate.max_new_tokens
    from drafthead.capture.plan import make_plan
    from drafthead.drafters.inspect import inspect_head

    recipe, run = to_serve(recipe, runs)
    prompts = heldout_prompts(run, PROBES)
    longest = client.model()["max_model_len"]
    ids = [p.ids for p in prompts if len(p.ids) < longest]
    limits = [min(recipe.bench.max_new_tokens[0], longest - len(p)) for p in ids]
    answers = client.generate(ids, max_tokens=limits, prefix_cache=False)
    probe = client.counters().since(traffic)
    plan = make_plan(recipe, run.began("generate"))
    about = inspect_head(run.head, plan.target)
    bench = {}
    if run.bench_json.exists():
        bench = read_json(run.bench_json, "bench's figures", Bench, BENCH_AGAIN)
    config = about.get("config") or {}
    by_id = {p.conversation: p.ids for p in prompts}
    chats = [chat for unit in plan.units for chat, _ in unit if chat.id in by_id]
    agree, needs_arguments = None, False
    for chat in [chat for chat in chats if len(chat.turns) == 1][:1]:
        agree, needs_arguments = compare_templates(
            client, plan.template, chat.opening, by_id[chat.id]
        )
    return replace(
        seen,
        longer=share_longer(samples, trained),
        trained_tokens=trained,
        probe=probe,
        predicted=predicted_by_training(run, served_k(recipe, run)),
        template_agrees=agree,
        needs_arguments=needs_arguments,
        head_aux_layers=config.get("aux_layer_ids"),
        trained_aux_layers=sorted(recipe.head.aux_layers or []) or _captured_layers(run),
        head_problems=tuple(about["problems"]),
        head_notes=tuple(about["notes"]),
        probe_tokens_per_s=answers.tokens / answers.wall_s,
        base_tokens_per_s=_alone(bench),
        best_k=recommended_k(recipe, run),
    )


def share_longer(samples: Sequence[Sample], tokens: int) -> float | None:
    """Share of a server's answers that are certainly longer than so many tokens, by its histogram
    of them; None without an answer."""
    name = "vllm:request_generation_tokens_bucket"
    counts: dict[float, float] = {}
    for sample in samples:
        if sample.name == name:
            edge = float(sample.labels["le"])
            counts[edge] = counts.get(edge, 0) + sample.value
    every = counts.get(math.inf)
    edges = [edge for edge in counts if edge >= tokens]
    return 1 - counts[min(edges)] / every if every and edges else None


def compare_templates(
    client: Client, template: Template, messages: Sequence[Message], ids: list[int]
) -> tuple[bool | None, bool]:
    """Compare the server's chat template with the run's.

    Args:
        client: the server.
        template: the recipe's, at the time at which the run began.
        messages: of a conversation that the run asked.
        ids: its prompt in the run.

    Returns:
        Whether the server makes the same prompt of it, None where every prompt is another one as it
        prints the time of day; and whether only for requests that bring the template's arguments.
    """
    noon = template.at(datetime(2026, 1, 1, 12))
    if noon.changes_within(timedelta(minutes=1, seconds=1), messages):
        return None, False
    expected = [ids]
    if noon.changes_within(timedelta(days=1), messages) and template.encode(messages)[0] == ids:
        # The prompt that prints today's date. The server's clock may be in another time zone.
        days = [datetime.now() + timedelta(days=days) for days in (-1, 0, 1)]
        expected += [template.at(day).encode(messages)[0] for day in days]
    if client.tokenize_chat(messages, template.arguments) not in expected:
        return False, False
    return True, bool(template.arguments) and client.tokenize_chat(messages) not in expected


def _alone(bench: dict) -> float | None:
    """Tokens a second of the target alone for one greedy request at a time, if that was timed."""
    for cell in bench.get("grid", []):
        if cell["concurrency"] == 1 and not cell["temperature"]:
            return cell["base_tokens_per_s"]
    return None


def _captured_layers(run: RunDir) -> list[int] | None:
    path = run.states / "meta.json"
    if not path.exists():
        return None
    return list(read_json(path, "the state store's description", Stored)["aux_layers"])


def diagnose_server(url: str, recipe: Recipe | None, runs: Path) -> list[Finding]:
    """Diagnose a live server; with a recipe, against what its run predicts.

    Raises:
        DraftheadError: the server does not answer.
    """
    return conclude(observe(Client(url), recipe, runs))
