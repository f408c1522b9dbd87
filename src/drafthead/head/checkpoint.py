"""A head on disk: `config.json` and bf16 `model.safetensors`, in two formats, whole or not at all.

Reading is tolerant in names (`midlayer.`, a trainer's prefixes) and strict in everything that would
make a head draft nonsense without a word: shapes, the draft vocabulary, missing tensors.
"""

import contextlib
import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import TypedDict

from drafthead.errors import DraftheadError
from drafthead.fsio import atomic_dir, read_json, write_json
from drafthead.head.config import HeadConfig
from drafthead.head.formats import Format, Provenance, ReadConfig, read_config, write_config
from drafthead.head.model import ABSOLUTE, Eagle3Head, check_d2t
from drafthead.recipe import Recipe, with_options
from drafthead.targets import Target
from drafthead.targets.safetensors_folder import SafetensorsFolder

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LM_HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
# Put before every name by DataParallel, torch.compile and transformers.
PREFIXES = ("module.", "_orig_mod.", "model.")
# Leftovers of trainers that vLLM skips, too: rotary buffers, and P-EAGLE's mask.
SKIPPED = (
    *("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rotary_emb.cos_cached"),
    *("rotary_emb.sin_cached", "mask_hidden"),
)
# Leftovers that vLLM stumbles over.
LEFTOVERS = ("verifier_norm.", "verifier_lm_head.")
# Problems of one kind that are told one by one.
MOST = 6


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
        tensors[EMBEDDING] = embedding.detach().to("cpu", dtype)
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
        LM_HEAD: (config.draft_vocab_size, h),
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
        if not any(folder.glob("*.safetensors")):
            _refuse_pickles(folder, [file.name for file in folder.iterdir()])
        self.files = SafetensorsFolder(folder)
        self.names: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.refused: list[str] = []
        """Names in the file that vLLM does not load."""
        for stored, file in self.files.where.items():
            name = stored
            while name.startswith(PREFIXES):
                name = name.partition(".")[2]
            if name.endswith(SKIPPED):
                continue
            if name != stored or name.startswith(LEFTOVERS):
                self.refused.append(stored)
            if name.startswith(LEFTOVERS):
                continue
            name = name.replace("midlayer.", "layers.0.")
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

    def shares_lm_head(self, config: HeadConfig) -> bool:
        """Whether the head leaves its LM head to the target: vLLM then takes the target's."""
        whole = config.draft_vocab_size == config.vocab_size
        return (
            LM_HEAD not in self.shapes
            and whole
            and config.hidden_size == (config.target_hidden_size)
        )

    def problems(self, config: HeadConfig) -> list[str]:
        """What does not fit the configuration, in names, shapes and types."""
        expected = expected_shapes(config)
        allowed = expected | {
            "d2t": (config.draft_vocab_size,),
            "t2d": (config.vocab_size,),
            EMBEDDING: (config.vocab_size, config.hidden_size),
        }
        missing = [name for name in expected if name not in self.shapes]
        if LM_HEAD in missing and self.shares_lm_head(config):
            missing.remove(LM_HEAD)
        unknown = [f"{n} {list(shape)}" for n, shape in self.shapes.items() if n not in allowed]
        problems = []
        if layers := self._layers(config):
            problems.append(layers)
        if missing:
            problems.append(f"missing: {some(missing)}")
        if unknown:
            problems.append(f"not part of such a head: {some(unknown)}")
        wrong = [
            f"{name} is {list(shape)}, must be {list(allowed[name])}{_hint(name, config)}"
            for name, shape in self.shapes.items()
            if name in allowed and shape != allowed[name]
        ]
        problems += wrong[:MOST]
        if len(wrong) > MOST:
            problems.append(f"{len(wrong) - MOST} more tensors have other shapes")
        types = [
            f"{name} {dtype}"
            for name, dtype in self.dtypes.items()
            if name in allowed and name not in ("d2t", "t2d") and dtype not in FLOATS
        ]
        if types:
            problems.append(f"must be one of {', '.join(FLOATS)}: {some(types)}")
        if "d2t" not in self.shapes and config.draft_vocab_size < config.vocab_size:
            problems.append(
                f"d2t is missing: vLLM would take zeros without a word and draft only the first "
                f"{config.draft_vocab_size} ids"
                + (
                    "; d2t = t2d.nonzero().flatten() - torch.arange(n)"
                    if "t2d" in self.shapes
                    else ""
                )
            )
        if config.hidden_size != config.target_hidden_size and EMBEDDING not in self.shapes:
            problems.append(
                f"hidden_size {config.hidden_size} is not the target's "
                f"{config.target_hidden_size}, so {EMBEDDING} must come with the head"
            )
        return problems

    def _layers(self, config: HeadConfig) -> str | None:
        """Whether the file has another number of layers than the configuration."""
        layers = {name.split(".")[1] for name in self.shapes if name.startswith("layers.")}
        if layers == {str(layer) for layer in range(config.num_hidden_layers)}:
            return None
        return (
            f"num_hidden_layers is {config.num_hidden_layers}, there are tensors of "
            f"{len(layers)} layers"
        )

    def refusals(self) -> list[str]:
        """What vLLM would not load, although drafthead reads it."""
        if not self.refused:
            return []
        return [
            f"vLLM refuses these names: {some(self.refused)}. Save the tensors without "
            f"{' '.join(PREFIXES)}, and leave {' '.join(LEFTOVERS)} out: `drafthead convert HEAD "
            "OUT` does"
        ]

    def d2t(self, config: HeadConfig) -> Tensor:
        """The offsets int64 [Vd], checked; zeros if the head drafts the whole vocabulary."""
        if "d2t" not in self.shapes:
            return torch.zeros(config.draft_vocab_size, dtype=torch.int64)
        stored = self.tensor("d2t")
        d2t = stored.long()
        if stored.is_floating_point():
            exact = 2 / torch.finfo(stored.dtype).eps  # whole numbers up to this are
            if not bool(((stored == d2t) & (stored.abs() <= exact)).all()):
                raise DraftheadError(
                    f"d2t is {self.dtypes['d2t']}, which rounds offsets above {exact:.0f}; save it "
                    "as int64 before any other type"
                )
        if len(d2t) > 1 and torch.equal(self.marked(), d2t):
            raise DraftheadError(f"d2t {ABSOLUTE}")
        check_d2t(d2t, config.draft_vocab_size, config.vocab_size)
        return d2t

    def marked(self) -> Tensor:
        """The target ids that `t2d` marks: int64 [Vd], empty without it."""
        if "t2d" not in self.shapes:
            return torch.zeros(0, dtype=torch.int64)
        return self.tensor("t2d").nonzero().flatten()


def _refuse_pickles(folder: Path | str, names: list[str]) -> None:
    """Refuse by name what `torch.load` would read: a pickle can run code."""
    for name in names:
        if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")):
            raise DraftheadError(
                f"{folder}/{name}: a pickle, which can run code when it is read; convert it to "
                "safetensors first"
            )


def some(names: list[str]) -> str:
    """The first of many names."""
    more = len(names) - MOST
    return ", ".join(names[:MOST]) + (f" and {more} more" if more > 0 else "")


def _hint(name: str, config: HeadConfig) -> str:
    return {
        "fc.weight": f" ({config.num_aux_hidden_states} aux layers of width "
        f"{config.target_hidden_size})",
        LM_HEAD: " (draft_vocab_size rows)",
        "d2t": " (draft_vocab_size)",
        "t2d": " (the target's vocab_size)",
    }.get(name, "")


@functools.cache
def head_folder(head: Path | str) -> Path:
    """The folder of a head: a local one as named, or the download of a hub id, OWNER/NAME.

    Raises:
        DraftheadError: the hub does not have it, or only as a pickle.
    """
    folder, name = Path(os.path.expanduser(head)), str(head)
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        return folder
    from huggingface_hub import HfApi, snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["config.json", "*.safetensors*"]))
        names = [] if any(folder.glob("*.safetensors")) else HfApi().list_repo_files(name)
    except Exception as error:  # what the hub's library raises, and the network below it
        raise DraftheadError(
            f"{name}: neither a local folder nor available on the hub ({error})"
        ) from error
    _refuse_pickles(name, names)
    return folder


def read_folder(folder: Path, target: Target | None = None) -> ReadConfig:
    """Read and understand `config.json`; `target` fills in layer ids that it leaves out."""
    path = folder / "config.json"
    return read_config(read_json(path, "a head's configuration"), str(path), target)


class _Fed(TypedDict):
    """What of a head's configuration says which of its states the next draft step is fed with."""

    norm_output: NotRequired[bool]


def as_started(recipe: Recipe) -> Recipe:
    """The recipe, with `head.norm_output` as the head has it that training starts from."""
    start = recipe.train.start_from
    if start and recipe.head.only_kind == "eagle3":
        with contextlib.suppress(DraftheadError):  # what is wrong with it training says
            given = read_json(head_folder(start) / "config.json", "a head's configuration", _Fed)
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
        target: the model it is for; needed if the head does not name its aux layers, or leaves
            its LM head to the target.

    Raises:
        UnsupportedHead: vLLM may serve it, drafthead cannot compute it.
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
    weights = {n: files.tensor(n) for n in expected_shapes(config) if n in files.shapes}
    if LM_HEAD not in weights:
        if target is None:
            raise DraftheadError(
                f"{folder}: {LM_HEAD} is missing: it is the target's; say which target it is for"
            )
        weights[LM_HEAD] = target.lm_head().to(weights["fc.weight"].dtype)
    if read.logit_scale != 1.0:
        weights[LM_HEAD] = weights[LM_HEAD] * read.logit_scale
    head.reset_buffers()
    head.load_state_dict(weights, strict=False, assign=True)
    head.to(weights["fc.weight"].dtype)
    head.set_vocab(d2t)
    embedding = files.tensor(EMBEDDING) if EMBEDDING in files.shapes else None
    return LoadedHead(head, embedding, read)
