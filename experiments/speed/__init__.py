"""Speed, measured alongside other libraries in the same run, and checks that a GPU computes what the CPU does."""
