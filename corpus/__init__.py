"""From text to token arrays.

sources.py says where text comes from and formats.py how a file is read; near_duplicates.py finds
copies in the built-in corpora; text_scan.py reads the text once, and split.py decides what is held
out; tokenizer.py, safe_cuts.py, token_writer.py and shards.py make the tokens, and cache.py keeps
them; external.py imports token shards of other programs. Both kinds of shards are opened by
token_files.py and read by token_reader.py; checksums.py finds changed bytes of the cache;
workers.py ends worker processes with the process that made them.

A new source is a class in sources.py, a new file format a function in formats.py. Old runs depend
on the order of the chunks of text, on the split and on the format of the cache. The rules have a
version (config.DATA_RULES), and every old version stays: change what a new run does only together
with a new version.
"""
