"""What fits: predicted bytes, the choice that follows from them, and the machine it is for.

Change sizes.py with the model or the optimizer, and machine.py for a new GPU. Nothing here imports
torch at module level, so that `plan` answers at once.
"""
