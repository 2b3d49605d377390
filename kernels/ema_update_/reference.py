"""What does a momentum update of a teacher mean?"""


def ema_update_(teacher, student, momentum):
    """m teacher_i + (1 - m) student_i for each i, as new tensors; m a number or a scalar tensor."""
    return [momentum * t + (1 - momentum) * s for t, s in zip(teacher, student, strict=True)]
