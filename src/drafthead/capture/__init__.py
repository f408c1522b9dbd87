"""Hidden states out of the running target, while it answers."""
