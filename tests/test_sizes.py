import pytest

from flexjax.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10GiB", 10 << 30),
        ("512MB", 512_000_000),
        ("2 gb", 2_000_000_000),
        ("1.5GiB", 3 << 29),
        ("4k", 4000),
        ("4Ki", 4096),
        ("123", 123),
        ("7b", 7),
        (99, 99),
    ],
)
def test_sizes_are_read_as_people_write_them(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "10 parsecs", "1e9", "ten", -5])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(ValueError, match=r"is not a size.*'10GiB'"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (1536, "1.5 KiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes_are_written_as_people_read_them(num_bytes, text):
    assert format_bytes(num_bytes) == text
