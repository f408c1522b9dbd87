"""Run heads in other engines, each in an environment of its own: `make test-engines`.

    python -m tests.engines [--out RECORD] [mlx-vlm llama.cpp sglang]

Needs a package index, and a few minutes for it. A target and a head are made for each case
(`tests.engines.made`), and the engine itself has to draft and answer what our own walk does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.lib.record import begin, save
from tests.engines.made import make
from tests.tiny import tiny_tokenizer

HERE = Path(__file__).parent
LLAMA_CPP = "xllamacpp==2026.10.11549"
PACKAGES = {
    "mlx-vlm": ["mlx-vlm==0.7.10", "mlx[cpu]==0.32.4"],
    "llama.cpp": [LLAMA_CPP],
    "sglang": [],  # the project's own environment, and its wheel unpacked
}
# Kind of head, its vocabulary, the target, the head's format.
CASES = {
    "mlx-vlm": (
        ("dspark", "full", "lfm2", "vllm"),
        ("dspark", "full", "lfm2_moe", "vllm"),
        ("eagle3", "reduced", "lfm2", "speculators"),
    ),
    "llama.cpp": (
        ("dspark", "full", "lfm2", "vllm"),
        ("dspark", "all but one", "lfm2", "vllm"),
        ("dspark", "reduced", "lfm2_moe", "vllm"),
        ("dspark", "reduced", "llama", "vllm"),
        ("eagle3", "reduced", "llama", "vllm"),
        ("eagle3", "reduced", "lfm2_moe", "vllm"),
    ),
    "sglang": (
        ("dspark", "full", "lfm2", "vllm"),
        ("eagle3", "reduced", "llama", "vllm"),
    ),
}


def environment(name: str, packages: list[str]) -> Path:
    """The Python of a new virtual environment with these packages, made once."""
    if not packages:
        return Path(sys.executable)
    folder = Path("build/engines") / name
    ready = folder / "ready"
    python = folder.absolute() / "bin/python"
    if not ready.exists() or ready.read_text() != " ".join(packages):
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        ready.write_text(" ".join(packages))
    return python


def llama_cpp() -> Path:
    """llama.cpp's source, of the same build as the library: for its converter."""
    folder = Path("build/engines/llama.cpp-source").absolute()
    if not folder.exists():
        with tempfile.TemporaryDirectory() as temporary:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary]
            subprocess.run([*pip, "--no-binary", ":all:", LLAMA_CPP], check=True)
            subprocess.run(
                ["tar", "xzf", *Path(temporary).glob("*.tar.gz"), "-C", temporary], check=True
            )
            (source,) = Path(temporary).glob("*/thirdparty/llama.cpp")
            folder.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", source, folder], check=True)
    return folder


def sglang() -> Path:
    """SGLang's wheel, unpacked: for its readers of configurations, which need no GPU."""
    folder = Path("build/engines/sglang-wheel").absolute()
    if not folder.exists():
        with tempfile.TemporaryDirectory() as temporary:
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary]
            wheel = ["--only-binary", ":all:", "--python-version", "3.11"]
            wheel += ["--platform", "manylinux_2_34_x86_64", "sglang==0.5.23"]
            subprocess.run([*pip, *wheel], check=True)
            subprocess.run(
                [sys.executable, "-m", "zipfile", "-e", *Path(temporary).glob("*.whl"), folder],
                check=True,
            )
    return folder


def output(command: list, env: dict[str, str] | None = None) -> str:
    """What a command prints; ends this program with its errors if it fails."""
    done = subprocess.run(command, capture_output=True, env=env, text=True)
    if done.returncode:
        sys.exit(f"{command[1]}: {done.stderr[-4000:]}")
    return done.stdout


def run(engine: str, python: Path, case: tuple[str, str, str, str], folder: Path) -> dict:
    """Make a case and run it; what the engine's script printed."""
    kind, vocabulary, target, format = case
    made = make(folder, kind, vocabulary, target, format)
    if engine == "llama.cpp":
        tiny_tokenizer(made / "target")
        convert = [sys.executable, HERE / "convert_gguf.py", llama_cpp(), "--outtype", "f32"]
        of = ["--target-model-dir", made / "target"]
        for name, options in (("target", []), ("head", of)):
            command = [*convert, made / name, "--outfile", made / f"{name}.gguf", *options]
            output(command)
    more = [sglang()] if engine == "sglang" else []
    script = HERE / f"engine_{engine.replace('-', '_').replace('.', '_')}.py"
    alone = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return json.loads(output([python, script, made, *more], alone).splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write a record there")
    parser.add_argument("engines", nargs="*", help=f"of {', '.join(CASES)}")
    options = parser.parse_args()
    record = begin("engines") | {"versions": {}}
    figures: dict = {}
    for engine in options.engines or CASES:
        python = environment(engine, PACKAGES[engine])
        for case in CASES[engine]:
            with tempfile.TemporaryDirectory() as temporary:
                found = run(engine, python, case, Path(temporary))
            name = " ".join((engine, *case[:3]))
            print(name, json.dumps(found), flush=True)
            record["versions"] |= found.pop("versions")
            figures[name] = found
    if options.out:
        save(options.out, record, figures)


main()
