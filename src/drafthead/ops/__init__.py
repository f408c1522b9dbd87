"""The arithmetic of training: losses and attention over packed documents.

Each fast path (a kernel, a fused product) stands beside its plain twin.
"""
