"""Patterns against the expression that PEFT makes of them."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipgo_deploy.lora.patterns import PatternError, Patterns

NAMES = [
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "transformer_blocks.11.attn.to_k",
    "transformer_blocks.1.attn.add_k_proj",
    "to_q",
    "text_model.encoder.layers.0.self_attn.q_proj",
    "to_q.x",
    "xto_q",
]


def by_peft(pattern, name):
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def matches(pattern, name):
    return Patterns([(pattern, 1.0)]).find(name) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        "to_q",
        "to_q|to_k",
        "attn1.to_q",
        r"attn1\.to_q",
        ".*to_[qk]",
        r"transformer_blocks\.\d+\.attn\.to_k",
        r"transformer_blocks\.(?:0|11)\..*",
        "^to_q",
        "^text_model.*q_proj$",
        "(down|up)_blocks.0.*attn1.*",
        "[^t]*",
        "t{0}o?_{1,2}q",
        "a{,2}tt.*|to_q",
        r"\w+?",
        "attn.to_q{2}",
        "",
        "x{y|to_q",
    ],
)
def test_as_peft_matches_them(pattern):
    try:
        found = [matches(pattern, name) for name in NAMES]
    except PatternError:
        assert pattern == "a{,2}tt.*|to_q"
        return
    assert found == [by_peft(pattern, name) for name in NAMES]


_ATOMS = st.sampled_from(["a", "b", ".", r"\.", "[ab]", "[^a.]", r"\w", r"\d"])
_ENDS = st.sampled_from(["^", "$"])
_REPEATED = st.tuples(_ATOMS, st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,2}", "*?", "{1,}"])).map("".join)
_SEQUENCES = st.lists(st.one_of(_REPEATED, _REPEATED, _ENDS), max_size=4).map("".join)
_GROUPS = st.lists(_SEQUENCES, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})")
_PATTERNS = st.lists(st.one_of(_SEQUENCES, _GROUPS), max_size=3).map("".join)


@settings(max_examples=300, deadline=None)
@given(_PATTERNS, st.text("ab.1", max_size=8))
def test_any_pattern_as_peft_matches_it(pattern, name):
    assert matches(pattern, name) == by_peft(pattern, name)


def test_the_first_that_matches():
    patterns = Patterns([("to_k", 1.0), ("attn.to_.", 2.0), ("to_q", 3.0)])
    assert [patterns.find(name) for name in ("a.to_q", "attn.to_q", "attn.to_k", "to_v")] == [3.0, 2.0, 1.0, None]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(to_q",
        "to_q)",
        "[to_q",
        "*a",
        "a**",
        "a{2}{3}",
        "a{1000}",
        "a{3,2}",
        r"(a)\1",
        r"\bto_q",
        "(?=a)a",
        "(?P<n>a)",
        "(?i)a",
        "\\",
        "(" * 40 + "a" + ")" * 40,
        "a|" * 400,
    ],
)
def test_what_is_not_known_is_refused_by_name(pattern):
    with pytest.raises(PatternError, match=re.escape(ascii(pattern[:10])[1:-1])):
        Patterns([(pattern, 1.0)])


@pytest.mark.parametrize("pattern", ["(a|a)" * 60 + "b", "a?" * 100 + "b", ".*" * 30 + "b", "(a|aa|.)*" * 20 + "b"])
def test_every_pattern_ends(pattern):
    name = "a" * 400
    patterns = Patterns([(pattern, 1.0)] * 50)
    start = time.perf_counter()
    try:
        while True:
            assert patterns.find(name) is None
    except PatternError as error:
        assert "takes too long" in str(error)
    assert time.perf_counter() - start < 30  # some seconds at most on a busy machine; `re` would take for ever
