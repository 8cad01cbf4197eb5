"""Small pure strategies, each in a registry: how paths branch, where they fall back to, when they stop."""
