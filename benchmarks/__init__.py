"""Commands that make the figures of the documentation; each writes a result file into results/."""
