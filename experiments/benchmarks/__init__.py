"""Benchmarks, a module each; ``results`` holds what they measured."""
