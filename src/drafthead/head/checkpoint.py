"""A head on disk: `config.json` and bf16 `model.safetensors`, in two formats, whole or not at all.

Reading is tolerant in names (`midlayer.`, `model.`) and strict in everything that would make a
head draft nonsense without a word: shapes, the draft vocabulary, missing tensors.
"""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from drafthead.errors import DraftheadError
from drafthead.fsio import atomic_dir, read_json, write_json
from drafthead.head.config import HeadConfig
from drafthead.head.formats import Format, Provenance, ReadConfig, read_config, write_config
from drafthead.head.model import Eagle3Head, check_d2t
from drafthead.recipe import Recipe, with_options
from drafthead.targets import Target
from drafthead.targets.safetensors_folder import SafetensorsFolder

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
IGNORED = ("verifier_norm.", "verifier_lm_head.", "rotary_emb.")  # leftovers of trainers


@dataclass(frozen=True)
class LoadedHead:
    """A head read from disk, in the type it was stored in."""

    head: Eagle3Head
    embedding: Tensor | None
    """The head's own embedding [V, H] if it brings one; None: it reads the target's."""
    read: ReadConfig


def save_head(
    head: Eagle3Head,
    folder: Path,
    provenance: Provenance,
    *,
    format: Format = "vllm",
    speculative_tokens: int = 3,
    embedding: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write `folder` (replaced whole). embedding [V, H]: only if the head has its own."""
    tensors = {name: p.detach().to("cpu", dtype) for name, p in head.named_parameters()}
    if head.config.draft_vocab_size < head.config.vocab_size:  # else vLLM refuses d2t
        tensors |= {"d2t": head.d2t.cpu(), "t2d": head.t2d.cpu()}
    if embedding is not None:
        tensors["embed_tokens.weight"] = embedding.detach().to("cpu", dtype)
    config = write_config(head.config, format, provenance, speculative_tokens)
    config["dtype"] = str(dtype).removeprefix("torch.")
    with atomic_dir(folder) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, temporary / "model.safetensors", metadata={"format": "pt"})
        write_json(temporary / "config.json", config)


def expected_shapes(config: HeadConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor that a head of this configuration must have (vLLM's names)."""
    h, i, d = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    aux = config.num_aux_hidden_states
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (h, aux * config.target_hidden_size),
        "norm.weight": (h,),
        "lm_head.weight": (config.draft_vocab_size, h),
    }
    if config.norm_before_fc:
        shapes["input_norm.weight"] = (aux * config.target_hidden_size,)
    if config.fc_norm:
        shapes |= {f"fc_norm.{a}.weight": (config.target_hidden_size,) for a in range(aux)}
    for layer in range(config.num_hidden_layers):
        at, width = f"layers.{layer}.", 2 * h if layer == 0 else h
        shapes |= {
            at + "self_attn.q_proj.weight": (q, width),
            at + "self_attn.k_proj.weight": (kv, width),
            at + "self_attn.v_proj.weight": (kv, width),
            at + "self_attn.o_proj.weight": (h, q),
            at + "mlp.gate_proj.weight": (i, h),
            at + "mlp.up_proj.weight": (i, h),
            at + "mlp.down_proj.weight": (h, i),
            at + "input_layernorm.weight": (h,),
            at + "post_attention_layernorm.weight": (h,),
        }
        if layer == 0:
            shapes[at + "hidden_norm.weight"] = (h,)
        if config.attention_bias:
            shapes |= {
                at + f"self_attn.{n}_proj.bias": (s,) for n, s in zip("qkvo", (q, kv, kv, h))
            }
    return shapes


class HeadFiles:
    """The tensors of a head's folder under vLLM's names, looked at before they are read.

    Raises:
        DraftheadError: no safetensors there, a shard missing, truncated or broken.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DraftheadError(f"{folder}: no such head; a head is a folder with config.json")
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        if pickled and not any(folder.glob("*.safetensors")):
            raise DraftheadError(
                f"{pickled[0]}: a pickle, which can run code when it is read; convert it to "
                "safetensors first"
            )
        self.files = SafetensorsFolder(folder)
        self.names: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for stored, file in self.files.where.items():
            name = stored.removeprefix("model.").replace("midlayer.", "layers.0.")
            if name.startswith(IGNORED):
                continue
            if name in self.names:
                raise DraftheadError(f"{folder}: {stored} and {self.names[name]} are the same")
            try:
                with safe_open(file, framework="pt") as opened:
                    view = opened.get_slice(stored)
                    self.shapes[name] = tuple(view.get_shape())
                    self.dtypes[name] = view.get_dtype()
            except (SafetensorError, OSError) as error:
                raise DraftheadError(f"{file}: cannot be read: {error}") from error
            self.names[name] = stored

    def tensor(self, name: str) -> Tensor:
        """One tensor by vLLM's name, as stored."""
        try:
            return self.files.tensor(self.names[name])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise DraftheadError(f"{self.files.where[self.names[name]]}: {error}") from error

    def problems(self, config: HeadConfig) -> list[str]:
        """What does not fit the configuration, in names, shapes and types."""
        expected, found = expected_shapes(config), []
        wanted = {**expected, "d2t": (config.draft_vocab_size,), "t2d": (config.vocab_size,)}
        wanted["embed_tokens.weight"] = (config.vocab_size, config.hidden_size)
        for name in expected:
            if name not in self.shapes:
                found.append(f"{name} is missing")
        for name, shape in self.shapes.items():
            if name not in wanted:
                found.append(f"{name} {list(shape)} is not part of such a head")
            elif shape != wanted[name]:
                found.append(
                    f"{name} is {list(shape)}, must be {list(wanted[name])}{_hint(name, config)}"
                )
            elif name in ("d2t", "t2d"):
                allowed = ("I64", "I32") if name == "d2t" else ("BOOL", "U8", "I64")
                if self.dtypes[name] not in allowed:
                    found.append(f"{name} is {self.dtypes[name]}, must be {allowed[0]}")
            elif self.dtypes[name] not in FLOATS:
                found.append(f"{name} is {self.dtypes[name]}, must be one of {', '.join(FLOATS)}")
        if "d2t" not in self.shapes and config.draft_vocab_size < config.vocab_size:
            found.append(
                f"d2t is missing: vLLM would take zeros without a word and draft only the first "
                f"{config.draft_vocab_size} ids"
            )
        if config.hidden_size != config.target_hidden_size and (
            "embed_tokens.weight" not in self.shapes
        ):
            found.append(
                f"hidden_size {config.hidden_size} is not the target's "
                f"{config.target_hidden_size}, so embed_tokens.weight must come with the head"
            )
        return found

    def d2t(self, config: HeadConfig) -> Tensor:
        """The offsets int64 [Vd], checked; zeros if the head drafts the whole vocabulary."""
        if "d2t" not in self.shapes:
            return torch.zeros(config.draft_vocab_size, dtype=torch.int64)
        d2t = self.tensor("d2t").long()
        check_d2t(d2t, config.draft_vocab_size, config.vocab_size)
        return d2t


def _hint(name: str, config: HeadConfig) -> str:
    return {
        "fc.weight": f" ({config.num_aux_hidden_states} aux layers of width "
        f"{config.target_hidden_size})",
        "lm_head.weight": " (draft_vocab_size rows)",
        "d2t": " (draft_vocab_size)",
        "t2d": " (the target's vocab_size)",
    }.get(name, "")


def read_folder(folder: Path, target: Target | None = None) -> ReadConfig:
    """Read and understand `config.json`; `target` fills in layer ids that it leaves out."""
    path = folder / "config.json"
    raw: Any = read_json(path, "a head's configuration")
    if target is None:
        return read_config(raw, str(path))
    return read_config(raw, str(path), target.default_aux_layers(), target.num_layers)


class _Fed(TypedDict):
    """What of a head's configuration says which of its states the next draft step is fed with."""

    norm_output: NotRequired[bool]


def as_started(recipe: Recipe) -> Recipe:
    """The recipe, with `head.norm_output` as the head has it that training starts from."""
    if start := recipe.train.start_from:
        with contextlib.suppress(DraftheadError):  # what is wrong with it training says
            given = read_json(Path(start) / "config.json", "a head's configuration", _Fed)
            norm_output = given.get("norm_output", False)
            return with_options(recipe, "head", {"norm_output": norm_output})
    return recipe


def trained_steps(recipe: Recipe) -> int:
    """Steps of training-time test of the head that the recipe describes or starts from."""
    return as_started(recipe).ttt_steps


def load_head(folder: Path | str, target: Target | None = None) -> LoadedHead:
    """Read a head of either format.

    Args:
        folder: the head.
        target: the model it is for; needed only if the head does not name its aux layers.

    Raises:
        DraftheadError: all that is wrong with it.
    """
    folder = Path(folder)
    files = HeadFiles(folder)
    read = read_folder(folder, target)
    config = read.config
    if problems := files.problems(config):
        raise DraftheadError("\n".join(f"{folder}: {problem}" for problem in problems))
    try:
        d2t = files.d2t(config)
    except DraftheadError as error:
        raise DraftheadError(f"{folder}: {error}") from None
    with torch.device("meta"):
        head = Eagle3Head(config)
    weights = {name: files.tensor(name) for name in expected_shapes(config)}
    if read.logit_scale != 1.0:
        weights["lm_head.weight"] = weights["lm_head.weight"] * read.logit_scale
    head.reset_buffers()
    head.load_state_dict(weights, strict=False, assign=True)
    head.to(weights["fc.weight"].dtype)
    head.set_vocab(d2t)
    own = files.tensor("embed_tokens.weight") if "embed_tokens.weight" in files.shapes else None
    return LoadedHead(head, own, read)
