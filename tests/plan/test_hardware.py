"""A machine in figures survives its file, and what no machine can have is refused."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax.plan import hardware as hardware_module
from flexjax.plan.hardware import (
    ATTENTION,
    VERSION,
    WHOLE_BITS,
    Hardware,
    example_names,
    hardware_from_json,
    hardware_to_json,
    read_hardware,
    validate_hardware,
    write_hardware,
)
from flexjax.policy import BITS

MACHINE = Hardware(
    name="a machine",
    device_is_host=False,
    device_memory_bytes=10**9,
    host_memory_bytes=10**10,
    disk_bytes=10**11,
    disk_read_bytes_per_s=2e9,
    disk_write_bytes_per_s=1e9,
    to_device_bytes_per_s=12e9,
    from_device_bytes_per_s=10e9,
    product_flops_per_s={1: 1e10, 64: 5e11},
    prefill_attention_flops_per_s=3e11,
    attention_bytes_per_s={4: 1e10, 8: 1.5e10, 16: 2e10},
    host_attention_bytes_per_s={4: 1e9, 8: 2e9, 16: 1e10},
    sampled_logits_per_s=1e9,
    dequantized_bytes_per_s={4: 1e10, 8: 2e10},
    round_trip_s=1e-3,
    call_s={1: 1e-4},
)
BUDGETS = ["device_memory_bytes", "host_memory_bytes", "disk_bytes"]
FRACTIONS = ["compute_beside_disk", "disk_beside_compute"]
RATES = [
    "disk_read_bytes_per_s",
    "disk_write_bytes_per_s",
    "to_device_bytes_per_s",
    "from_device_bytes_per_s",
    "prefill_attention_flops_per_s",
    "sampled_logits_per_s",
]
COPIES = ["to_device_bytes_per_s", "from_device_bytes_per_s"]
TABLES = ["product_flops_per_s", "dequantized_bytes_per_s", *ATTENTION]
CALLS = "call_s"
TRIP = "round_trip_s"
NESTED = "quantized_product_flops_per_s"
ROUNDED = "rounded_product_flops_per_s"
NO_NUMBERS = [math.nan, math.inf, -math.inf, 10**400, -1, True, "1", [], {}]

rates = st.floats(1e-3, 1e18)
budgets = st.integers(0, 1 << 62)
tables = st.dictionaries(st.integers(1, 1 << 20), rates, min_size=1)
apart = st.one_of(
    st.fixed_dictionaries(
        {
            "device_is_host": st.just(False),
            "to_device_bytes_per_s": rates,
            "from_device_bytes_per_s": rates,
        }
    ),
    st.fixed_dictionaries(
        {
            "device_is_host": st.just(True),
            NESTED: st.fixed_dictionaries(dict.fromkeys(BITS, tables)),
            ROUNDED: st.fixed_dictionaries(dict.fromkeys(BITS, tables)),
        }
    ),
    st.just({"device_is_host": True}),
)
machines = st.builds(
    lambda links, **figures: Hardware(**links, **figures),
    apart,
    name=st.text(),
    product_flops_per_s=tables,
    dequantized_bytes_per_s=st.fixed_dictionaries(dict.fromkeys(BITS, rates)),
    call_s=st.dictionaries(st.integers(1, 1 << 20), st.floats(0, 10), min_size=1),
    **dict.fromkeys(
        ATTENTION, st.fixed_dictionaries(dict.fromkeys((*BITS, WHOLE_BITS), rates))
    ),
    round_trip_s=st.floats(0, 10),
    **dict.fromkeys(BUDGETS, budgets),
    **dict.fromkeys(FRACTIONS, st.floats(0.5, 1)),
    **{name: rates for name in RATES if "device" not in name},
)


def with_figure(name: str, value) -> Hardware:
    return dataclasses.replace(MACHINE, **{name: value})


@given(machines)
def test_a_machine_survives_json(machine):
    values = json.loads(json.dumps(hardware_to_json(machine)))
    assert hardware_from_json(values) == machine


@given(machines)
def test_a_machine_survives_its_file(tmp_path_factory, machine):
    path = tmp_path_factory.mktemp("hardware") / "machine.json"
    write_hardware(path, machine)
    assert read_hardware(str(path)) == machine


def test_the_lists_above_name_every_figure():
    fields = {field.name for field in dataclasses.fields(Hardware)}
    others = {"name", "device_is_host", CALLS, TRIP, NESTED, ROUNDED}
    assert fields == {*BUDGETS, *FRACTIONS, *RATES, *TABLES} | others


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, None], ids=str)
@pytest.mark.parametrize("name", RATES)
def test_no_rate_is_absurd(name, value):
    with pytest.raises(ValueError, match=name):
        validate_hardware(with_figure(name, value))


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, None], ids=str)
@pytest.mark.parametrize("name", TABLES)
def test_no_rate_of_a_table_is_absurd(name, value):
    table = getattr(MACHINE, name) | {8: value}
    with pytest.raises(ValueError, match=f"{name} of 8"):
        validate_hardware(with_figure(name, table))


@pytest.mark.parametrize("value", [*NO_NUMBERS, None], ids=str)
@pytest.mark.parametrize("name", [*BUDGETS, TRIP])
def test_no_budget_is_absurd(name, value):
    with pytest.raises(ValueError, match=name):
        validate_hardware(with_figure(name, value))
    assert validate_hardware(with_figure(name, 0))


@pytest.mark.parametrize("value", [*NO_NUMBERS, 0, 1.5, None], ids=str)
@pytest.mark.parametrize("name", FRACTIONS)
def test_no_fraction_is_absurd(name, value):
    with pytest.raises(ValueError, match=name):
        validate_hardware(with_figure(name, value))


@pytest.mark.parametrize("value", [None, 1, "true"])
def test_device_is_host_is_true_or_false(value):
    with pytest.raises(ValueError, match="device_is_host"):
        validate_hardware(with_figure("device_is_host", value))


@pytest.mark.parametrize("name", ["to_device_bytes_per_s", "from_device_bytes_per_s"])
def test_only_a_device_that_is_the_host_needs_no_copies(name):
    machine = with_figure(name, None)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        validate_hardware(machine)
    shared = dataclasses.replace(MACHINE, device_is_host=True, **dict.fromkeys(COPIES))
    assert validate_hardware(shared)
    with pytest.raises(ValueError, match=f"{name} has no meaning"):
        validate_hardware(dataclasses.replace(shared, **{name: 1e9}))


def test_disk_and_processor_keep_at_least_what_turns_would():
    slow = dataclasses.replace(MACHINE, **dict.fromkeys(FRACTIONS, 0.4))
    with pytest.raises(ValueError, match="sum to less than 1"):
        validate_hardware(slow)


def test_a_machine_s_name_is_a_text():
    with pytest.raises(ValueError, match="name is 3, expected a text"):
        validate_hardware(dataclasses.replace(MACHINE, name=3))


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("product_flops_per_s", {}, "product_flops_per_s is empty"),
        ("product_flops_per_s", {"0": 1.0}, "product_flops_per_s has 0 rows"),
        ("product_flops_per_s", {"-1": 1.0}, "product_flops_per_s has -1 rows"),
        ("product_flops_per_s", {"few": 1.0}, "product_flops_per_s.*no number.*few"),
        ("product_flops_per_s", 1.0, "product_flops_per_s is 1.0, expected an object"),
        ("product_flops_per_s", None, "product_flops_per_s is None"),
        ("dequantized_bytes_per_s", {"8": 1.0}, "dequantized_bytes_per_s lacks 4"),
        ("dequantized_bytes_per_s", [1.0], "dequantized_bytes_per_s is"),
        (ATTENTION[0], {"4": 1.0, "8": 1.0}, f"{ATTENTION[0]} lacks 16 bits"),
        (ATTENTION[1], {"4": 1.0, "16": 1.0}, f"{ATTENTION[1]} lacks 8 bits"),
        (ROUNDED, {"8": {"1": 1.0}}, f"{ROUNDED} lacks 4 bits"),
        (ROUNDED, {"4": {"1": 0.0}, "8": {"1": 1.0}}, f"{ROUNDED} of 4 bits and 1 row"),
        (NESTED, {"8": {"1": 1.0}}, f"{NESTED} lacks 4 bits"),
        (NESTED, {"4": {}, "8": {"1": 1.0}}, f"{NESTED} of 4 bits is empty"),
        (NESTED, {"4": {"0": 1.0}, "8": {"1": 1.0}}, f"{NESTED} of 4 bits has 0 rows"),
        (NESTED, {"4": {"1": 1.0}, "8": {"1": 1.0}}, f"{NESTED} has no meaning"),
        (ROUNDED, {"4": {"1": 1.0}, "8": {"1": 1.0}}, f"{ROUNDED} has no meaning"),
        (NESTED, {"4": 1.0, "8": {"1": 1.0}}, f"{NESTED} of 4 bits is 1.0"),
        (NESTED, {"4": {"1": 0.0}, "8": {"1": 1.0}}, f"{NESTED} of 4 bits and 1 rows"),
    ],
)
def test_a_table_has_what_is_asked_of_it(name, table, message):
    with pytest.raises(ValueError, match=message):
        hardware_from_json(hardware_to_json(MACHINE) | {name: table})


@pytest.mark.parametrize(("given", "missing"), [(NESTED, ROUNDED), (ROUNDED, NESTED)])
def test_a_processor_has_both_kinds_of_quantized_products_or_none(given, missing):
    shared = dataclasses.replace(MACHINE, device_is_host=True, **dict.fromkeys(COPIES))
    table = {bits: {1: 1e9} for bits in BITS}
    with pytest.raises(ValueError, match=f"{missing} is missing"):
        validate_hardware(dataclasses.replace(shared, **{given: table}))
    assert validate_hardware(
        dataclasses.replace(shared, **{given: table, missing: table})
    )


@pytest.mark.parametrize("version", [None, 0, VERSION + 1, str(VERSION)])
def test_another_version_is_refused(version):
    values = hardware_to_json(MACHINE) | {"version": version}
    with pytest.raises(ValueError, match="version is.*calibrate anew"):
        hardware_from_json(values)


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="no 'speed'"):
        hardware_from_json(hardware_to_json(MACHINE) | {"speed": 1})


@pytest.mark.parametrize("field", dataclasses.fields(Hardware), ids=lambda f: f.name)
def test_what_has_no_default_must_be_there(field):
    shared = dataclasses.replace(MACHINE, device_is_host=True, **dict.fromkeys(COPIES))
    values = hardware_to_json(shared)
    del values[field.name]
    if field.default is not dataclasses.MISSING:
        assert getattr(hardware_from_json(values), field.name) == field.default
        return
    with pytest.raises(ValueError, match=f"{field.name} is missing"):
        hardware_from_json(values)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", "null", "{}"])
def test_a_file_that_holds_no_machine_is_named(tmp_path, text):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"hardware {path}: "):
        read_hardware(str(path))


def test_a_file_that_is_not_there_is_named_with_what_is():
    with pytest.raises(ValueError, match="nowhere.json cannot be read.*t4-208gb"):
        read_hardware("nowhere.json")


def test_there_are_examples():
    assert {"a100-80gb", "epyc-2-cores", "h200", "t4-208gb"} <= set(example_names())


@pytest.mark.parametrize("name", example_names())
def test_an_example_is_a_machine_as_it_would_be_written(name):
    machine = read_hardware(name)
    written = json.dumps(hardware_to_json(machine), indent=1) + "\n"
    assert (hardware_module.EXAMPLES / f"{name}.json").read_text() == written


@pytest.mark.parametrize("name", example_names())
def test_more_rows_take_no_less_time(name):
    machine = read_hardware(name)
    spent = [machine.layer_s(rows, 10**6) for rows in range(1, 4096, 7)]
    assert spent == sorted(spent)


@given(machines, st.integers(1, 1 << 40))
def test_a_layer_takes_what_was_measured(machine, num_weights):
    calls = dict.fromkeys(machine.product_flops_per_s, 1e-3)
    machine = dataclasses.replace(machine, call_s=calls)
    for rows, flops_per_s in machine.product_flops_per_s.items():
        expected = 2 * rows * num_weights / flops_per_s + 1e-3
        assert machine.layer_s(rows, num_weights) == pytest.approx(expected)
    most = max(machine.product_flops_per_s)
    once = machine.layer_s(most, num_weights)
    assert machine.layer_s(3 * most, num_weights) == pytest.approx(3 * once)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "is_rounded"), [(NESTED, False), (ROUNDED, True)])
def test_a_layer_of_quantized_weights_takes_what_was_measured(name, is_rounded, bits):
    tables = {
        other: {b: {1: 1e9 * b} if other != name else {1: 3e9 * b} for b in BITS}
        for other in (NESTED, ROUNDED)
    }
    machine = dataclasses.replace(MACHINE, **tables)
    spent = machine.layer_s(1, 10**9, bits, is_rounded=is_rounded)
    assert spent == pytest.approx(2 * 10**9 / (3e9 * bits) + machine.call_s[1])
