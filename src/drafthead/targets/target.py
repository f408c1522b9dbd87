"""One target: its configuration, and the few of its tensors that a head needs."""

import contextlib
import functools
import importlib
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drafthead.errors import DraftheadError
from drafthead.fsio import file_hash, fingerprint, read_json, shortened
from drafthead.recipe import Recipe
from drafthead.targets.logits import LogitRule, logit_rule
from drafthead.targets.safetensors_folder import SafetensorsFolder

# Names of a decoder's embedding and of its final norm, which LFM2 calls `embedding_norm`.
_EMBEDDING = "embed_tokens.weight"
_FINAL_NORM = ("norm.weight", "embedding_norm.weight")
_LM_HEAD = "lm_head.weight"
FETCH = "fetch it again"
_FLOATS = ("BF16", "F16", "F32")
# What decoders' names begin with: alone, and in a multimodal checkpoint (two ways).
_USUAL_DECODERS = ("model.", "model.language_model.", "language_model.model.")
# Fields of a draft head's configuration that no target's has.
_HEAD_FIELDS = ("draft_vocab_size", "speculators_model_type", "eagle_config", "dflash_config")


@dataclass(frozen=True)
class Target:
    """The model to be sped up, as stored on disk."""

    path: Path
    """Folder of the checkpoint."""
    config: Any
    """The text model's transformers configuration."""
    tensors: SafetensorsFolder
    quantization: dict | None
    """The checkpoint's own `quantization_config` (ModelOpt's `hf_quant_config.json` counts)."""
    architectures: tuple[str, ...]
    trust_remote_code: bool = False
    multimodal: bool = False
    """Whether the text model is a part of the checkpoint, beside towers for images or sound."""
    says_tied: bool | None = None
    """Whether config.json says that the LM head is the embedding; None if its parts disagree."""

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def layer_types(self) -> tuple[str, ...]:
        """The kind of each layer; plain transformers name none, all their layers attend."""
        kinds = getattr(self.config, "layer_types", None)
        return tuple(kinds) if kinds else ("full_attention",) * self.num_layers

    @property
    def sliding_window(self) -> int | None:
        """Positions that every layer sees at most; None where some layer sees all. vLLM's attention
        takes it for each layer without a window of its own, a draft head's among them
        (`CacheConfig.sliding_window`)."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds and any(kind != "sliding_attention" for kind in kinds):
            return None
        return getattr(self.config, "sliding_window", None) or None

    @property
    def max_position_embeddings(self) -> int:
        return self.config.max_position_embeddings

    @property
    def rope_types(self) -> set[str]:
        """Kinds of rotary embedding; layers may differ."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        nested = [part for part in parameters.values() if isinstance(part, dict)]
        return {str(part.get("rope_type", "default")) for part in nested or [parameters]}

    @property
    def rope_theta(self) -> float:
        """Base of the rotary embedding, wherever this version of the configuration keeps it."""
        parameters = getattr(self.config, "rope_parameters", None) or {}
        parameters = parameters.get("full_attention", parameters)
        theta = parameters.get("rope_theta", getattr(self.config, "rope_theta", None))
        return float(theta if theta is not None else 10000.0)

    @functools.cached_property
    def logits(self) -> LogitRule:
        """What becomes of the last hidden state besides the LM head's product.

        Raises:
            DraftheadError: something that drafthead's teacher does not do.
        """
        return logit_rule(self.config, f"{self.path}/config.json")

    @property
    def rms_norm_eps(self) -> float:
        fields = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon")
        for field in ("layer_norm_eps",) if self.logits.centered else fields:
            if (eps := getattr(self.config, field, None)) is not None:
                return float(eps)
        raise DraftheadError(f"{self.path}/config.json: no epsilon of a final norm without bias")

    @property
    def num_attention_heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", None) or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return (
            getattr(self.config, "head_dim", None) or self.hidden_size // self.num_attention_heads
        )

    @property
    def tied_embeddings(self) -> bool:
        """Whether the LM head is the embedding: the checkpoint has no separate LM head."""
        return self._lm_head is None

    @property
    def dtype(self) -> torch.dtype:
        """The type that the unquantized weights are stored in."""
        return self.tensors.tensor(self._final_norm).dtype

    @functools.cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the generation configuration's, else the configuration's.

        Raises:
            DraftheadError: not token ids.
        """
        value, source = getattr(self.config, "eos_token_id", None), self.path / "config.json"
        generation = self.path / "generation_config.json"
        if generation.exists():
            fields = read_json(generation, "how a target generates", dict[str, Any], FETCH)
            if "eos_token_id" in fields:
                value, source = fields["eos_token_id"], generation
        ids = [i for i in (value if isinstance(value, list) else [value]) if i is not None]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise DraftheadError(
                f"{source}: `eos_token_id` is {shortened(value)}, must be a token id or a list of "
                f"them; {FETCH}"
            )
        return tuple(ids)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Names the exact checkpoint: from the SHA-256 of its weights, configuration, tokenizer."""
        files = [*self.tensors.files, *self.path.glob("*.json"), *self.path.glob("*.jinja")]
        return fingerprint({file.name: file_hash(file) for file in sorted(set(files))})

    @functools.cached_property
    def chat_template(self) -> str | None:
        """The Jinja template that vLLM's server takes for a request without tools: the processor's
        of a multimodal checkpoint, else the tokenizer's; None if there is none."""
        template = self.tokenizer().chat_template
        if self.multimodal:
            from transformers import ProcessorMixin

            # vLLM takes the tokenizer's where the processor cannot be read.
            with contextlib.suppress(OSError, ValueError, KeyError):
                settings, _ = ProcessorMixin.get_processor_dict(self.path)
                if isinstance(settings.get("chat_template"), str):
                    return settings["chat_template"]
        return template.get("default") if isinstance(template, dict) else template

    def tokenizer(self) -> Any:
        """The target's own tokenizer.

        Raises:
            DraftheadError: none in the folder, or it cannot be read.
        """
        return self._tokenizer

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            # Not the copy in Mistral's own format (tekken.json), which transformers would prefer:
            # it has no chat template and no offsets.
            tokenizer = _without_models(
                "AutoTokenizer", self.path, self.trust_remote_code, mistral_format=False
            )
            # Where all its files are missing transformers makes an empty one, and every prompt with
            # it is empty.
            if not tokenizer("a word", add_special_tokens=False)["input_ids"]:
                raise ValueError("it knows no token for a word")
            return tokenizer
        except Exception as error:
            _refuse_code(self.path, error, self.trust_remote_code)
            raise DraftheadError(
                f"{self.path}: its tokenizer cannot be loaded ({error}); put the target's "
                "tokenizer files into the folder"
            ) from error

    def default_aux_layers(self) -> tuple[int, ...]:
        """vLLM's own choice (2, n//2, n-3), ascending, each once: what it reads when told none."""
        n = self.num_layers
        return tuple(sorted({min(2, n - 1), n // 2, max(n - 3, 0)}))

    def spread_aux_layers(self) -> tuple[int, ...]:
        """`default_aux_layers` and the layers half-way between them: five evenly spread ones, from
        which heads of both kinds can be trained."""
        usual = self.default_aux_layers()
        between = {(a + b) // 2 for a, b in itertools.pairwise(usual)}
        return tuple(sorted({*usual, *between}))

    def check_aux_layers(self, layers: list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
        """The auxiliary layers to capture, ascending as vLLM sorts them.

        Raises:
            DraftheadError: an id outside 0..num_layers, or twice the same.
        """
        if layers is None:
            return self.default_aux_layers()
        wrong = [i for i in layers if not 0 <= i <= self.num_layers]
        if wrong or not layers:
            raise DraftheadError(
                f"capture.aux_layers: {wrong or 'empty'}: {self.path} has {self.num_layers} "
                f"layers; ids run from 0 to {self.num_layers} (id i is what enters layer i)"
            )
        if len(set(layers)) != len(layers):
            raise DraftheadError(f"capture.aux_layers: {list(layers)} names a layer twice")
        return tuple(sorted(layers))

    def embedding(self) -> torch.Tensor:
        """The input embedding [vocab_size, hidden_size], as stored: vLLM's head looks tokens up in
        these rows, without the factor that some targets (Gemma, Granite) multiply them by."""
        return self._weight(self.decoder + _EMBEDDING, "embedding")

    def lm_head(self) -> torch.Tensor:
        """The LM head's rows [vocab_size, hidden_size]; the embedding when they are tied.

        Raises:
            DraftheadError: it has a bias, too.
        """
        if self._lm_head is None:
            return self.embedding()
        self._refuse_bias(self._lm_head, "LM head")
        return self._weight(self._lm_head, "LM head")

    def final_norm(self) -> tuple[torch.Tensor, float]:
        """Weight [hidden_size] and eps of the norm before the LM head, which is `logits.norm`.

        Raises:
            DraftheadError: there is none, or it has a bias.
        """
        self._refuse_bias(self._final_norm, "final norm")
        weight = self._weight(self._final_norm, "final norm")
        return weight.float() + 1 if self.logits.stored_less_one else weight, self.rms_norm_eps

    @functools.cached_property
    def decoder(self) -> str:
        """What the names of the text model's tensors begin with: where an embedding and a final
        norm lie side by side.

        Raises:
            DraftheadError: nowhere, or at several unusual places.
        """
        starts = [n.removesuffix(_EMBEDDING) for n in self.tensors.where if n.endswith(_EMBEDDING)]
        decoders = [s for s in starts if any(s + norm in self.tensors for norm in _FINAL_NORM)]
        decoders = [s for s in _USUAL_DECODERS if s in decoders] or decoders
        if not decoders:
            raise DraftheadError(
                f"{self.path}: no final norm found beside an embedding (looked for "
                f"{' or '.join(_FINAL_NORM)} beside {_EMBEDDING}); drafthead does not know this "
                "architecture"
            )
        if len(decoders) > 1 and decoders[0] not in _USUAL_DECODERS:
            raise DraftheadError(
                f"{self.path}: {', '.join(sorted(decoders))}: which of these is the model that "
                "answers? drafthead does not know this architecture"
            )
        return decoders[0]

    @property
    def _final_norm(self) -> str:
        return next(self.decoder + n for n in _FINAL_NORM if self.decoder + n in self.tensors)

    @property
    def _lm_head(self) -> str | None:
        """The LM head's name: next to the decoder or further out, not in another part of the
        checkpoint."""
        parts = self.decoder.split(".")[:-1]
        outward = (".".join([*parts[:i], _LM_HEAD]) for i in range(len(parts), -1, -1))
        return next((name for name in outward if name in self.tensors), None)

    def check_files(self) -> None:
        """Compare the configuration with the weights. vLLM may start with random numbers in the
        place of weights that are missing, and write hours of answers with them.

        Raises:
            DraftheadError: they disagree about the vocabulary, the width, the number of layers, or
                whether the LM head is the embedding.
        """
        embedding, lm_head = self.decoder + _EMBEDDING, self._lm_head
        for name in (embedding, lm_head):
            if name is not None:
                self._check_shape(name)
        self._check_layers()
        if lm_head is None and self.says_tied is False:
            quantized = [name for name in self.tensors.where if name.startswith("lm_head.")]
            raise DraftheadError(
                f"{self.path}: config.json says `tie_word_embeddings`: false, and the weights hold "
                f"no {_LM_HEAD} (found: {', '.join(quantized) or 'nothing like it'}). Set it to "
                "true in config.json if the LM head is the embedding, else fetch the target again"
            )
        if lm_head is not None and self.says_tied and self._differ(embedding, lm_head):
            raise DraftheadError(
                f"{self.path}: config.json says `tie_word_embeddings`: true, but {lm_head} is not "
                f"{embedding}, and engines differ in which of them they use. Set it to false in "
                f"config.json if {lm_head} is right, else save the target without that tensor"
            )

    def _check_shape(self, name: str) -> None:
        """``name`` is [vocab_size, hidden_size]; quantized weights may pack a row into fewer."""
        dtype, shape = self.tensors.shape(name)
        config = self.path / "config.json"
        if len(shape) != 2:
            raise DraftheadError(f"{self.path}: {name} has the shape {shape}, not that of a matrix")
        rows, width = shape
        if rows != self.vocab_size:
            raise DraftheadError(
                f"{config}: `vocab_size` is {self.vocab_size}, but {name} has {rows} rows; "
                "configuration and weights are of different models, fetch the target again"
            )
        if dtype in _FLOATS and width != self.hidden_size:
            raise DraftheadError(
                f"{config}: `hidden_size` is {self.hidden_size}, but {name} is {width} wide; "
                "configuration and weights are of different models, fetch the target again"
            )

    def _check_layers(self) -> None:
        start = re.escape(self.decoder) + r"layers\.(\d+)\."
        matches = (re.match(start, name) for name in self.tensors.where)
        layers = {int(match[1]) for match in matches if match}
        if not layers:
            return
        # Some checkpoints keep layers for multi-token prediction behind the model's own.
        extra = getattr(self.config, "num_nextn_predict_layers", None) or 0
        if not set(range(self.num_layers)) <= layers or max(layers) >= self.num_layers + extra:
            raise DraftheadError(
                f"{self.path}/config.json: `num_hidden_layers` is {self.num_layers}, but the "
                f"weights hold {len(layers)} layers, up to {self.decoder}layers.{max(layers)}; "
                "configuration and weights are of different models, fetch the target again"
            )

    def _differ(self, first: str, second: str) -> bool:
        """Whether the first rows of two matrices differ; all rows would take seconds to read."""
        one, two = self.tensors.rows(first, 64), self.tensors.rows(second, 64)
        return one.dtype == two.dtype and not torch.equal(one, two)

    def _refuse_bias(self, name: str, what: str) -> None:
        bias = name.removesuffix("weight") + "bias"
        if bias in self.tensors:
            raise DraftheadError(
                f"{self.path}: its {what} has a bias ({bias}), which drafthead's teacher does not "
                "add yet"
            )

    def _weight(self, name: str, what: str) -> torch.Tensor:
        """A weight in floating point, expanded if the checkpoint quantizes it."""
        weight = self.tensors.tensor(name)
        scale = name + "_scale"
        if weight.dtype in (torch.bfloat16, torch.float32, torch.float16):
            return weight
        if weight.dtype == torch.float8_e4m3fn and scale in self.tensors:
            scales = self.tensors.tensor(scale).float()
            return weight.float() * (scales if scales.ndim < 1 else scales.view(-1, 1))
        if weight.dtype == torch.uint8 and scale in self.tensors:
            from drafthead.targets.nvfp4 import dequantize

            return dequantize(
                weight, self.tensors.tensor(scale), self.tensors.tensor(name + "_scale_2")
            )
        raise DraftheadError(
            f"{self.path}: the {what} ({name}) is quantized as {weight.dtype}, which drafthead "
            "cannot read; leave it out of quantization, as quantizers do by default"
        )


def _without_models(loader: str, folder: Path, trust_remote_code: bool, **options: Any) -> Any:
    """``from_pretrained`` of one of transformers' loaders, without the code of all models.
    transformers imports that (2 s of CPU) to name a class in a configuration's docstring, and names
    none where the import fails."""

    def load() -> Any:
        found = getattr(importlib.import_module("transformers"), loader)
        return found.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)

    models = "transformers.models.auto.modeling_auto"
    if not trust_remote_code and models not in sys.modules:
        sys.modules[models] = None  # type: ignore[assignment]  # importing it raises ImportError
        try:
            return load()
        except ImportError:  # a few configurations do need it, such as BLIP-2's
            pass
        finally:
            del sys.modules[models]
    return load()


def _refuse_code(path: Path, error: Exception, trusted: bool) -> None:
    """Say how code that comes with a checkpoint is allowed, if transformers asks for that.

    Raises:
        DraftheadError: it does.
    """
    if not trusted and "trust_remote_code" in str(error):
        files = ", ".join(sorted(file.name for file in path.glob("*.py"))) or "another repository"
        raise DraftheadError(
            f"{path}: needs Python code that comes with the checkpoint ({files}). Read it first. "
            "To let it run, pass --trust-remote-code (init, inspect, quantize) or set "
            "target.trust_remote_code: true in the recipe"
        ) from None


def _gguf(folder: Path, name: str) -> str:
    """What to do with a target that is a GGUF file."""
    return (
        f"{folder / name}: a GGUF file, which holds weights that drafthead cannot read. Make the "
        "head for the safetensors checkpoint that it was converted from, and serve that; or "
        "dequantize it with transformers (pip install gguf accelerate) and serve the result: "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, gguf_file={name!r})"
        ".save_pretrained(OUT), and the same with AutoTokenizer"
    )


def _refuse_head(path: Path) -> None:
    """Refuse a draft head that was named in place of its target."""
    with contextlib.suppress(OSError, ValueError):  # said where the configuration is read
        raw = json.loads((path / "config.json").read_text())
        for key in _HEAD_FIELDS:
            if isinstance(raw, dict) and key in raw:
                raise DraftheadError(
                    f"{path}/config.json: has `{key}`, so it is a draft head's; name the model "
                    "that the head drafts for",
                    field=key,
                )


def _refuse_other_formats(folder: Path) -> None:
    """Refuse a folder that holds a model in a format that is not read here.

    Raises:
        DraftheadError: GGUF, a LoRA adapter, or weights that PyTorch pickled.
    """
    if any(folder.glob("*.safetensors")) and not (folder / "adapter_config.json").is_file():
        return
    if file := next(iter(sorted(folder.glob("*.gguf"))), None):
        raise DraftheadError(_gguf(folder, file.name))
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise DraftheadError(
            f"{folder}: a LoRA adapter (adapter_config.json). A head is made for the model as it "
            "is served: merge the adapter into its base model (peft: merge_and_unload, then "
            "save_pretrained) and name that folder"
        )
    if any(folder.glob("pytorch_model*.bin")):
        raise DraftheadError(
            f"{folder}: its weights are pickled (pytorch_model.bin), and unpickling can run code. "
            "Save them as safetensors: AutoModelForCausalLM.from_pretrained("
            f"{str(folder)!r}).save_pretrained(OUT), and the same with AutoTokenizer"
        )


def _local_folder(path_or_id: str, revision: str | None, trust_remote_code: bool) -> Path:
    folder = Path(os.path.expanduser(path_or_id))
    if folder.is_dir():
        return folder
    if folder.exists():
        if folder.suffix == ".gguf":
            raise DraftheadError(_gguf(folder.parent, folder.name))
        raise DraftheadError(f"{folder}: a target is a folder, this is a file")
    if path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") != 1:
        raise DraftheadError(
            f"{path_or_id}: no such folder (looked in {os.getcwd()}); a target is a checkpoint "
            "folder or a hub id, OWNER/NAME"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                path_or_id,
                revision=revision,
                allow_patterns=[
                    "*.json",
                    "*.safetensors",
                    "*.model",
                    "*.txt",
                    "*.jinja",
                    "LICENSE*",
                    *(["*.py"] if trust_remote_code else []),
                ],
                # The same weights again, in Mistral's own format.
                ignore_patterns=["consolidated*"],
            )
        )
    except Exception as error:
        raise DraftheadError(
            f"{path_or_id}: neither a local folder nor available on the hub ({error})"
        ) from error


def _override(config: Any, overrides: Mapping[str, Any]) -> None:
    """Replace fields of a transformers configuration as vLLM does: a part by its own fields."""
    for name, value in overrides.items():
        part = getattr(config, name, None)
        if hasattr(part, "to_dict") and isinstance(value, dict):
            _override(part, value)
        else:
            setattr(config, name, value)


def load_target(
    path_or_id: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Target:
    """Look at a target: read its configuration and check that its weights are whole.

    Args:
        path_or_id: a checkpoint folder, or a hub id that is fetched.
        revision: hub revision.
        trust_remote_code: let transformers run code that comes with the checkpoint.
        overrides: vLLM's `hf_overrides`: fields of the configuration to replace.

    Raises:
        DraftheadError: missing, unreadable, truncated, or an architecture whose logits drafthead
            cannot compute from the last hidden state.
    """
    path = _local_folder(str(path_or_id), revision, trust_remote_code)
    _refuse_other_formats(path)
    if not (path / "config.json").is_file():
        hint = "; name the repository that the GGUF files were converted from"
        raise DraftheadError(
            f"{path}: no config.json; a target is a transformers checkpoint"
            + (hint if "gguf" in str(path_or_id).lower() else "")
        )
    _refuse_head(path)
    try:
        raw = json.loads((path / "config.json").read_text())
        outer = _without_models("AutoConfig", path, trust_remote_code)
        _override(outer, overrides or {})
        config = outer.get_text_config()
    except Exception as error:
        _refuse_code(path, error, trust_remote_code)
        raise DraftheadError(f"{path}/config.json: cannot be read: {error}") from error
    quantization = raw.get("quantization_config")
    modelopt = path / "hf_quant_config.json"
    if quantization is None and modelopt.exists():
        quantization = read_json(modelopt, "ModelOpt's quantization", dict[str, Any], FETCH)
    said = [getattr(part, "tie_word_embeddings", None) for part in (config, outer)]
    ties = {bool(tied) for tied in said if tied is not None}
    target = Target(
        path=path,
        config=config,
        tensors=SafetensorsFolder(path),
        quantization=quantization,
        architectures=tuple(raw.get("architectures") or ()),
        trust_remote_code=trust_remote_code,
        multimodal=config is not outer,
        says_tied=ties.pop() if len(ties) == 1 else None,
    )
    target.logits  # noqa: B018 - raises now, not when something is computed
    target.check_files()
    return target


def captured_layers(recipe: Recipe, target: Target) -> tuple[int, ...]:
    """The auxiliary layers that the recipe asks to be captured, or that its head reads by default.

    Raises:
        DraftheadError: the target does not have them.
    """
    if recipe.capture.aux_layers is None and "dspark" in recipe.head.kinds:
        return target.spread_aux_layers()
    return target.check_aux_layers(recipe.capture.aux_layers)


def recipe_target(recipe: Recipe) -> Target:
    """The target that a recipe names.

    Raises:
        DraftheadError: as :func:`load_target`.
    """
    where = recipe.target
    overrides = recipe.engine.extra.get("hf_overrides")
    return load_target(where.path, where.revision, where.trust_remote_code, overrides)
