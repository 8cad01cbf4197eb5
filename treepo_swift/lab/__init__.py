"""Measures and predicts: benchmarks on real engines, and a simulator of many."""
