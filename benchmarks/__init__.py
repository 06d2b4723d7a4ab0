"""The cost of training and sampling: `python -m benchmarks.train`, `benchmarks.sample`, `benchmarks.memory`; see README."""
