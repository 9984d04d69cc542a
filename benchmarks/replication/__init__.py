"""The claims of arXiv 2604.08297, measured on small real models: `python -m benchmarks.replication --help`."""
