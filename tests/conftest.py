"""What do tests of several folders share, made once in a session?"""

import pytest


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
