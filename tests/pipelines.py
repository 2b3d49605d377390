"""Which pipelines do the tests of data compare, and which of them can run here?"""

from importlib.util import find_spec

import pytest

from fuseer.engine.data.dali import DaliLoader

HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None  # an optional dependency
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="nvidia-dali-cuda130 is not installed")


class GraphLoader(DaliLoader):
    """DALI's whole graph, which is a GPU's, of its CPU operators."""

    def batches(self, start):
        return self.by_graph(start)


def skip_without_dali(kind) -> None:
    """Skips the test where `kind` is a pipeline of DALI's and that is not installed."""
    if issubclass(kind, DaliLoader) and not HAS_DALI:
        pytest.skip("nvidia-dali-cuda130 is not installed")
