"""What stock vLLM lacks for EAGLE-3 on these targets, registered as a general plugin."""


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``; called in every vLLM process."""
