"""A small weight store, whole and to be harmed."""

import shutil

import pytest

from flexjax import store_format
from flexjax.store_format import DTYPES
from tests.small_store import weights, write


@pytest.fixture(autouse=True, scope="module")
def _small_chunks():
    """Chunks of a few rows, so that tiny tensors have several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_format, "MIN_CHUNK_BYTES", 128)
        patch.setattr(store_format, "MAX_CHUNK_BYTES", 256)
        yield


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    write(folder, weights(DTYPES["bfloat16"]))
    return folder


@pytest.fixture
def store_folder(whole_store, tmp_path):
    """A copy that a test may harm."""
    return shutil.copytree(whole_store, tmp_path / "store")
