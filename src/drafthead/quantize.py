"""An NVFP4 checkpoint of a target, made with NVIDIA ModelOpt and calibrated on your prompts.

Weights and inputs of the linear layers become four-bit floats (W4A4): blocks of 16 with an E4M3
scale, one fp32 scale a tensor, the inputs' fp32 scale calibrated. Routers, short convolutions,
embedding and LM head stay as they are: they are small or they hurt most.

Calibration needs text as the target meets it when it decodes, so the target answers the prompts
first. Perplexity is that of held-out answers, written the same way by the dense target.
"""

import contextlib
import copy
import importlib.util
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from drafthead.data.chats import Chat, load_chats
from drafthead.data.template import Template
from drafthead.errors import DraftheadError
from drafthead.fsio import atomic_dir, fingerprint, read_json, write_json
from drafthead.machine import install_command
from drafthead.progress import waiting
from drafthead.recipe import PromptsSection, Source, load_recipe
from drafthead.targets import Target, load_target, nvfp4

EXCLUDE = ("lm_head", "embed_tokens", "conv", "gate", "router")
"""Modules left in floating point, by a component of their name."""
RECORD = "drafthead_quantize.json"
_WEIGHTS = {"safetensors", "bin", "pt", "pth", "gguf", "h5", "msgpack", "onnx"}  # in a file's name
TEMPERATURE = 0.7
"""Of the answers: varied, and still what the target says when it is served."""
BATCH = 16
"""Answers written at a time."""


def chats_of(
    target_path: Path | str,
    prompts: Path,
    samples: int,
    heldout: int,
    *,
    trust_remote_code: bool = False,
) -> tuple[list[Chat], list[Chat]]:
    """Conversations to calibrate on and held out, from a recipe or a prompts file.

    A recipe's own split is kept: nothing it holds out is calibrated on. Taken in an order that
    follows from their text, so of every source and of all of a sorted file.

    Raises:
        DraftheadError: neither a recipe nor prompts, or too few of them.
    """
    if prompts.suffix in (".yaml", ".yml"):
        section = load_recipe(prompts).prompts
    else:
        section = PromptsSection(sources=[Source(path=str(prompts))], heldout=heldout)
    target = load_target(target_path, trust_remote_code=trust_remote_code)
    template = Template(
        target.tokenizer(), target.eos_token_ids, str(target.path), text=target.chat_template
    )
    chats = load_chats(section, template)
    train, held = (sorted(side, key=lambda chat: chat.id) for side in (chats.train, chats.heldout))
    return train[:samples], held[:heldout]


def quantize(
    target_path: Path | str,
    out: Path,
    calibration: Sequence[Chat],
    heldout: Sequence[Chat],
    *,
    exclude: Sequence[str] = EXCLUDE,
    max_new_tokens: int = 128,
    seed: int = 0,
    trust_remote_code: bool = False,
    console: Console | None = None,
) -> dict:
    """Write the NVFP4 checkpoint of `target_path` to `out`; a finished one is left as it is.

    Args:
        target_path: a dense Llama or LFM2-MoE checkpoint (others that ModelOpt knows may do).
        out: the new folder: weights, `hf_quant_config.json`, `quantization_config` in
            `config.json`, tokenizer and everything else that lay in the target's folder.
        calibration, heldout: conversations; the first turn of each is asked.
        exclude: name components of the modules to leave unquantized.
        max_new_tokens: longest answer.
        trust_remote_code: run Python code that comes with the target.
        console: where people see how far it is, and the result.

    Returns:
        `perplexity` and `perplexity_w4a4` (as Blackwell's kernels run it) and
        `perplexity_w4a16` (weights alone: Marlin on Hopper, and the CPU), `same_argmax` of
        W4A4, the answer tokens they were measured over, `bytes` before and after.

    Raises:
        DraftheadError: ModelOpt missing, target quantized already or multimodal, or nothing to
            calibrate on.
    """
    if importlib.util.find_spec("modelopt") is None:
        raise DraftheadError(
            "package nvidia-modelopt is not installed: it does the quantizing. "
            f"Install it: {install_command('quantize')}"
        )
    console = console or Console(quiet=True)
    target = load_target(target_path, trust_remote_code=trust_remote_code)
    if target.quantization is not None:
        raise DraftheadError(
            f"{target.path}: quantized already; quantize the dense checkpoint",
            field="quantization_config",
        )
    if target.multimodal:
        raise DraftheadError(
            f"{target.path}: a multimodal checkpoint; drafthead quantizes text models that stand "
            "alone. Take a quantized checkpoint of its maker, or quantize it with ModelOpt itself",
            field="text_config",
        )
    if not calibration or not heldout:
        raise DraftheadError(
            "quantize: needs prompts to calibrate on and some held out", field="prompts"
        )
    made_of = fingerprint(
        {
            "target": target.fingerprint,
            "chats": [[chat.id for chat in side] for side in (calibration, heldout)],
            "settings": [list(exclude), max_new_tokens, seed],
        }
    )
    if (out / RECORD).is_file():
        record = read_json(out / RECORD, "what a quantized target was made of")
        if record.get("made_of") == made_of:
            _show(record, console)
            return record
        raise DraftheadError(
            f"{out}: holds a checkpoint made with other inputs; remove it or name another folder"
        )
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise DraftheadError(f"{out}: exists already and would be replaced; name a new folder")
    record = _quantize(
        target, out, calibration, heldout, exclude, max_new_tokens, seed, made_of, console
    )
    _show(record, console)
    return record


def _quantize(
    target: Target,
    out: Path,
    calibration: Sequence[Chat],
    heldout: Sequence[Chat],
    exclude: Sequence[str],
    max_new_tokens: int,
    seed: int,
    made_of: str,
    console: Console,
) -> dict:
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        target.path, dtype="auto", trust_remote_code=target.trust_remote_code
    )
    model.to(device).eval()
    template = Template(
        target.tokenizer(), target.eos_token_ids, str(target.path), text=target.chat_template
    )
    torch.manual_seed(seed)
    total = len(calibration) + len(heldout)
    with waiting(console, "the target answers the prompts", total, unit="answers") as work:
        texts, held = (
            _answered(model, template, side, max_new_tokens, work.advance)
            for side in (calibration, heldout)
        )

    def perplexity(of_what: str) -> tuple[float, torch.Tensor]:
        with waiting(console, f"perplexity {of_what}", len(held), unit="answers") as work:
            return _perplexity(model, work.each(held))

    before, argmax = perplexity("of the dense target")
    with _quiet():
        import modelopt
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
        from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

        config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
        config["quant_cfg"] += [
            {"quantizer_name": pattern, "enable": False}
            for name in exclude
            for pattern in (f"{name}.*", f"*.{name}.*")
        ]

        @torch.no_grad()
        def calibrate(model: torch.nn.Module) -> None:
            with waiting(console, "calibrating", len(texts), unit="answers") as work:
                for ids, _ in work.each(texts):
                    model(ids[None])

        model = mtq.quantize(model, config, calibrate)
        # the export gives q/k/v and gate/up one scale; done now, so that it is what is measured
        requantize_resmooth_fused_llm_layers(model)
        with _simulated(), mtq.temporarily_fold_weights(model):
            w4a4, argmax_w4a4 = perplexity("in NVFP4 (W4A4)")
            inputs = [m for n, m in model.named_modules() if n.endswith("input_quantizer")]
            inputs = [quantizer for quantizer in inputs if quantizer.is_enabled]
            for quantizer in inputs:
                quantizer.disable()
            w4a16, _ = perplexity("with NVFP4 weights (W4A16)")
            for quantizer in inputs:
                quantizer.enable()  # their scales are exported
        with waiting(console, "writing the checkpoint"), atomic_dir(out) as fresh:
            export_hf_checkpoint(model, export_dir=fresh)
            for file in _beside_weights(target.path):
                if not (fresh / file.name).exists():
                    shutil.copy(file, fresh / file.name)
            record = {
                "target": target.path.name,  # the folder may be published: no path of this machine
                "format": "nvfp4",
                "modelopt": modelopt.__version__,
                "exclude_modules": read_json(
                    fresh / "hf_quant_config.json", "ModelOpt's quantization"
                )["quantization"]["exclude_modules"],
                "calibration_tokens": sum(len(ids) for ids, _ in texts),
                "heldout_tokens": sum(len(ids) - start for ids, start in held),
                "perplexity": before,
                "perplexity_w4a4": w4a4,
                "perplexity_w4a16": w4a16,
                "same_argmax": (argmax == argmax_w4a4).float().mean().item(),
                "bytes_before": sum(file.stat().st_size for file in target.tensors.files),
                "bytes": sum(file.stat().st_size for file in fresh.glob("*.safetensors")),
                "made_of": made_of,
            }
            write_json(fresh / RECORD, record)
    return record


def _beside_weights(folder: Path) -> list[Path]:
    """A checkpoint's files but for its weights, in whatever formats they lie there."""
    return [
        file
        for file in folder.iterdir()
        if file.is_file() and not _WEIGHTS & set(file.name.lower().split("."))
    ]


@torch.no_grad()
def _answered(
    model: Any,
    template: Template,
    chats: Sequence[Chat],
    max_new_tokens: int,
    on_answers: Callable[[int], None] = lambda _: None,
) -> list[tuple[torch.Tensor, int]]:
    """For each chat, ids [T] of its first turn with the target's answer, and where that starts.
    ``on_answers`` is called with how many answers a batch brought."""
    prompts = []
    for chat in chats:
        ids, _ = template.encode(chat.opening)
        prompts.append(ids[-(model.config.max_position_embeddings - max_new_tokens) :])
    answered = []
    for first in range(0, len(prompts), BATCH):
        batch = prompts[first : first + BATCH]
        width = max(map(len, batch))
        # padded on the left, so that every answer starts in the same column
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        out = model.generate(
            ids,
            attention_mask=mask.to(model.device),
            do_sample=True,
            temperature=TEMPERATURE,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(template.eos),
            pad_token_id=min(template.eos),
        )
        for prompt, row in zip(batch, out, strict=True):
            answer = row[width:].tolist()
            ends = [i for i, token in enumerate(answer) if token in template.eos]
            answer = answer[: ends[0] + 1] if ends else answer
            answered.append((torch.tensor(prompt + answer, device=model.device), len(prompt)))
        on_answers(len(batch))
    return answered


@torch.no_grad()
def _perplexity(
    model: Any, texts: Iterable[tuple[torch.Tensor, int]]
) -> tuple[float, torch.Tensor]:
    """exp of the mean negative log-likelihood of the answers' tokens, and the model's most likely
    token at each of them."""
    loss, tokens, argmax = 0.0, 0, []
    for ids, start in texts:
        logits = model(ids[None]).logits[0, start - 1 : -1].float()
        loss += torch.nn.functional.cross_entropy(logits, ids[start:], reduction="sum").item()
        tokens += len(ids) - start
        argmax.append(logits.argmax(-1))
    return math.exp(loss / tokens), torch.cat(argmax)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints what it does to stdout, which is kept for results."""
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _simulated() -> Iterator[None]:
    """ModelOpt simulates NVFP4 with a CUDA kernel; here it takes the format's definition instead,
    on any device."""
    from modelopt.torch.quantization import tensor_quant

    def simulate(values: torch.Tensor, block: int, amax: torch.Tensor, *_: int) -> torch.Tensor:
        scale_2 = amax.float().amax() / (nvfp4.E2M1_MAX * nvfp4.E4M3_MAX)
        packed, scale = nvfp4.pack(values, scale_2)
        return nvfp4.dequantize(packed, scale, scale_2).to(values.dtype)

    stock = tensor_quant.dynamic_block_quantize_op
    tensor_quant.dynamic_block_quantize_op = simulate
    try:
        yield
    finally:
        tensor_quant.dynamic_block_quantize_op = stock


def _show(record: dict, console: Console) -> None:
    console.print(
        f"perplexity over {record['heldout_tokens']} held-out answer tokens: "
        f"{record['perplexity']:.3f} before, {record['perplexity_w4a4']:.3f} in NVFP4 (W4A4), "
        f"{record['perplexity_w4a16']:.3f} with its weights alone (W4A16: Hopper, CPU); "
        f"same most likely token at {record['same_argmax']:.1%}; "
        f"{record['bytes_before'] / 1e6:.1f} MB before, {record['bytes'] / 1e6:.1f} MB after"
    )
