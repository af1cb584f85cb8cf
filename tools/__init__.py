"""Commands around a trained model: export to transformers, import from it, evaluate.

Add a format beside qwen3_moe.py. Training imports nothing of this folder. Options and the names of
the written files are read by others: add to them, but rename nothing.
"""
