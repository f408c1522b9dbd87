"""What differs between targets: where norm, LM head and embedding live, layer kinds, quantization.

Everything is read from the checkpoint's own files; nothing is guessed from a model's name.
"""

from drafthead.targets.target import Target, captured_layers, load_target, recipe_target

__all__ = ["Target", "captured_layers", "load_target", "recipe_target"]
