"""drafthead: EAGLE-3 and DSpark draft heads for the exact model you serve."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`drafthead.engine_args`, imported when asked for: it needs transformers and torch."""
    if name == "engine_args":
        from drafthead.prove.choice import engine_args

        return engine_args
    raise AttributeError(f"module 'drafthead' has no attribute {name!r}")
