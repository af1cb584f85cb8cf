"""Research questions as grids of runs.

A study is a function in grids.py and its name in STUDIES there; its tables are a function in
report.py, its figure one in figures.py. results.json of a study is read again when it continues:
add keys, but rename none.
"""
