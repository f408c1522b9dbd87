"""Errors a user can fix. Each message names the file, the field, what was found and the fix."""


class DraftheadError(Exception):
    """The input or the environment is wrong (exit code 2).

    field: the setting, tensor or column that is wrong, where there is one; for programs, since the
    message names it too.
    """

    exit_code = 2

    def __init__(self, *message: str, field: str | None = None):
        super().__init__(*message)
        self.field = field


class ClaimFailed(DraftheadError):
    """The work was done and the claim does not hold: not lossless, or slower (exit code 1)."""

    exit_code = 1


class UnsupportedHead(DraftheadError):
    """drafthead cannot compute this head, but vLLM may serve it (exit code 3)."""

    exit_code = 3
