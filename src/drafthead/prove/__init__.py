"""Losslessness and speed: engines started, answers compared, blocks timed, a k chosen."""
