"""The suites of scripts/benchmark.py: each is a function that yields comparisons."""
