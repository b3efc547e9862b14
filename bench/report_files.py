"""Reads the JSON files that benchmarks write, as values that a report can show."""

import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from bench.report_values import (
    PHASES,
    Chosen,
    Comparison,
    Copies,
    Frontier,
    Grid,
    InTwoWays,
    Kernels,
    Phase,
    Precision,
    Predicted,
    Predictions,
    Quality,
    Rate,
    Result,
    Route,
    Run,
    System,
    Trace,
    Tried,
    Work,
    bits_in_words,
)

Values = Mapping[str, Any]
_ROWS = re.compile(r"--(batch-size|num-batches) \d+")  # told apart from the rest


def read_results(paths: Iterable[pathlib.Path]) -> list[Result]:
    """What the files hold, in their order.

    Raises:
        ValueError: a file is damaged, or no result; the message names it.
    """
    return [_read(path) for path in paths]


def machine_name(machine: Values) -> str:
    """A short name of what `bench.machine.describe_machine` describes.

    It tells processors without AVX-512 from those of the same model that have it.
    """
    accelerator = machine.get("accelerator")
    if accelerator:
        count = int(accelerator.get("count") or 1)
        return accelerator["model"] if count == 1 else f"{count} {accelerator['model']}"
    cpu = machine["cpu"]
    model = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*", "", cpu["model"])
    memory_gib = round(machine["memory_bytes"] / (1 << 30))
    flags = cpu.get("flags", ())
    model += " without AVX-512" * ("avx2" in flags and "avx512f" not in flags)
    return f"{' '.join(model.split())}, {cpu['cores']} cores, {memory_gib} GiB"


def _read(path: pathlib.Path) -> Result:
    try:
        values = json.loads(path.read_text(), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}") from error
    is_object = isinstance(values, dict)
    kinds = [parse for key, parse in _KINDS.items() if is_object and key in values]
    if not kinds:
        raise ValueError(
            f"{path} is neither a trace nor a result of bench.run, bench.compare, "
            "bench.kernels, bench.quality, bench.predictions, bench.grid, "
            "bench.lengths, bench.endings, bench.prefixes, bench.subjects, "
            "bench.choices, bench.frontier or bench.copy_routes; "
            "remove it, or name the files that the report is of"
        )
    try:
        return kinds[0](path, values)
    except (
        KeyError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
    ) as error:
        missing = isinstance(error, KeyError)
        what = f"{error} is missing" if missing else str(error)
        raise ValueError(
            f"{path} is damaged: {what}; make it again or remove it"
        ) from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _read_run(path: pathlib.Path, values: Values) -> Run:
    policy, case = values["policy"], values["case"] or path.stem
    return Run(
        path=path,
        machine=machine_name(values["machine"]),
        case=case,
        model=_short_model(values["model"]),
        lengths=f"prompt {values['prompt_len']}, {values['gen_len']} new",
        placement=_placement(policy),
        num_rows=policy["batch_size"] * policy["num_batches"],
        memory_cap_bytes=values["memory_cap_bytes"],
        tokens_per_s=_positive(values["tokens_per_s"]),
        phases={
            phase: _read_phase(values[phase])
            for phase in PHASES
            if values[phase]["seconds"] != 0  # one token needs no decode
        },
        step_s=[float(seconds) for seconds in values["step_s"]],
        peak_rss_bytes=int(values["peak_rss_bytes"]),
        command=values.get("command") or f"python -m bench.run {case}",
        note=values.get("note") or "",
    )


def _read_phase(values: Values) -> Phase:
    return Phase(
        seconds=_positive(values["seconds"]),
        bound_s={name: float(value) for name, value in values["bound_s"].items()},
        bound_by=str(values["bound_by"]),
        fraction_of_bound=float(values["fraction_of_bound"]),
    )


def _placement(policy: Values) -> str:
    """Not on the device: "weights disk=1 kv-cache host=1, attended to there"."""
    parts = []
    for kind in ("weights", "kv_cache", "activations"):
        on = {tier: policy[kind].get(tier, 0.0) for tier in ("device", "host")}
        on["disk"] = round(1 - sum(on.values()), 6)
        if on["device"] < 1:
            shares = ",".join(f"{tier}={x:g}" for tier, x in on.items() if x > 0)
            there = ", attended to there" if _is_attended(policy, kind) else ""
            parts.append(f"{kind.replace('_', '-')} {shares}{there}")
    return " ".join(parts)


def _is_attended(policy: Values, kind: str) -> bool:
    return kind == "kv_cache" and policy.get("host_attention", False)


def _read_comparison(path: pathlib.Path, values: Values) -> Comparison:
    return Comparison(
        path=path,
        machine=machine_name(values["machine"]),
        model=_short_model(values["model"]),
        lengths=f"prompt {values['prompt_len']}, {values['gen_len']} new",
        memory_cap_bytes=values["memory_cap_bytes"],
        ratio=values["ratio"],
        systems=[
            System(
                name=row["name"],
                setting=row["setting"] + (" (projected)" if row["projected"] else ""),
                tokens_per_s=_positive(row["tokens_per_s"]),
                tried=[
                    Tried(
                        _ROWS.sub("", tried["setting"]).replace("--", "").strip(),
                        int(tried["num_rows"]),
                        _positive(tried["tokens_per_s"]),
                    )
                    for tried in row["tried"]
                    if tried["tokens_per_s"]
                ],
            )
            for row in values["systems"]
            if row["tokens_per_s"]
        ],
        command=values.get("command") or f"python -m bench.compare {values['model']}",
    )


def _read_copies(path: pathlib.Path, values: Values) -> Copies:
    return Copies(
        path=path,
        machine=machine_name(values["machine"]),
        routes=[
            Route(r["direction"], r["route"], r["nbytes"], _positive(r["bytes_per_s"]))
            for r in values["routes"]
            if "error" not in r
        ],
    )


def _read_kernels(path: pathlib.Path, values: Values) -> Kernels:
    return Kernels(
        path=path,
        machine=machine_name(values["machine"]),
        model=_short_model(values["model"]),
        rates=[
            Rate(
                row["kernel"],
                row["shape"],
                row.get("flops_per_s"),
                row.get("bytes_per_s"),
            )
            for row in values["kernels"]
        ],
        command=str(values["command"]),
    )


def _read_quality(path: pathlib.Path, values: Values) -> Quality:
    return Quality(
        path=path,
        machine=machine_name(values["machine"]),
        precisions=[
            Precision(
                *(
                    row[f"{kind}_bits"] or 16
                    for kind in ("weight", "kv_cache", "activation")
                ),
                *(
                    float(row[name])
                    for name in (
                        *("attention_sparsity", "perplexity", "increase"),
                        "top_1_agreement",
                    )
                ),
            )
            for row in values["quality"]
        ],
        command=str(values["command"]),
    )


def _read_predictions(path: pathlib.Path, values: Values) -> Predictions:
    return Predictions(
        path=path,
        machine=machine_name(values["machine"]),
        rows=[_read_predicted(row) for row in values["predictions"]],
        median_error=float(values["summary"]["median_error"]),
        error_of_90_percent=float(values["summary"]["error_of_90_percent"]),
        command=str(values["command"]),
    )


def _read_predicted(row: Values) -> Predicted:
    policy = row["policy"]
    seconds = {
        told: {phase: float(row[told][f"{phase}_s"]) for phase in PHASES}
        for told in ("predicted", "measured")
    }
    return Predicted(
        policy=f"{_short_model(row['model'])}, {policy['num_batches']} x "
        f"{policy['batch_size']}, {bits_in_words(policy)} bits, "
        + (_placement(policy) or "all on the device"),
        predicted_s=seconds["predicted"],
        measured_s=seconds["measured"],
        error=float(row["error"]),
    )


def _read_grid(path: pathlib.Path, values: Values) -> Grid:
    return Grid(
        path=path,
        machine=machine_name(values["machine"]),
        model=str(values["model"]),
        rows=[
            Chosen(
                memory_cap_bytes=int(row["memory_cap_bytes"]),
                chosen=_in_short(row["chosen"]["policy"]),
                chosen_s=_positive(row["chosen"]["seconds"]),
                best=_in_short(row["best"]["policy"]),
                best_s=_positive(row["best"]["seconds"]),
                policies=len(row["grid"]),
                ratio=_positive(row["chosen_over_best"]),
            )
            for row in values["machines"]
        ],
        command=str(values["command"]),
    )


def _read_in_two_ways(path: pathlib.Path, values: Values) -> InTwoWays:
    return InTwoWays(
        path=path,
        machine=machine_name(values["machine"]),
        model=str(values["model"]),
        in_words=str(values["in_words"]),
        ratio=_positive(values["ratio"]),
        command=str(values["command"]),
    )


def _read_frontier(path: pathlib.Path, values: Values) -> Frontier:
    return Frontier(
        path=path,
        machine=str(values["hardware"]),
        model=str(values["model"]),
        points=[
            (_positive(point["block_s"]), _positive(point["tokens_per_s"]))
            for point in values["frontier"]
        ],
        command=str(values["command"]),
    )


def _in_short(policy: Values) -> str:
    placed = _placement(policy) or "all on the device"
    return f"{policy['num_batches']} x {policy['batch_size']}, {placed}"


def _read_trace(path: pathlib.Path, values: Values) -> Trace:
    lanes: dict[str, list[Work]] = {}
    for event in sorted(
        (event for event in values["traceEvents"] if event["ph"] == "X"),
        key=lambda event: event["tid"],  # rows stand in the order of the lanes
    ):
        begin_s, long_s = float(event["ts"]) / 1e6, float(event["dur"]) / 1e6
        work = Work(event["name"], begin_s, begin_s + long_s)
        lanes.setdefault(event["cat"], []).append(work)
    for works in lanes.values():
        works.sort(key=lambda work: (work.begin_s, work.end_s))
    return Trace(path=path, lanes=lanes)


_KINDS: Mapping[str, Callable[[pathlib.Path, Values], Result]] = {
    "traceEvents": _read_trace,
    "systems": _read_comparison,
    "routes": _read_copies,
    "kernels": _read_kernels,
    "quality": _read_quality,
    "predictions": _read_predictions,
    "machines": _read_grid,
    "in_words": _read_in_two_ways,
    "frontier": _read_frontier,
    "tokens_per_s": _read_run,
}


def _positive(value: Any) -> float:
    if not float(value) > 0:
        raise ValueError(f"{value!r} stands where a number above 0 is expected")
    return float(value)


def _short_model(name: str) -> str:
    return pathlib.PurePath(name).name
