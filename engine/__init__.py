"""How the model runs on hardware: kernels, precision, offload, the linear seam.

Change anything here for speed or memory, as long as the reference version beside each fast path still agrees with it.
Nothing here knows the model's architecture; of the root it imports config alone.
"""
