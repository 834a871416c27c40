"""Many experiments: the paper's ablations, its search, and reports on what they gave."""
