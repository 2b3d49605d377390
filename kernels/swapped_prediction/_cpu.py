"""When does csrc/swapped_prediction/swapped_prediction_cpu.cpp, the compiled fuseer::swapped_prediction.cpu, run?"""

from fuseer.kernels import extension

REASON = extension.reason()


def unsupported(scores, queue_scores, assign, epsilon, iterations, temperature, group_name):
    if REASON is not None:
        return REASON
    if scores[0].device.type != "cpu":
        return f"scores are on {scores[0].device.type}, not on the CPU"
    return None
