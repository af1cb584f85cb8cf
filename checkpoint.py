"""Kept for scripts that import it: opening a checkpoint has moved to record/checkpoint.py."""

import warnings

from record.checkpoint import CheckpointError, load, load_model

__all__ = ["CheckpointError", "load", "load_model"]
warnings.warn("import record.checkpoint instead of checkpoint", DeprecationWarning, stacklevel=2)
