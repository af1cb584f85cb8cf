"""How the model runs on hardware: kernels, matmuls, precision, offload.

Anything here may be changed for speed or memory, as long as each fast path still agrees with the
reference version beside it (tests/engine, and `python -m benchmarks.check_gpu` on a GPU). Nothing
here knows the model's architecture. Of the root's files it imports config alone.
"""
