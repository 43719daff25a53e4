"""Minari data sets: the commands of `ess-rl dataset`, and what they do."""
