"""What do tests of several folders share, made once in a session?"""

import os
import tempfile

import pytest


def pytest_configure(config):
    """Inductor keys its cache on disk by the graph, not by an op's fake: what an older one compiled would fail here."""
    folder = tempfile.TemporaryDirectory(prefix="fuseer-inductor-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
    config.add_cleanup(folder.cleanup)


@pytest.fixture(scope="module")
def one_thread():
    """Of so small a network two threads do nothing but wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def small_images(tmp_path_factory):
    """Ten classes of real photographs: 160 to train on, 40 to test on."""
    from tests.runs import labelled_images

    return labelled_images(tmp_path_factory.mktemp("images"), train=16, test=4)


@pytest.fixture(scope="session")
def small_run(small_images, tmp_path_factory):
    """The folder of six steps of SwAV on them, not to be changed: copy it."""
    from tests.runs import pretrained

    return pretrained(tmp_path_factory.mktemp("runs") / "run", small_images, "linear.batch_size=32")
