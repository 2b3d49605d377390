"""What does it mean to put kept tokens back among mask tokens?"""

import torch


def unshuffle_tokens(x, ids_restore, mask_token, pos_embed):
    """out[b, i] = (x[b, r] if r < keep else mask_token) + pos_embed[i], r = ids_restore[b, i]: MAE's decoder, without its class token."""
    B, keep, D = x.shape
    rows = torch.arange(B, device=x.device)[:, None]
    tokens = torch.cat([x, mask_token.expand(B, ids_restore.shape[1] - keep, D)], dim=1)[rows, ids_restore]
    return tokens if pos_embed is None else tokens + pos_embed
