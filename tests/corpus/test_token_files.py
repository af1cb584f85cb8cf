"""The format of token shards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import ExperimentError
from corpus import token_files
from corpus.token_files import open_shard


@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=50),
    wide=st.booleans(),
    cut=st.integers(1, 60),
    at=st.integers(0, 55),
)
@settings(max_examples=100, deadline=None)
def test_a_shard_is_read_as_it_was_written_and_not_when_a_byte_of_its_header_or_length_differs(
    tmp_path_factory, tokens, wide, cut, at
):
    path, width = tmp_path_factory.getbasetemp() / "shard.bin", 4 if wide else 2
    written = np.array(tokens, np.uint64).astype(f"<u{width}")
    header = token_files.HEADER.pack(
        token_files.MAGIC, token_files.FORMAT_VERSION, width, len(tokens), bytes(32)
    )
    whole = header.ljust(token_files.HEADER_BYTES, b"\0") + written.tobytes()
    path.write_bytes(whole)
    read = open_shard(path, "00" * 32)
    assert read.dtype == written.dtype and np.array_equal(read, written)
    for damaged in (
        whole[:-cut],
        whole + bytes(cut),
        whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ExperimentError, match="delete the folder"):
            open_shard(path, "00" * 32)
