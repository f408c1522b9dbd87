"""What cannot be trained as it is asked for: found before anything is made or thrown away."""

from drafthead.errors import DraftheadError
from drafthead.head.model import Eagle3Head
from drafthead.recipe import TrainSection
from drafthead.train import fp8
from drafthead.train.log import import_trackers
from drafthead.train.parallel import World


def check(settings: TrainSection, head: Eagle3Head, rows: int, world: World) -> None:
    """Whether `world` can train `head` in steps of `rows` rows.

    Raises:
        DraftheadError: more processes than rows, shards that cannot be, products that the device
            or the head does not take, a tracker that is not installed.
    """
    size = world.size
    if rows < size:
        raise DraftheadError(
            f"{size} processes for steps of {rows} rows: set train.rows_per_step to {size} or "
            "more, or start fewer processes"
        )
    if settings.shard and rows % size:
        raise DraftheadError(
            f"train.shard: steps of {rows} rows over {size} processes; set train.rows_per_step "
            f"to a multiple of {size}, so that all gather and scatter together"
        )
    if settings.shard and size > 1 and settings.optimizer == "muon":
        raise DraftheadError(
            "train.shard: muon steps whole matrices, a process has a part of each; use adamw"
        )
    if settings.matmul == "fp8":
        fp8.require(world.device, head)
    if world.first:
        import_trackers(settings.track)
