"""Benchmarks: ours and the peers on the same work, in one run. Each is a script: `python benchmarks/overhead.py --help`."""
