"""On which paths do the interpreted kernels run, for every file that interprets them?"""

import pytest


@pytest.fixture(params=["resident", "streamed"])
def path(request, monkeypatch):
    """Which path the host code chooses, on blocks so small that tiny shapes fill several, and one that no shape fills."""
    from interpreted import _potentials, small_blocks  # it needs TRITON_INTERPRET=1

    if request.param == "streamed":
        monkeypatch.setattr(_potentials, "RESIDENT_K", 0)
    small_blocks(monkeypatch)
    return request.param


@pytest.fixture(params=["whole rows", "split rows"])
def split(request, monkeypatch):
    """Whether one program sweeps a row of the losses, or several do and another kernel merges."""
    from interpreted import small_blocks

    small_blocks(monkeypatch, multiprocessors=1 if request.param == "whole rows" else 100)
    return request.param == "split rows"
