"""How the rows of a cache are attended to, by the tier that holds them."""

from typing import NamedTuple

from flexjax.policy import Policy, Tier


class Route(NamedTuple):
    """What becomes of the rows on one tier when a new token attends to them.

    Attributes:
        on_host: the query goes to them, and the host's processor attends; else they
            come to the device.
        gathers: keys come first, and of the values only those that they choose.
    """

    on_host: bool = False
    gathers: bool = False


DIRECT = Route()  # whole, to the device, which attends to them


def cache_routes(policy: Policy, *, device_is_host: bool) -> dict[Tier, Route]:
    """The route of each tier's rows; `DIRECT` where the policy puts none.

    A device that computes in the host's memory has every cache where it is used: there
    host attention is what happens anyway, and gathering would be one copy more. From
    disk all values come: a disk reads blocks of 4 KiB, with 32 slots of a head of 64
    elements in 16 bits, and of these most hold a slot that is wanted: 97 % where one in
    ten is. They come ahead of their use, which what is gathered cannot.
    """
    on_host = policy.host_attention and not device_is_host
    is_apart = not (on_host or device_is_host)
    routes = {
        Tier.DEVICE: DIRECT,
        Tier.HOST: Route(on_host, is_apart and policy.attention_sparsity < 1),
        Tier.DISK: Route(on_host),
    }
    return {
        tier: route if policy.kv_cache.fraction(tier) > 0 else DIRECT
        for tier, route in routes.items()
    }


def shares_prefixes(policy: Policy, *, device_is_host: bool) -> bool:
    """Whether a block computes only once what many of its prompts begin with.

    Not where attention is sparse, or on the host of a device.
    """
    on_host = policy.host_attention and not device_is_host
    return policy.attention_sparsity == 1 and not on_host
