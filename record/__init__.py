"""What a run leaves behind: checkpoints, metrics, results, curves, trackers.

Keys and file names here are read by other programs and by old runs: add to them, but rename
nothing.
"""
