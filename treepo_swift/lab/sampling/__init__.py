"""Trees without a training: grown for prompts of a file, judged, and compared at equal tokens and equal time."""
