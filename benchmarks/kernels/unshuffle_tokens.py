"""What does unshuffle_tokens have to beat, and what can nobody avoid?"""

import torch

from benchmarks.measure import Work, read_bytes


def official(x, ids_restore, mask_token, pos_embed):
    """MAE's forward_decoder between embedding and blocks, without the class token."""
    mask_tokens = mask_token.view(1, 1, -1).repeat(x.shape[0], ids_restore.shape[1] - x.shape[1], 1)
    x_ = torch.cat([x, mask_tokens], dim=1)
    x_ = torch.gather(x_, dim=1, index=ids_restore.unsqueeze(-1).repeat(1, 1, x.shape[2]))
    return x_ if pos_embed is None else x_ + pos_embed


def third_party(arguments):
    """lightly's decoder makes repeat, set_at_index and the sum from parts of its own; it has no one function for them."""
    return {}


def work(arguments):
    """Tokens and positions read, the output written; its gradient read, theirs written; an addition a number each way."""
    x, ids, *parameters = arguments.values()
    out = ids.numel() * x.shape[2]
    given = read_bytes([x]) + read_bytes([y for y in parameters if y is not None])
    return Work(2 * given + 2 * out * x.element_size() + 2 * ids.numel() * 8, 0, 2 * out)


def sweeps():
    return {}
