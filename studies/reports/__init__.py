"""The tables of each study, a file for each; what they share is in shared.py.

The function of a study takes what its results.json holds and returns the tables as Markdown.
studies/report.py puts them into docs/findings.md, where tests/test_docs.py compares them, so a
change of a table needs `python -m studies.report`.
"""
