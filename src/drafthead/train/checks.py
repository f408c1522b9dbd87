"""What cannot be trained as it is asked for: found before anything is made or thrown away."""

from drafthead.errors import DraftheadError
from drafthead.recipe import TrainSection
from drafthead.train.log import import_trackers
from drafthead.train.parallel import World


def check(settings: TrainSection, rows: int, world: World) -> None:
    """Whether `world` can train in steps of `rows` rows.

    Raises:
        DraftheadError: more processes than rows, or a tracker that is not installed.
    """
    size = world.size
    if rows < size:
        raise DraftheadError(
            f"{size} processes for steps of {rows} rows: set train.rows_per_step to {size} or "
            "more, or start fewer processes"
        )
    if world.first:
        import_trackers(settings.track)
