"""Grows trees over an inference engine, inside ``swift rollout``."""
