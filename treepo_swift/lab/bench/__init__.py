"""Benchmarks: ratios measured in one run, never absolute claims. See `treepo-swift bench --help`."""
