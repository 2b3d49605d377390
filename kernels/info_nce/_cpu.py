"""When does csrc/info_nce/info_nce_cpu.cpp run?"""

from fuseer.kernels import checks, dispatch, extension

REASON = extension.reason()
SUMS = dispatch.define(
    "info_nce_sums",
    "(Tensor query, Tensor keys, Tensor? positive, Tensor? positive_index, float temperature, bool normalize, bool gradient)"
    " -> (float, Tensor)",
)


def unsupported(query, keys, positive, positive_index, temperature, normalize, gradient, group_name):
    if REASON is not None:
        return REASON
    if query.device.type != "cpu":
        return f"query is on {query.device.type}, not on the CPU"
    return None


def forward(query, keys, positive, positive_index, temperature, normalize, gradient, group_name):
    """(loss, dquery), as reference.py says; keys are read once."""
    if positive_index is not None:
        checks.indices_within("info_nce", "positive_index", positive_index, len(keys))
    share = dispatch.mean_share(query, group_name)
    total, dquery = SUMS(query, keys, positive, positive_index, temperature, normalize, gradient)
    return share * total, dquery.mul_(share)
