import pytest

from flexjax.memory.link import DeviceLink
from tests.common import random_tensors, write_store
from tests.memory.placed_weights import CONFIGS, DTYPE


@pytest.fixture(autouse=True)
def _closed_links(monkeypatch):
    """No link's thread outlives its test."""
    links: list[DeviceLink] = []
    init = DeviceLink.__init__

    def keep(self: DeviceLink, *args) -> None:
        init(self, *args)
        links.append(self)

    monkeypatch.setattr(DeviceLink, "__init__", keep)
    yield
    for link in links:
        link.close()


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """A store of every config; and its tensors."""
    tensors = {name: random_tensors(config, DTYPE) for name, config in CONFIGS.items()}
    parent = tmp_path_factory.mktemp("stores")
    return {
        name: (write_store(parent / name, config, tensors[name]), tensors[name])
        for name, config in CONFIGS.items()
    }
