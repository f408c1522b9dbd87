"""Training of the head: batches, losses and kernels, the loop, held-out acceptance as served."""
