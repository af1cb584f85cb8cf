"""From text to token arrays.

sources.py says where text comes from and formats.py how a file is read; tokenizer.py, shards.py and
cache.py make and keep the tokens; external.py imports token shards of other programs. Both kinds of
shards are read by token_files.py; workers.py ends worker processes with the process that made them.

A new source is a class in sources.py, a new file format a function in formats.py. Old runs depend
on the order of the chunks of text, on the split and on the format of the cache: change these only
together with a new format version.
"""
