"""Where does fuseer.kernels.patch_embed_visible lead? To its door, op.py."""

from fuseer.kernels.patch_embed_visible.op import patch_embed_visible

__all__ = ["patch_embed_visible"]
