"""Where does fuseer.kernels.unshuffle_tokens lead? To its door, op.py."""

from fuseer.kernels.unshuffle_tokens.op import unshuffle_tokens

__all__ = ["unshuffle_tokens"]
