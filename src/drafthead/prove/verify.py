"""Stage verify: the same tokens with the head as without it, proved and signed off."""

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from drafthead.errors import ClaimFailed, DraftheadError
from drafthead.fsio import write_json
from drafthead.machine import this_machine
from drafthead.plan import Plan
from drafthead.progress import progress, waiting
from drafthead.prove.engine import Completion, EngineProcess
from drafthead.prove.grid import shared, start
from drafthead.prove.lossless import ALPHA, NOISE_ANSWERS, Examiner, any_differ, ask_again
from drafthead.prove.numeric_noise import NOT_LOSSLESS, NoiseSample, noise_words
from drafthead.prove.prompts import Prompt, many_prompts
from drafthead.prove.proof import command_line, proof_path, write_proof
from drafthead.prove.sampling_test import TwoSample, two_sample
from drafthead.prove.served import default_ks
from drafthead.recipe import Recipe, with_options
from drafthead.rundir import RunDir
from drafthead.serve import engine_plan, engines_that_fit, existing_head
from drafthead.targets import Target, recipe_target

# Lengths that faults of speculation have hidden at: one-token prompts, a block's edge, chunks.
_PROMPT_LENGTHS = (1, 1, 2, 3, 4, 5, 8, 20, 60, 130, 200)
_ANSWER_LENGTHS = (1, 2, 5, 17, 40)

# Sampling is compared at a few contexts and positions, many times each. The seeds of the two
# engines must not meet: the same draws on both would hide what differs.
_SAMPLED_CONTEXTS, _SAMPLED_TOKENS, _SEEDS = 8, 8, 1 << 29
Way = tuple[int, str]
"""How a head drafts: tokens a step, and vLLM's ``draft_sample_method``."""
_TWIN: Way = (0, "")
"""The target alone, set as with the head."""


@dataclass(frozen=True)
class Workload:
    """Prompts with a limit for each answer, and how many run at once."""

    name: str
    prompts: list[list[int]]
    max_tokens: list[int]
    concurrency: int


def mixed_lengths(
    prompts: Sequence[Sequence[int]], longest: int, seed: int = 0
) -> tuple[list, list[int]]:
    """Cut prompts and answers to lengths drawn from short and odd ones, down to one token.

    Args:
        prompts: token ids of each, fewer than ``longest``.
        longest: tokens of a prompt with its answer.
        seed: of the draw.

    Returns:
        Prompts and, for each, the limit of its answer.
    """
    rng = np.random.default_rng(seed)
    cut = [list(p[: rng.choice(_PROMPT_LENGTHS)]) for p in prompts]
    drawn = rng.choice(_ANSWER_LENGTHS, len(cut))
    return cut, [min(int(n), longest - len(p)) for n, p in zip(drawn, cut, strict=True)]


def begun_alike(prompts: Sequence[Sequence[int]], longest: int) -> list[list[int]]:
    """Every prompt again, then its first half followed by the next prompt: the repeated prefixes
    come from cached blocks, whole or in part."""
    again = [list(prompt) for prompt in prompts]
    following = [*again[1:], *again[:1]]
    halves = [(a[: -(-len(a) // 2)] + b)[:longest] for a, b in zip(again, following, strict=True)]
    return again + halves


def workloads(recipe: Recipe, prompts: Sequence[Prompt], max_model_len: int) -> list[Workload]:
    """The workloads of verify: the prompts and, if asked for, the same from cached blocks and at
    mixed lengths.

    Raises:
        DraftheadError: no prompt leaves room for an answer.
    """
    section = recipe.verify
    concurrency = section.concurrency or recipe.engine.max_num_seqs
    ids = [p.ids for p in prompts if len(p.ids) < max_model_len]
    if not ids:
        shortest = min(len(p.ids) for p in prompts)
        raise DraftheadError(
            f"engine.max_model_len: none of {len(prompts)} prompts leaves room for an answer "
            f"within {max_model_len} tokens, the shortest has {shortest}; raise it"
        )
    limits = [min(section.max_new_tokens, max_model_len - len(p)) for p in ids]
    work = [Workload("prompts", ids, limits, concurrency)]
    if section.prefix_cache:
        longest = max(1, max_model_len - section.max_new_tokens)
        cached = begun_alike(ids, longest)
        room = [min(section.max_new_tokens, max_model_len - len(p)) for p in cached]
        work.append(Workload("cached prefixes", cached, room, concurrency))
    if section.mixed_lengths:
        work.append(Workload("mixed lengths", *mixed_lengths(ids, max_model_len), concurrency))
    return work


def _answers_in_all(work: Sequence[Workload], ways: Sequence[Way], recipe: Recipe) -> int:
    """How many answers are written before any are compared. ways: as in :func:`prove_lossless`,
    `_TWIN` for the target alone set as with the head."""
    greedy = sum(len(w.prompts) for w in work)
    contexts = min(_SAMPLED_CONTEXTS, len(work[0].prompts)) * len(temperatures(recipe))
    again = 2 * sum(min(NOISE_ANSWERS, len(w.prompts)) for w in work) if _TWIN in ways else 0
    with_head = [way for way in ways if way != _TWIN]
    sampled = (1 + len({method for _, method in with_head})) * contexts * recipe.verify.samples
    return (len(with_head) + 1) * greedy + sampled + again


def _answers(
    engine: EngineProcess, work: Sequence[Workload], prefix_cache: bool = True
) -> list[list[Completion]]:
    return [
        engine.generate(
            w.prompts,
            max_tokens=w.max_tokens,
            concurrency=w.concurrency,
            prefix_cache=prefix_cache,
        ).completions
        for w in work
    ]


def _draws(
    engine: EngineProcess, prompts: Sequence[list[int]], recipe: Recipe, seed: int
) -> list[np.ndarray]:
    """Sampled answers at each temperature and context: token ids [samples, tokens], filled up with
    -1."""
    section = recipe.verify
    concurrency = section.concurrency or recipe.engine.max_num_seqs
    draws = []
    for number, (temperature, prompt) in enumerate(
        itertools.product(temperatures(recipe), prompts)
    ):
        answers = engine.generate(
            [prompt] * section.samples,
            max_tokens=_SAMPLED_TOKENS,
            concurrency=concurrency,
            temperature=temperature,
            seed=seed + number * section.samples,
        )
        tokens = np.full((section.samples, _SAMPLED_TOKENS), -1)
        for row, completion in zip(tokens, answers.completions, strict=True):
            row[: len(completion.ids)] = completion.ids
        draws.append(tokens)
    return draws


def temperatures(recipe: Recipe) -> list[float]:
    """At which sampled answers are compared: the recipe's, 1 where it has none but greedy."""
    return sorted({heat for heat in recipe.bench.temperature if heat}) or [1.0]


@dataclass(frozen=True)
class Plans:
    """How the engines are run."""

    drafted: dict[Way, Plan]
    """By how the head drafts."""
    base: Plan
    """The target alone."""
    twin: Plan
    """As the drafted ones, without the head. Where it is not ``base``'s, an engine of it is asked
    too: how far the two part is not the head's doing."""


def verify_plans(recipe: Recipe, head: str | Path, target: Target) -> Plans:
    """Plans for each k to prove, and for the first k with the other method of drawing drafts that
    may be served; with a head engine steps are as small as verify asks for."""
    ks = recipe.verify.num_speculative_tokens or default_ks(recipe)
    size, chunked = recipe.verify.max_num_batched_tokens, recipe
    if size is not None:
        extra = {**recipe.engine.extra, "max_num_batched_tokens": size}
        chunked = with_options(recipe, "engine", {"extra": extra})
    first, *others = recipe.draft_methods
    ways = [*((k, first) for k in ks), *((ks[0], method) for method in others)]

    def plan(k: int, method: str) -> Plan:
        with_method = with_options(chunked, "serve", {"draft_sample_method": method})
        return engine_plan(with_method, head=head, target=target, num_speculative_tokens=k)

    return Plans(
        {way: plan(*way) for way in ways},
        engine_plan(recipe, head=None, target=target),
        engine_plan(chunked, head=None, target=target),
    )


@dataclass(frozen=True)
class Outcome:
    """What the engines gave."""

    runs: list[dict]
    """For each way of drafting and workload, what
    :meth:`drafthead.prove.lossless.Examiner.compare` found, with ``num_speculative_tokens``,
    ``draft_sample_method``, ``workload`` and ``concurrency``."""
    sampled: dict[str, TwoSample] = field(default_factory=dict)
    """The test of sampling with the first k, by ``draft_sample_method``; empty if it was not asked
    for."""
    unprotected: tuple[str, ...] = ()
    """Faults that vLLM may have, whose patches an engine with the head did without."""


def prove_lossless(
    plans: Plans,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    target: Target,
    logs: Path,
    console: Console,
) -> Outcome:
    """Run each drafted engine, then the target alone, and compare.

    Only one engine works at a time. Where they fit on a GPU together, their caches being given in
    bytes, all are started at once: starting takes longer than answering. Else one lives at a time.
    The target alone comes last and stays for the examination of what differs; it computes every
    greedy answer anew, nothing of it comes out of a prefix cache.

    Args:
        plans: of the engines.
        prompts: what is asked.
        recipe: limits and load.
        target: the recipe's.
        logs: folder for what the engines print.
        console: where people see how far it is.

    Raises:
        DraftheadError: an engine does not run, or drafts nothing with the head.
    """
    # An engine that drafts 0 tokens: the target alone, set as with the head.
    needed = plans.drafted | ({_TWIN: plans.twin} if plans.twin.args != plans.base.args else {})
    several = len({method for _, method in plans.drafted}) > 1
    machine = this_machine()
    at_once = (
        machine.vllm_device == "cuda"
        and recipe.engine.kv_cache_memory_bytes is not None
        and engines_that_fit(plans.base, target, machine) > len(needed)
    )

    def engine_of(plan: Plan, name: str, log: str) -> EngineProcess:
        plan = shared(plan, len(needed) + 1) if at_once else plan
        return EngineProcess(
            plan.args, env=plan.environment, log=logs / f"verify-{log}.log", name=name
        )

    alone = engine_of(plans.base, "target alone", "target")

    def name_of(way: Way) -> tuple[str, str]:
        k, method = way
        if way == _TWIN:
            return "target alone, set as with head", "k0"
        more = f", {method} drafts" if several else ""
        return f"with head, k={k}{more}", f"k{k}{'-' * several + method * several}"

    others = {way: engine_of(plan, *name_of(way)) for way, plan in needed.items()}
    unprotected: dict[str, None] = {}
    work: list[Workload] = []
    again: list[list[dict[int, Completion]]] | None = None
    written: dict[Way, list[list[Completion]]] = {}
    draws: dict[str, list[np.ndarray]] = {}
    alone_draws: list[np.ndarray] = []
    with contextlib.ExitStack() as stack:
        expected = len(prompts) * (len(others) + 1)  # of one workload; the engines tell how many
        with progress(console, "verify", expected, unit="answers") as bar:
            for engine in (*others.values(), alone):
                engine.on_answer = bar.advance
            if at_once:
                start([*others.values(), alone], stack, console)
            for way, engine in others.items():
                with contextlib.ExitStack() as only_now:
                    if not at_once:
                        start([engine], only_now, console)
                    unprotected |= dict.fromkeys(engine.info["unprotected"])
                    work = work or workloads(recipe, prompts, engine.info["max_model_len"])
                    bar.total = _answers_in_all(work, list(others), recipe)
                    bar.advance(0, note=engine.name)
                    if way == _TWIN:
                        again = [
                            ask_again(engine, w.prompts, w.max_tokens, w.concurrency) for w in work
                        ]
                        continue
                    k, method = way
                    written[way] = _answers(engine, work)
                    if not engine.counters().drafts:
                        raise DraftheadError(
                            f"verify: with k = {k} nothing was drafted, so that the same answers "
                            "prove nothing; raise verify.max_new_tokens, or take prompts with "
                            "longer answers"
                        )
                    contexts = work[0].prompts[:_SAMPLED_CONTEXTS]
                    if recipe.verify.samples and method not in draws:
                        seed = _SEEDS * (1 + len(draws))
                        draws[method] = _draws(engine, contexts, recipe, seed=seed)
            if not at_once:
                start([alone], stack, console)
            bar.advance(0, note=alone.name)
            base_answers = _answers(alone, work, prefix_cache=False)
            if draws:
                alone_draws = _draws(alone, contexts, recipe, seed=0)
        noise_sample = NoiseSample()
        examiners = [
            Examiner(
                alone,
                w.prompts,
                w.max_tokens,
                w.concurrency,
                again[i] if again else None,
                noise_sample,
            )
            for i, w in enumerate(work)
        ]
        if any(
            any_differ(*pair) for answers in written.values() for pair in zip(base_answers, answers)
        ):
            # All sets, before any is judged: it is one noise.
            rounds = 1 if again else 2
            asked = rounds * sum(min(NOISE_ANSWERS, len(w.prompts)) for w in work)
            with progress(console, "measuring numeric noise", asked, unit="answers") as bar:
                alone.on_answer = bar.advance
                for examiner, answers in zip(examiners, base_answers):
                    examiner.measure(answers)
        with waiting(console, "examining answers that differ", unit="answers") as bar:
            alone.on_answer = bar.advance
            runs = [
                {
                    "num_speculative_tokens": k,
                    "draft_sample_method": method,
                    "workload": w.name,
                    "concurrency": w.concurrency,
                    **examiners[i].compare(base_answers[i], answers[i]),
                }
                for (k, method), answers in written.items()
                for i, w in enumerate(work)
            ]
    with waiting(console, "comparing the sampled answers"):
        sampled = {method: two_sample(alone_draws, drawn) for method, drawn in draws.items()}
    return Outcome(runs, sampled, tuple(unprotected))


def verify(recipe: Recipe, run: RunDir, *, console: Console) -> dict:
    """Prove that greedy output is the same with the head as without, for each k asked for.

    Writes ``verify.json`` and ``proof.json`` whether the claim holds or not.

    Args:
        recipe: the run's recipe.
        run: a run whose head is exported.
        console: where people read what happens.

    Returns:
        ``lossless, prompts, identical, ties, differences`` over all k and workloads, and each
        one's own under ``runs``.

    Raises:
        DraftheadError: an engine does not run, or drafts nothing with the head.
        ClaimFailed: a difference that is no tie.
    """
    target = recipe_target(recipe)
    head = existing_head(run.head)
    prompts = many_prompts(run, recipe.verify.prompts)
    plans = verify_plans(recipe, head, target)
    ks = ", ".join(dict.fromkeys(str(k) for k, _ in plans.drafted))
    console.print(f"verify: {len(prompts)} prompts, k = {ks}")
    outcome = prove_lossless(plans, prompts, recipe, target, run.root / "logs", console)
    runs, sampled = outcome.runs, outcome.sampled
    result = {
        "lossless": all(r["lossless"] for r in runs) and all(t.same for t in sampled.values()),
        **{
            name: sum(r[name] for r in runs)
            for name in ("prompts", "identical", "ties", "differences", "tokens")
        },
        "runs": runs,
        "words": noise_words({"runs": runs}),
        "sampled": sampled_record(sampled, temperatures(recipe)),
        "unprotected": list(outcome.unprotected),
        "command": command_line(),
        "machine": this_machine().as_dict(),
    }
    proof_path(run).unlink(missing_ok=True)  # of another outcome; hashing a target takes minutes
    write_json(run.verify_json, result)
    served: dict[int, dict] = {}
    for (k, method), plan in plans.drafted.items():
        p = plan.public
        how = {"command": p.shell(), "engine_args": p.args, "draft_sample_methods": [method]}
        served.setdefault(k, how)
        if method not in served[k]["draft_sample_methods"]:
            served[k]["draft_sample_methods"].append(method)
    with waiting(console, "hashing target and head"):
        write_proof(run, recipe.target.path, target, result, served, prompts)
    console.print(
        f"verify: {result['identical']} of {result['prompts']} answers identical"
        + (f", {result['ties']} ties within numeric noise" if result["ties"] else "")
    )
    for line in result["words"]:
        console.print(line)
    for line in outcome.unprotected:
        console.print(f"[yellow]{escape(line)}[/yellow]", soft_wrap=True)
    if result["sampled"]:
        console.print(result["sampled"]["words"])
    if not all(r["lossless"] for r in runs):
        raise ClaimFailed(_failure(runs, run))
    if not result["lossless"]:
        raise ClaimFailed(f"not lossless: {result['sampled']['words']} See {run.verify_json}")
    summary = ("lossless", "prompts", "identical", "ties", "differences", "unprotected")
    return {key: result[key] for key in summary}


def sampled_record(sampled: dict[str, TwoSample], heats: Sequence[float]) -> dict | None:
    """The tests of sampling as ``verify.json`` has them: the figures of the least sure one, and
    what each found in words; None without one. heats: the temperatures that they were of."""
    if not sampled:
        return None
    at = ", ".join(f"{heat:g}" for heat in heats)
    words = [
        test.words.replace("Sampling:", f"Sampling at temperature {at}, {method} drafts:")
        for method, test in sampled.items()
    ]
    weakest = max(sampled.values(), key=lambda t: (not t.same, t.detectable_shift or 1.0))
    tests = {method: asdict(test) for method, test in sampled.items()}
    return {
        **asdict(weakest),
        "temperatures": list(heats),
        "tests": tests,
        "words": " ".join(words),
    }


def _failure(runs: list[dict], run: RunDir) -> str:
    """Describe the most certain fault of all runs."""
    failed = min((r for r in runs if not r["lossless"]), key=lambda r: not r["differences"])
    where = f"k = {failed['num_speculative_tokens']}, {failed['workload']}"
    if not failed["differences"] and failed["p_wide"] < ALPHA:
        return (
            f"not lossless ({where}): {failed['wide']} of {failed['prompts']} answers with the "
            "head differ from the target's by a wider gap than the target ever differs from "
            f"itself (p = {failed['p_wide']:.2g}); see {run.verify_json}"
        )
    if not failed["differences"]:
        return (
            f"not lossless ({where}): {failed['ties']} of {failed['prompts']} answers with the "
            "head differ from the target's, more than the target differs from itself "
            f"(p = {failed['p_value']:.2g}); see {run.verify_json}"
        )
    fault = next(d for d in failed["examined"] if d["verdict"] == NOT_LOSSLESS)
    gap = (
        "and not among the target's likeliest"
        if fault["gap"] is None
        else f"and {fault['gap']:.4g} below the target's likeliest in log-probability"
    )
    alone, drafted = (
        "the end" if token is None else token
        for token in (fault["base_token"], fault["drafted_token"])
    )
    return (
        f"not lossless: {sum(r['differences'] for r in runs)} of "
        f"{sum(r['prompts'] for r in runs)} answers differ; the first ({where}) is prompt "
        f"{fault['prompt']} at token {fault['position']}: the target alone wrote {alone}, with "
        f"the head {drafted}, {gap}; "
        f"see {run.verify_json}"
    )
