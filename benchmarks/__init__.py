"""Measuring the engine from outside: the benchmark client, and benchmarks of kernels and of the core alone."""
