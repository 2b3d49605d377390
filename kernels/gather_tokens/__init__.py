"""Where does fuseer.kernels.gather_tokens lead? To its door, op.py."""

from fuseer.kernels.gather_tokens.op import gather_tokens

__all__ = ["gather_tokens"]
