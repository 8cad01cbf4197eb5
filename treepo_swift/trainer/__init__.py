"""Trains GRPO on trees, inside ``swift rlhf``."""
