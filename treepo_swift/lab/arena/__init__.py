"""Tree methods against plain GRPO at equal decoded tokens, on tasks that a small model learns on one CPU core."""
