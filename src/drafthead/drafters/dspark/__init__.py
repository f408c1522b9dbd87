"""DSpark (arXiv 2607.05147): a block of drafts in one pass, made dependent by a Markov head.

The target's states give keys and values of every layer for the context. A block of queries, the
last token and masks behind it, attends to them and to each other; each gives the logits of the
token after it, to which the Markov head adds what follows from the draft just before.
"""
