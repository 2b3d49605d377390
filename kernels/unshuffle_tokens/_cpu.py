"""When does csrc/unshuffle_tokens/unshuffle_tokens_cpu.cpp, the compiled fuseer::unshuffle_tokens.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(x, ids_restore, mask_token, pos_embed):
    if REASON is not None:
        return REASON
    if x.device.type != "cpu":
        return f"x is on {x.device.type}, not on the CPU"
    return None
