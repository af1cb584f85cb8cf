"""From text to token arrays: sources, tokenizers, shards, the cache, and token shards of other programs.

Add a source in sources.py. The order of documents, the split and the cache's format are what old runs resume by: change them
only together with a new version.
"""
