"""The ground of the suite: mathematics, data, networks and the loop. Knows torch and no simulator."""
