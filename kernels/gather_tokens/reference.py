"""What does a gather of tokens mean?"""

import torch


def gather_tokens(x, ids):
    """out[b, m] = x[b, ids[b, m]]."""
    return x[torch.arange(len(x), device=x.device)[:, None], ids]
