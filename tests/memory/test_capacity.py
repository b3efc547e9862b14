import re
from unittest import mock

import jax
import pytest

from flexjax.memory import capacity
from flexjax.memory.capacity import free_bytes, free_host_bytes, shortage
from flexjax.policy import Kind, Tier

FREE = {Tier.DEVICE: 1000, Tier.HOST: 1000, Tier.DISK: 1000}


def needs(**sizes: int) -> dict[tuple[Tier, Kind], int]:
    """Bytes by names such as `host_weights`."""
    found = {}
    for name, nbytes in sizes.items():
        tier, _, kind = name.partition("_")
        found[Tier(tier), Kind(kind)] = nbytes
    return found


FITS = [
    (needs(device_weights=600, device_kv_cache=400, host_weights=1000), False),
    (needs(device_weights=500, host_weights=500, disk_kv_cache=1000), True),
    (needs(device_weights=1000, host_kv_cache=-400), True),  # more than enough is held
    ({}, True),
]
REFUSED = [
    (
        needs(device_weights=300, device_kv_cache=900),
        False,
        "the policy needs 1.2 KiB more on device, which can take 1000 bytes; most of "
        "it is 900 bytes of kv_cache on device: lower batch_size, or place less on the",
    ),
    (
        needs(device_weights=600, host_activations=500),
        True,
        "more on device and host, .* of weights on device: ",
    ),
    (
        needs(device_weights=400, host_activations=700),
        True,
        "more on device and host, .* of activations on host: lower batch_size or num",
    ),
    (
        needs(disk_kv_cache=1001, disk_activations=0),
        True,
        "more on disk, .* of kv_cache on disk: free some space or choose an offload",
    ),
    (
        needs(device_weights=2000, host_weights=2000, disk_kv_cache=2000),
        False,
        "more on device, ",  # the first that is too small, always
    ),
]


@pytest.mark.parametrize(("needed", "device_is_host"), FITS)
def test_what_fits_passes(needed, device_is_host):
    assert shortage(needed, FREE, device_is_host=device_is_host) is None


@pytest.mark.parametrize(("needed", "device_is_host", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_tier_kind_and_advice(
    needed, device_is_host, message
):
    refusal = shortage(needed, FREE, device_is_host=device_is_host)
    assert refusal is not None
    assert re.search(message, refusal)


def test_a_device_says_what_it_has_and_a_cpu_has_what_the_host_has(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(capacity, "free_host_bytes", lambda: 777)
    stats = {"bytes_limit": 5000, "bytes_in_use": 2000}
    gpu = mock.Mock(jax.Device, platform="gpu", memory_stats=lambda: stats)
    mute = mock.Mock(jax.Device, platform="gpu", memory_stats=lambda: None)
    folder = tmp_path / "not" / "there" / "yet"
    free = {
        name: free_bytes(device, folder)
        for name, device in (
            ("gpu", gpu),
            ("mute", mute),
            ("cpu", jax.devices("cpu")[0]),
        )
    }
    assert [free[name][Tier.DEVICE] for name in free] == [3000, 777, 777]
    assert {sizes[Tier.HOST] for sizes in free.values()} == {777}
    assert free["cpu"][Tier.DISK] > 0
    assert not folder.exists()


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Makes this process a member of made-up groups below `tmp_path`."""
    monkeypatch.setattr(capacity, "_CGROUP", tmp_path)
    monkeypatch.setattr(capacity, "_OWN_CGROUPS", tmp_path / "own")

    def make(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


def test_a_group_of_version_2_limits_what_is_free(cgroups):
    """Pages of files count as free: the system takes them back when it must."""
    cgroups(
        "0::/job/step\n",
        {
            "job/step/memory.max": "max\n",
            "job/step/memory.current": "9000\n",
            "job/memory.max": "10000\n",
            "job/memory.current": "9000\n",
            "job/memory.stat": "anon 2000\nfile 7000\nactive_file 3000\n"
            "inactive_file 4000\nshmem 0\n",
        },
    )
    assert free_host_bytes() == 8000


def test_a_group_of_version_1_limits_what_is_free(cgroups):
    cgroups(
        "9:cpu:/\n4:memory:/capped\n0::/\n",
        {
            "memory/capped/memory.limit_in_bytes": "6000\n",
            "memory/capped/memory.usage_in_bytes": "5500\n",
            "memory/capped/memory.stat": "active_file 0\ninactive_file 4000\n",
            "memory/memory.limit_in_bytes": str(1 << 62),
            "memory/memory.usage_in_bytes": "0",
        },
    )
    assert free_host_bytes() == 4500


def test_a_container_that_does_not_see_its_own_group_uses_the_root(cgroups):
    cgroups(
        "0::/../hidden\n",
        {"memory.max": "3000\n", "memory.current": "1000\n", "memory.stat": ""},
    )
    assert free_host_bytes() == 2000


def test_a_full_group_has_nothing_free(cgroups):
    cgroups("0::/\n", {"memory.max": "3000\n", "memory.current": "4000\n"})
    assert free_host_bytes() == 0


def test_without_groups_the_machine_says_what_is_free(cgroups):
    del cgroups
    assert 0 < free_host_bytes() <= 1 << 62
