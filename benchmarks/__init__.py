"""Commands that make the figures of the documentation; each writes a result file into results/.

A benchmark is a function in run.py and its name in BENCHMARKS there; tables.py puts results into
the pages. Change what a benchmark measures only together with its name: results are compared over
time.
"""
