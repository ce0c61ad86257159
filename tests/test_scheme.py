import pytest

from qbench.errors import ConfigError
from qbench.scheme import ALLOWED_BITS, Scheme


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("W4A16g128", Scheme(4, 16, group_size=128)),
        ("w4a16g128", Scheme(4, 16, group_size=128)),
        ("W4A16-g128", Scheme(4, 16, group_size=128)),
        (" W4A4 ", Scheme(4, 4)),
        ("W2A8", Scheme(2, 8)),
        ("W8A8-sym", Scheme(8, 8, symmetric=True)),
        ("W8A8sym", Scheme(8, 8, symmetric=True)),
        ("W4A4KV4", Scheme(4, 4, kvbits=4)),
        ("W4A8KV4g64-sym", Scheme(4, 8, kvbits=4, group_size=64, symmetric=True)),
        ("W3A16g0", Scheme(3, 16)),
        ("W16A16", Scheme(16, 16)),
    ],
)
def test_parse_reads_every_spelling(text: str, scheme: Scheme) -> None:
    assert Scheme.parse(text) == scheme


def test_text_and_value_are_inverse() -> None:
    schemes = [
        Scheme(w, a, kv, group, sym)
        for w in ALLOWED_BITS
        for a in (4, 16)
        for kv in (None, 4)
        for group in (None, 64)
        for sym in (False, True)
    ]
    assert [Scheme.parse(str(scheme)) for scheme in schemes] == schemes
    assert len({str(scheme) for scheme in schemes}) == len(schemes)


@pytest.mark.parametrize("text", ["", "4bit", "W4", "A4", "W4A4g", "W4A4x", "xW4A4", "W4A4-sym-g8", "W-4A4"])
def test_what_is_no_scheme_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read scheme .*W4A16g128"):
        Scheme.parse(text)


@pytest.mark.parametrize("text", ["W1A16", "W9A16", "W4A12", "W4A4KV10", "W32A32"])
def test_unsupported_widths_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="2 to 8, or 16"):
        Scheme.parse(text)


def test_a_group_size_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ConfigError, match="group_size=-1"):
        Scheme(4, 16, group_size=-1)


def test_kv_bits_follow_activations_unless_given() -> None:
    assert Scheme.parse("W4A8").attention_bits == (8, 8)
    assert Scheme.parse("W4A8KV4").attention_bits == (8, 4)
    assert Scheme.parse("W8A8KV16").attention_bits == (16, 16)  # with 16-bit keys the product has 16 bits


def test_identity_quantizes_nothing_at_all() -> None:
    assert Scheme.parse("W16A16").is_identity
    assert Scheme.parse("W16A16KV16").is_identity
    assert not any(Scheme.parse(text).is_identity for text in ("W4A16", "W16A8", "W16A16KV4"))
