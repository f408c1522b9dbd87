"""Whether a recipe's run can be done on this machine: target, prompts, memory, disk, head.

Imports PyTorch and transformers, and no vLLM.
"""

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from drafthead.capture.plan import check_room, conversations, store_meta
from drafthead.data.chats import Chat, Chats, SourceCounts
from drafthead.data.estimate import Estimate, estimate, opening_lengths
from drafthead.data.records import check_file
from drafthead.data.template import Template, recipe_template
from drafthead.drafters import drafter_of
from drafthead.drafters.inspect import inspect_head
from drafthead.errors import DraftheadError
from drafthead.finding import Finding
from drafthead.head.checkpoint import as_started
from drafthead.kinds import each_kind
from drafthead.machine import Machine
from drafthead.plan import Plan
from drafthead.prove.prompts import own_prompts
from drafthead.prove.served import candidates
from drafthead.recipe import ENOUGH_STEPS, Recipe
from drafthead.rundir import RunDir
from drafthead.serve import (
    engine_plan,
    engines_that_fit,
    longest_sequence,
    refused_sampling,
    request_defaults,
)
from drafthead.targets import Target, recipe_target
from drafthead.train.stage import check_shape
from drafthead.vocab import check_size

_FEW_STEPS = 200
# Of generation_config.json what vLLM's server adds to each request besides a temperature, and what
# the value that changes nothing is.
_ADDED = {"top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
# By what of a head's path vLLM guesses the method, in its order, before it looks at anything else
# (`SpeculativeConfig.__post_init__` in `vllm/config/speculative.py` of 0.32). Where none of them is
# in it, DSpark heads are known by their architecture, and EAGLE-3 heads end the engine at the first
# request, which nobody overlooks.
_GUESSED = (
    ("eagle-", "eagle"),
    ("eagle3", "eagle3"),
    ("dflash", "dflash"),
    ("dspark", "dspark"),
)
_LEFT_OUT = "nothing to do if you can spare them; else correct the records named"
_TOO_LONG = "raise engine.max_model_len, as far as the target reaches, or take shorter prompts"
_CORRECT = "correct the recipe, or the file that the message names"


@contextlib.contextmanager
def _fault(findings: list[Finding], what: str, fix: str) -> Iterator[None]:
    """Make an error in the block a finding, so that one mistake hides no other."""
    try:
        yield
    except DraftheadError as error:
        finding = Finding(what, "fault", str(error), fix)
        if finding not in findings:  # two checks may meet the same mistake
            findings.append(finding)


def check_kinds(recipe: Recipe, runs: Path, machine: Machine) -> list[Finding]:
    """``check_recipe`` and ``check_head`` for each kind of head that the recipe asks for; what
    holds for all is said once."""
    findings: list[Finding] = []
    with _fault(findings, "recipe", _CORRECT):
        for own, run in each_kind(recipe, runs).values():
            found = check_recipe(own, run, machine) + check_head(run, own)
            findings += [finding for finding in found if finding not in findings]
    return findings


def check_recipe(recipe: Recipe, run: RunDir, machine: Machine) -> list[Finding]:
    """Target, prompts, drafts a step, fit into memory, and disk against the bytes of the states.
    Each is looked at as far as it can be without those that are wrong."""
    findings: list[Finding] = []
    target: Target | None = None
    template: Template | None = None
    chats: Chats | None = None
    max_len: int | None = None
    fix = "target.path names a whole transformers checkpoint: a folder, or a hub id"
    with _fault(findings, "target", fix):
        target = recipe_target(recipe)
        findings.append(_about(target))
    if target is not None:
        fix = "target.chat_template names a Jinja file; null is the target's own template"
        with _fault(findings, "chat template", fix):
            template = recipe_template(recipe, target)
        with _fault(findings, "recipe", _CORRECT):
            check_size(recipe.vocab.size, target.vocab_size)
        with _fault(findings, "recipe", _CORRECT):
            # A vocabulary that is too large is said already.
            size = min(recipe.vocab.size, target.vocab_size)
            vocab = recipe.vocab.model_copy(update={"size": size})
            check_shape(recipe.model_copy(update={"vocab": vocab}), run)
            findings += _trained_steps(recipe)
        with _fault(findings, "recipe", _CORRECT):
            max_len = longest_sequence(recipe, target)
        findings += _served_otherwise(recipe, target) + _requests(recipe, target, machine)
        findings += _memory(recipe, target, machine)
    with _fault(findings, "prompts", _CORRECT):
        chats = conversations(recipe, template)
        findings += _sources(chats.sources, "prompts")
    with _fault(findings, "bench.sources", _CORRECT):
        for source in recipe.bench.sources or []:
            if source.path:
                check_file(source.path)
        if recipe.bench.sources and target is not None and template is not None:
            findings += _sources(own_prompts(recipe, target, template)[1], "bench.sources")
    findings += _writable(run)
    if chats is not None and template is not None and target is not None and max_len is not None:
        with _fault(findings, "prompts", _TOO_LONG):
            check_room(chats, template, max_len)
            findings += _room(chats, template, max_len)
        findings += _template(template, [chat for chat, _ in chats.all()])
        if target.config.model_type == "gpt_oss":
            findings += _harmony(template, [chat for chat, _ in chats.all()])
        guess = estimate(chats, template, recipe.generate.max_new_tokens, max_len)
        findings += _enough_steps(recipe, guess)
        with _fault(findings, "recipe", _CORRECT):
            bytes_per_token = store_meta(recipe, target).bytes_per_token
            findings.append(_disk(recipe, run, guess, bytes_per_token))
    return findings


def _about(target: Target) -> Finding:
    kinds = ", ".join(f"{target.layer_types.count(k)} {k}" for k in sorted({*target.layer_types}))
    part = ", in a multimodal checkpoint" if target.multimodal else ""
    return Finding("target", "ok", f"{target.path}: {kinds}{part}")


def _served_otherwise(recipe: Recipe, target: Target) -> list[Finding]:
    """What vLLM would do with this target that its user may not expect."""
    findings = []
    if (
        any(target.path.glob("consolidated*.safetensors"))
        and "load_format" not in recipe.engine.extra
    ):
        words = (
            "vLLM takes the copy in Mistral's own format, with a chat template of its own; "
            "drafthead reads and trains on the other"
        )
        fix = "engine.extra: {config_format: hf, load_format: hf, tokenizer_mode: hf}"
        findings.append(Finding("format", "warning", words, fix))
    if refused := refused_sampling(target, recipe.engine.extra):
        defaults = ", ".join(f"{name} {value}" for name, value in refused.items())
        words = (
            f"the target's generation_config.json makes {defaults} the default of every request, "
            "and vLLM refuses requests with it while a head drafts"
        )
        fix = (
            "drafthead serve turns it off; who serves the head by another command does it with "
            "--override-generation-config"
        )
        findings.append(Finding("sampling", "warning", words, fix))
    return findings


def _requests(recipe: Recipe, target: Target, machine: Machine) -> list[Finding]:
    """What a server adds to requests, held against what bench measures; and adapters beside a
    head."""
    findings = []
    extra = recipe.engine.extra
    defaults = request_defaults(target, extra)
    # vLLM samples at temperature 1 where neither request nor generation_config.json names another.
    heat = 1.0 if defaults.get("temperature") is None else float(defaults["temperature"])
    added = {
        name: defaults[name]
        for name, neutral in _ADDED.items()
        if defaults.get(name) not in (None, neutral)
    }
    words = f"requests that name no temperature are sampled at {heat:g}"
    if added:
        words += ", with " + ", ".join(f"{name} {value:g}" for name, value in added.items())
    first = recipe.bench.temperature[0]
    if heat and not first:
        words += "; bench's first temperature is 0, where more drafts are kept"
    if defaults.get("temperature") and not first:
        fix = f"bench.temperature: [{heat:g}, 0], unless your users send temperature 0"
        findings.append(Finding("sampling", "warning", words, fix))
    else:
        findings.append(Finding("sampling", "ok", words))
    if extra.get("enable_lora") or extra.get("lora_modules"):
        words = (
            "the head drafts for the target without adapters: answers of an adapter stay its own, "
            "but few drafts are kept"
        )
        fix = (
            "a head of its own, trained on the adapter's answers: merge it into the target, and "
            "`drafthead train --from HEAD`"
        )
        state = "warning"
        if machine.vllm_device == "cpu":
            state = "fault"
            words = (
                "vLLM's CPU engine ends at an adapter's first request while a head drafts: the "
                "head shares the target's embedding, which expects the target's batch"
            )
        findings.append(Finding("adapters", state, words, fix))
    return findings


def _memory(recipe: Recipe, target: Target, machine: Machine) -> list[Finding]:
    """Whether the target fits into memory, and for bench twice."""
    findings: list[Finding] = []
    fix = "change serve.tensor_parallel_size, or serve a smaller or quantized target"
    with _fault(findings, "memory", fix):
        engine = engine_plan(recipe, head=None, target=target, machine=machine)
        if engines_that_fit(engine, target, machine) == 1 and not recipe.bench.engines_at_once:
            findings.append(_one_engine(engine, machine, candidates(recipe)))
    return findings


def _template(template: Template, chats: list[Chat]) -> list[Finding]:
    """What the chat template does that its user may not know of."""
    findings = []
    for opening in [chat.opening for chat in chats if chat.system][:1]:
        system, *said = opening
        other = [{**system, "content": "Other words."}, *said]
        if template.render(opening, prompt=True) == template.render(other, prompt=True):
            words = "it drops system messages, as it does in vLLM's server"
            fix = "if they matter, name another one under target.chat_template"
            findings.append(Finding("chat template", "warning", words, fix))
    if template.changes_within(timedelta(days=1, minutes=1), chats[0].opening):
        words = "it prints the date or time: all prompts of a run have those at which it began"
        findings.append(Finding("chat template", "ok", words))
    return findings


def _harmony(template: Template, chats: list[Chat]) -> list[Finding]:
    """Where a template and vLLM's chat server part, which writes prompts of GPT-OSS by Harmony
    (`OnlineRenderer._make_request_with_harmony` in `vllm/renderers/online_renderer.py` of 0.32)."""
    words = "vLLM's chat server writes prompts of GPT-OSS by itself and reads no template"
    findings = []
    if template.arguments:
        found = f"{words}: target.chat_template_kwargs is no default there"
        fix = "let each request say it (reasoning_effort), or leave it out"
        findings.append(Finding("chat template", "warning", found, fix))
    for chat in [chat for chat in chats if chat.system][:1]:
        if f"{chat.system}\n\n<|end|>" in template.render(chat.opening, prompt=True):
            found = f"{words}: it ends a system message without the template's two line breaks"
            fix = "name a copy of the template without them under target.chat_template"
            findings.append(Finding("chat template", "warning", found, fix))
    return findings


def _room(chats: Chats, template: Template, max_len: int) -> list[Finding]:
    """Whether prompts leave room for an answer: some of all, and those held out."""
    findings = []
    groups = {"prompts looked at": [c for c, _ in chats.all()], "held-out prompts": chats.heldout}
    for name, group in groups.items():
        lengths = opening_lengths(group, template)
        if full := sum(length >= max_len for length in lengths):
            words = (
                f"{full} of {len(lengths)} {name} leave no room for an answer in {max_len} tokens"
            )
            findings.append(Finding("prompts", "warning", words, _TOO_LONG))
    return findings


def _enough_steps(recipe: Recipe, guess: Estimate) -> list[Finding]:
    """Whether the conversations come to the steps that a head takes to learn (docs/heads.md)."""
    train = recipe.train
    share = 1 - recipe.prompts.heldout / guess.conversations
    tokens = train.epochs * share * guess.expected
    steps = int(tokens / (train.row_tokens * (train.rows_per_step or 1)))
    if steps >= _FEW_STEPS:
        return []
    words = f"about {steps:,} steps of {train.row_tokens:,} tokens; heads have taken hundreds"
    return [Finding("training", "warning", words, "lower train.row_tokens, or add prompts")]


def _writable(run: RunDir) -> list[Finding]:
    folder = _existing(run)
    if folder.is_dir() and os.access(folder, os.W_OK):
        return []
    fix = "choose a folder that you may write with --runs"
    return [Finding("disk", "fault", f"{folder} cannot be written to", fix)]


def _existing(run: RunDir) -> Path:
    """The run's folder, or the next one above it that is there."""
    folder = run.root
    while not folder.exists():
        folder = folder.parent
    return folder


def _disk(recipe: Recipe, run: RunDir, guess: Estimate, bytes_per_token: int) -> Finding:
    """Room for the states. How long answers will be is not known, so only prompts that do not fit
    are a fault."""
    online = recipe.capture.mode == "online"
    least, expected, most = (
        0 if online else tokens * bytes_per_token
        for tokens in (guess.prompts, guess.expected, guess.most)
    )
    stored = sum(f.stat().st_size for f in run.states.rglob("*") if f.is_file())
    # States may be a link to another disk.
    free = shutil.disk_usage(run.states if run.states.exists() else _existing(run)).free
    words = (
        f"states take about {expected / 1e9:.1f} GB, at most {most / 1e9:.1f} GB "
        f"({guess.conversations:,} conversations, about {guess.expected:,} tokens with answers "
        f"half as long as they may be, at most {guess.most:,}; {bytes_per_token:,} bytes a token"
        + (f"; {stored / 1e9:.1f} GB are there" if stored else "")
        + f"), {free / 1e9:.1f} GB free"
    )
    if most - stored <= free:
        return Finding("disk", "ok", words)
    fix = (
        "capture.format: fp8-aux takes five eighths of bf16's, fp8 half; or fewer prompts, "
        "shorter answers, another disk"
    )
    return Finding("disk", "fault" if least - stored > free else "warning", words, fix)


def _sources(sources: list[SourceCounts], key: str) -> list[Finding]:
    """What each source of prompts gave, and what was left out of it."""
    findings = []
    for source in sources:
        words = f"{source.place}: {source.conversations:,} conversations"
        findings.append(Finding(key, "ok" if source.conversations else "warning", words))
        findings += [Finding(key, "warning", note, _LEFT_OUT) for note in source.notes()]
    return findings


def _trained_steps(recipe: Recipe) -> list[Finding]:
    """Whether the head is trained for as many drafts as the recipe serves, or as help."""
    recipe, k = as_started(recipe), max(recipe.serve.candidates)
    if recipe.head.only_kind != "eagle3":
        return []
    enough = recipe.head.norm_output and recipe.ttt_steps >= ENOUGH_STEPS
    if enough or k <= recipe.ttt_steps:
        return []
    words = f"up to {k} drafts a step, and a head trained for {recipe.ttt_steps}: the rest are poor"
    mend = "raise train.ttt_steps (8 at most), or lower serve.num_speculative_tokens"
    return [Finding("drafts", "warning", words, mend)]


def _one_engine(engine: Plan, machine: Machine, ks: list[int]) -> Finding:
    """That bench, which compares two engines, has memory for one."""
    # Twice the target alone and each k; where a k is chosen, twice more the target and that k.
    starts = 2 * (1 + len(ks)) + (4 if len(ks) > 1 else 0)
    gpus = engine.args.get("tensor_parallel_size", 1)
    words = (
        "memory holds one engine of the target, and bench compares two: they are timed one after "
        f"the other (A B A B), with {starts} engine starts"
    )
    mend = "this works, only slower and less surely"
    if len(machine.gpus) >= 2 * gpus:
        mend += f"; with serve.tensor_parallel_size: {2 * gpus} both fit, and are served so"
    return Finding("bench", "warning", words, mend)


def check_head(run: RunDir, recipe: Recipe) -> list[Finding]:
    """The run's head against the recipe's target, if it is exported."""
    if not (run.head / "config.json").exists():
        return []
    try:
        target = recipe_target(recipe)
    except DraftheadError:
        return []
    about = inspect_head(run.head, target, length=recipe.engine.max_model_len)
    name, kind = str(run.head.absolute()).lower(), drafter_of(run.head).kind
    guess = next((method for part, method in _GUESSED if part in name), kind)
    about["notes"] += [
        f"without its `method` vLLM would take it for {guess} from the path: who serves it by "
        f'another command than drafthead serve names "method": "{kind}"'
    ] * (guess != kind)
    words = ["drafthead", "inspect", str(run.head), "--target", recipe.target.path]
    look = shlex.join(words)
    return [
        *(
            Finding("head", "fault", p, "train it again: drafthead run RECIPE --from train")
            for p in about["problems"]
        ),
        *(Finding("head", "warning", f"unsupported: {x}", look) for x in about["unsupported"]),
        *(Finding("head", "warning", note, look) for note in about["notes"]),
    ] or [Finding("head", "ok", f"{run.head} fits the target")]
