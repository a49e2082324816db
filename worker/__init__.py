"""The worker process: weights, KV tensors, attention, sampling, CUDA graphs. Knows slots and steps, not requests."""
