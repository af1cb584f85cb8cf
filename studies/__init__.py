"""Research questions as grids of runs.

A study is a function in grids.py and its name in STUDIES there. Its tables are a file in reports/
and a name in REPORTS of report.py; its figure is a function in figures.py. results.json of a study
is read again when it continues: add keys, but rename none.
"""
