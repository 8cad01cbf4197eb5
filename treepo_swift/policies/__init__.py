"""Small pure strategies: how paths branch, where they fall back to, when they stop."""
