"""How fast it is, beside other libraries in the same run, and whether a GPU computes what the CPU does."""
