"""drafthead: EAGLE-3 draft heads for the exact model you serve."""

__version__ = "0.1.0"
