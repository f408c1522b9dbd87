"""A DSpark head on disk: `config.json` and bf16 `model.safetensors`, whole or not at all."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from drafthead.drafters.dspark.config import DSparkConfig
from drafthead.drafters.dspark.formats import Format, read_config, write_config
from drafthead.drafters.dspark.model import DSparkHead
from drafthead.errors import DraftheadError
from drafthead.fsio import atomic_dir, read_json, write_json
from drafthead.targets.safetensors_folder import SafetensorsFolder

CONFIDENCE = "confidence_head.proj.weight"
IGNORED = ("verifier_norm.", "verifier_lm_head.", "t2d", "mask_embedding")


@dataclass(frozen=True)
class LoadedHead:
    """A head read from disk, in the type it was stored in."""

    head: DSparkHead
    embedding: Tensor | None
    """The head's own embedding [V, H] if it brings one; None: it reads the target's."""
    about: dict[str, Any] | None
    """What drafthead wrote of where the head comes from."""


def save_head(
    head: DSparkHead,
    folder: Path,
    about: dict[str, Any],
    *,
    format: Format = "vllm",
    verifier: dict[str, Any] | None = None,
    embedding: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write `folder` (replaced whole). embedding [V, H]: only if the head has its own."""
    config = head.config
    tensors = {name: p.detach() for name, p in head.named_parameters()}
    if config.draft_vocab_size < config.vocab_size:
        tensors["d2t"] = head.d2t
    if format == "speculators":
        drafted = torch.zeros(config.vocab_size, dtype=torch.bool)
        drafted[head.target_ids().cpu()] = True
        tensors["t2d"] = drafted
    if embedding is not None:
        tensors["embed_tokens.weight"] = embedding
    stored = {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in tensors.items()
    }
    raw = write_config(config, format, about, verifier or {})
    with atomic_dir(folder) as temporary:
        save_file(stored, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", raw | {"dtype": str(dtype).removeprefix("torch.")})


def load_head(folder: Path | str) -> LoadedHead:
    """Read a head of either format.

    Raises:
        DraftheadError: all that is wrong with it.
    """
    folder = Path(folder)
    raw: Any = read_json(folder / "config.json", "a head's configuration")
    config = read_config(raw, str(folder / "config.json"))
    files = SafetensorsFolder(folder)
    names = {
        name: stored
        for stored in files.where
        if not (name := vllm_name(stored)).startswith(IGNORED) and "rotary_emb" not in stored
    }
    full, proj = config.draft_vocab_size == config.vocab_size, names.get(CONFIDENCE)
    changes = {
        "own_lm_head": not full or "lm_head.weight" in names,
        "confidence_head": config.confidence_head and proj is not None,
    }
    if proj is not None and not any(
        "confidence_head_with_markov" in (place or {})
        for place in (raw, raw.get("dflash_config"), raw.get("dspark_config"))
    ):  # Liquid and ModelOpt leave it to the shape
        width = files.shape(proj)[1][-1]
        changes["confidence_with_markov"] = width == config.hidden_size + config.markov_rank
    config = config.model_copy(update=changes)
    with torch.device("meta"):
        head = DSparkHead(config)
    expected = {name: tuple(p.shape) for name, p in head.named_parameters()}
    optional = {
        "d2t": (config.draft_vocab_size,),
        "embed_tokens.weight": (config.vocab_size, config.hidden_size),
    }

    def read(name: str) -> Tensor:
        try:
            return files.tensor(names[name])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise DraftheadError(f"{files.where[names[name]]}: {error}") from error

    tensors = {name: read(name) for name in names}
    problems = _problems(tensors, expected, optional, full)
    if problems:
        raise DraftheadError("\n".join(f"{folder}: {problem}" for problem in problems))
    head.reset_buffers()
    head.load_state_dict({n: tensors[n] for n in expected}, strict=False, assign=True)
    if "d2t" in tensors:
        head.d2t.copy_(_offsets(tensors["d2t"], config, folder))
    head.to(tensors["fc.weight"].dtype)
    about = raw.get("drafthead")
    own = tensors.get("embed_tokens.weight")
    return LoadedHead(head, own, about if isinstance(about, dict) else None)


def vllm_name(stored: str) -> str:
    """vLLM's name of a tensor: without transformers' prefix, in place of ModelOpt's."""
    name = stored.removeprefix("model.")
    renamed = (("markov_w", "markov_head.markov_w"), ("confidence_proj.", "confidence_head.proj."))
    for theirs, ours in renamed:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _problems(
    tensors: dict[str, Tensor],
    expected: dict[str, tuple[int, ...]],
    optional: dict[str, tuple[int, ...]],
    full: bool,
) -> list[str]:
    """What does not fit, in names, shapes and values."""
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    if not full and "d2t" not in tensors:
        problems.append("d2t is missing: drafts of a reduced vocabulary could not be mapped")
    shapes = {**expected, **optional}
    for name, tensor in tensors.items():
        if name not in shapes:
            problems.append(f"{name} {list(tensor.shape)} is not part of such a head")
        elif tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name} is {list(tensor.shape)}, must be {list(shapes[name])}")
        elif tensor.is_floating_point() and not tensor.isfinite().all():
            problems.append(f"{name} has values that are not finite")
    return problems


def _offsets(d2t: Tensor, config: DSparkConfig, folder: Path) -> Tensor:
    """d2t [Vd] as int64, checked to lead to ascending target ids."""
    offsets = d2t.long()
    ids = torch.arange(len(offsets)) + offsets
    if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size or bool((ids.diff() <= 0).any()):
        raise DraftheadError(
            f"{folder}: d2t must hold offsets (target id - draft id) to ascending target ids below "
            f"{config.vocab_size}",
            field="d2t",
        )
    return offsets


_FILLER = re.compile(r"\[PAD\d+\]|<unused_?\d+>|<\|(reserved|unused|dummy|extra)\w*\|>")
"""Tokens that stand in a vocabulary for none, as llama.cpp's converter, Gemma, Llama 3 and others
name them; a tokenizer read from GGUF need not call them special."""


def mask_token(tokenizer: Any, vocab_size: int, used: Callable[[int], bool]) -> int:
    """A row of the target's embedding that no text has: the highest behind the tokenizer's last
    token, else the highest that only fills the vocabulary up, else a special token that `used` says
    is in no prompt, answer or template.

    Raises:
        DraftheadError: there is none.
    """
    if len(tokenizer) < vocab_size:
        return vocab_size - 1
    texts = tokenizer.convert_ids_to_tokens(range(vocab_size))
    fillers = [token for token, text in enumerate(texts) if _FILLER.fullmatch(str(text))]
    if fillers:
        return fillers[-1]
    special = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    kept = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
    for token in sorted(special, reverse=True):
        if token not in kept and token < vocab_size and not used(token):
            return token
    raise DraftheadError(
        "the target has no token that its texts do not use; name one as head.mask_token",
        field="head.mask_token",
    )
