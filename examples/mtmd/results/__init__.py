"""What comes out of runs: metrics, tables, figures, and the files that hold them."""
