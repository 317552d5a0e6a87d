"""Scripts that each answer one question about speed; run them as `python -m benchmarks.NAME`."""
