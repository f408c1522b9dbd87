"""Errors a user can mend. Each message names the file, the field, what was found and the mend."""


class DraftheadError(Exception):
    """The input or the environment is wrong (exit code 2)."""

    exit_code = 2


class ClaimFailed(DraftheadError):
    """The work was done and the claim does not hold: not lossless, or slower (exit code 1)."""

    exit_code = 1
