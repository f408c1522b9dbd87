"""llama.cpp's converter, for the tokenizers of tiny targets: LLAMA_CPP ARGUMENTS…

The converter refuses tokenizers that it does not know by a hash, and nothing here is tokenized.
"""

import runpy
import sys

sys.argv = sys.argv[1:]
root, sys.argv[0] = sys.argv[0], f"{sys.argv[0]}/convert_hf_to_gguf.py"
sys.path[:0] = [root, f"{root}/gguf-py"]
from conversion.base import TextModel  # noqa: E402

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(sys.argv[0], run_name="__main__")
