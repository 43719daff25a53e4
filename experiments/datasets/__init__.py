"""Data sets of Minari: the commands of `ess-rl dataset`, and what they do."""
