"""The arguments of command lines that say a policy, in our words and FlexGen's."""

import argparse
import dataclasses
import pathlib

from flexjax.policy import (
    ACTIVATION_BITS,
    BITS,
    Kind,
    Placement,
    Policy,
    Schedule,
    parse_placement,
    read_policy,
    validate,
)

# Arguments that stand for the policy's field of the same name.
_PLAIN = (
    *("batch_size", "num_batches", "schedule"),
    *("weight_bits", "kv_cache_bits", "activation_bits", "group_size"),
    *("host_attention", "attention_sparsity"),
)
_SWITCHES = ("compress_weight", "compress_cache")
AUTO = "auto"
_BOOLEANS = {"true": True, "false": False, "1": True, "0": False}


def add_policy_arguments(
    parser: argparse.ArgumentParser, *, can_plan: bool = False
) -> None:
    """Adds the arguments that `policy_from_args` reads, and `is_planned` if it may."""
    group = parser.add_argument_group(
        "policy",
        "where tensors live; what no argument places is on the device"
        + (", and if there is none at all, a policy is planned" if can_plan else ""),
    )
    planned = f"; {AUTO}: plan one for the prompts (default)" if can_plan else ""
    group.add_argument("--policy", metavar="FILE", help=f"a policy.json{planned}")
    for kind in Kind:
        group.add_argument(
            _flag(kind),
            metavar="device=F,host=F,disk=F",
            help=f"fractions of the {kind.value.replace('_', ' ')} on the device and "
            "on the host; the rest is on disk (disk=1 puts all of it there)",
        )
    group.add_argument(
        "--batch-size",
        "--gpu-batch-size",
        type=int,
        metavar="N",
        help=f"rows of one compute call (default {Policy().batch_size})",
    )
    group.add_argument(
        "--num-batches",
        "--num-gpu-batches",
        type=int,
        metavar="N",
        help="compute calls that share one load of a layer's weights (default 1)",
    )
    group.add_argument(
        "--schedule",
        choices=[schedule.value for schedule in Schedule],
        metavar="NAME",
        help=f"one of {', '.join(schedule.value for schedule in Schedule)}",
    )
    group.add_argument("--offload-dir", metavar="DIR", help="where to spill to")
    _add_saving_arguments(parser)
    _add_flexgen_arguments(parser)


def _add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fewer bytes", "what moves less than all of it")
    for name, what in (("weight", "weights"), ("kv-cache", "KV cache")):
        group.add_argument(
            f"--{name}-bits",
            type=int,
            choices=BITS,
            help=f"quantize the {what} in groups (default: as stored)",
        )
    group.add_argument(
        "--activation-bits",
        type=int,
        choices=ACTIVATION_BITS,
        help="round what quantized weights are multiplied with to so many bits, on a "
        "CPU with AVX2 or more, but no AMX (default: do not)",
    )
    group.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help=f"elements of a group; of the cache, at most (default "
        f"{Policy().group_size})",
    )
    group.add_argument(
        "--host-attention",
        "--cpu-cache-compute",
        action="store_const",
        const=True,
        help="attend to what is cached on host and disk on the host's processor",
    )
    group.add_argument(
        "--attention-sparsity",
        "--attn-sparsity",
        type=float,
        metavar="F",
        help="fraction of its past that a new token attends to (default 1.0)",
    )


def _add_flexgen_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("FlexGen's names", "for those who know them")
    group.add_argument(
        "--percent",
        nargs=6,
        type=float,
        metavar="P",
        help="weights, cache and activations, each: percent on the device, on the host",
    )
    group.add_argument(
        "--overlap",
        type=_boolean,
        metavar="BOOL",
        help="false: --schedule serial",
    )
    group.add_argument("--compress-weight", action="store_true", help="weight_bits=4")
    group.add_argument("--compress-cache", action="store_true", help="kv_cache_bits=4")


def is_planned(args: argparse.Namespace) -> bool:
    """Whether the arguments leave the policy to a plan.

    Raises:
        ValueError: they do, and say something of it all the same.
    """
    names = [kind.value for kind in Kind]
    names += [*_PLAIN, "percent", "overlap"]
    given = [name for name in names if getattr(args, name) is not None]
    given += [name for name in _SWITCHES if getattr(args, name)]
    if args.policy == AUTO and given:
        raise ValueError(
            f"--policy {AUTO} leaves the policy to a plan, but "
            f"--{given[0].replace('_', '-')} says some of it: give one of them"
        )
    return args.policy == AUTO or (args.policy is None and not given)


def policy_from_args(args: argparse.Namespace) -> Policy:
    """The policy that the arguments say, validated.

    Raises:
        ValueError: two arguments say the same thing, or the policy cannot be used.
    """
    policy = Policy()
    if args.policy == AUTO:
        raise ValueError(f"--policy {AUTO} is for generating; give a policy.json here")
    if args.policy is not None:
        policy = read_policy(pathlib.Path(args.policy))
    changes: dict[str, object] = {}
    for kind in Kind:
        text = getattr(args, kind.value)
        if text is not None:
            changes[kind.value] = parse_placement(_flag(kind), text)
    for name in _PLAIN:
        if getattr(args, name) is not None:
            changes[name] = getattr(args, name)
    for name, value in _flexgen_changes(args).items():
        if name in changes:
            raise ValueError(
                f"{name} is given twice, once by one of FlexGen's names; give it once"
            )
        changes[name] = value
    policy = validate(dataclasses.replace(policy, **changes))
    if args.overlap and policy.schedule is Schedule.SERIAL:
        raise ValueError(
            "--overlap true asks for transfers during computation, but the schedule is "
            "serial; leave --overlap out, or give another --schedule"
        )
    return policy


def _flag(kind: Kind) -> str:
    return f"--{kind.value.replace('_', '-')}"


def _flexgen_changes(args: argparse.Namespace) -> dict[str, object]:
    changes: dict[str, object] = {}
    if args.percent is not None:
        shares = [percent / 100 for percent in args.percent]
        for kind, device, host in zip(Kind, shares[::2], shares[1::2], strict=True):
            changes[kind.value] = Placement(device=device, host=host)
    if args.overlap is False:
        changes["schedule"] = Schedule.SERIAL
    if args.compress_weight:
        changes["weight_bits"] = 4
    if args.compress_cache:
        changes["kv_cache_bits"] = 4
    return changes


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return _BOOLEANS[text.lower()]
