"""Where training was: masters, moments and counters, so that a killed run goes on as if it had not
been. No random numbers are drawn after the start, so there is no generator to keep."""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from drafthead.errors import DraftheadError
from drafthead.fsio import atomic_dir, read_json, shaped, write_json


@dataclass
class Progress:
    """All state besides tensors that the next step depends on."""

    inputs: str
    """Fingerprint of what the run was started with; another one cannot go on from here."""
    rows_per_step: int
    step: int = 0
    """Optimizer steps done."""
    seconds: float = 0.0
    """Time spent in training alone, without evaluation and checkpoints, over all starts."""
    waited: float = 0.0
    """How much of it training stood still for want of a row."""
    best_step: int = -1
    best_length: float = 0.0
    """Accepted length of the best evaluation so far."""
    stale: int = 0
    """Evaluations since then."""
    stopped: bool = False
    """Whether training ended early."""
    k: int = 0
    """Drafts a step that `best_length` was measured with."""


def save(folder: Path, progress: Progress, state: dict[str, Tensor]) -> None:
    """Write `folder/step-N` and then remove older ones."""
    with atomic_dir(folder / f"step-{progress.step:08d}") as temporary:
        save_file(state, temporary / "optimizer.safetensors")
        write_json(temporary / "progress.json", asdict(progress))
    for old in _all(folder)[:-1]:
        shutil.rmtree(old)


def read_progress(folder: Path) -> Progress | None:
    """The counters of the latest checkpoint in `folder`, None if there is none."""
    checkpoints = _all(folder)
    if not checkpoints:
        return None
    path, what = checkpoints[-1] / "progress.json", "the progress of training"
    return shaped(read_json(path, what), path, what, Progress, f"delete {folder} to train anew")


def load(folder: Path, progress: Progress, take: Callable[[dict[str, Tensor], int], None]) -> None:
    """Hand the state in the checkpoint of `progress`, and its number of steps, to `take`.

    Raises:
        DraftheadError: unreadable, or of another head.
    """
    path = folder / f"step-{progress.step:08d}" / "optimizer.safetensors"
    try:
        take(load_file(path), progress.step)
    except Exception as error:
        raise DraftheadError(
            f"{path}: cannot go on from this checkpoint ({error}); delete {folder} to train anew"
        ) from error


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))
