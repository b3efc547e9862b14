import pytest

from flexjax.memory.link import DeviceLink


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
