"""What does masked_patch_mse, forward and backward, have to beat, and what can nobody avoid?"""

import torch

from benchmarks.measure import Work


def prepared(arguments):
    """The official loss has the mask of all patches, which the encoder made anyway, in the place of the masked ones' indices."""
    ids, images, patch = arguments["ids_masked"], arguments["images"], arguments["patch"]
    P = images.shape[2] // patch * (images.shape[3] // patch)
    mask = torch.zeros((len(ids), P), device=ids.device).scatter_(1, ids, 1.0)
    return {**arguments, "ids_masked": ids if arguments["pred"].shape[1] != P else mask}


def official(pred, images, ids_masked, patch, normalize, reduction):
    """The lines of MAE's patchify and forward_loss, in float32; of predictions for masked patches alone, the same after a gather."""
    p, C = patch, images.shape[1]
    h, w = images.shape[2] // p, images.shape[3] // p
    images, pred = images.float(), pred.float()
    target = images.reshape(len(images), C, h, p, w, p)
    target = torch.einsum("nchpwq->nhwpqc", target).reshape(len(images), h * w, p * p * C)
    if not ids_masked.is_floating_point():
        target = torch.gather(target, 1, ids_masked.unsqueeze(-1).repeat(1, 1, target.shape[2]))
    if normalize:
        mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
        target = (target - mean) / (var + 1.0e-6) ** 0.5
    loss = ((pred - target) ** 2).mean(dim=-1)
    return (loss * ids_masked).sum() / ids_masked.sum() if ids_masked.is_floating_point() else loss.mean()


def third_party(arguments):
    return {}


def work(arguments):
    """Masked pixels and predictions are read in either pass, and the gradient of every prediction is written; 12 operations a pixel."""
    pred, images, ids = arguments["pred"], arguments["images"], arguments["ids_masked"]
    compared = ids.numel() * pred.shape[2]
    read = 2 * compared * (pred.element_size() + images.element_size())
    return Work(read + pred.numel() * pred.element_size(), 0, 12 * compared)


def sweeps():
    return {}
