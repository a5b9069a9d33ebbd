"""Experiments: data, tasks, training, decoding, claims, benchmarks and the command line."""
