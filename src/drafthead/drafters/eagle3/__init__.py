"""EAGLE-3 (arXiv 2503.01840): one small layer that drafts token after token from its own states.

Training-time test lets it learn from those states, as it will have them at draft position 2, 3, ….
"""
