"""Research questions as grids of runs; add one in grids.py."""
