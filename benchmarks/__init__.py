"""What training and sampling cost: `python -m benchmarks.train`, `benchmarks.sample`, `benchmarks.memory`; see README.md."""
