"""The base of the suite: mathematics, data, networks and the loop. Depends on torch but on no simulator."""
