"""The engine core process: requests, scheduler, block pool, prefix cache, step pipeline. Never sees text or tensors."""
