"""Objectives as configuration: lengths, ids, and every mistake with its dotted key."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from mpotrain.data.config import DataConfig, SourceConfig
from mpotrain.data.manifest import TokenizerEntry
from mpotrain.data.masked_config import MaskedConfig
from mpotrain.data.objective_config import CausalConfig
from mpotrain.data.span_config import SpanCorruptionConfig
from mpotrain.data.span_lengths import corrupted, span_lengths
from mpotrain.errors import DataError
from mpotrain.sample import SampleLengths

WITH_END = TokenizerEntry(kind="identity", digest="", vocab_size=1000, eot_id=3)
ENDLESS = TokenizerEntry(kind="identity", digest="", vocab_size=1000)


def published_lengths(inputs_length: int, density: float, mean: float) -> tuple[int, int]:
    """`random_spans_helper` of the published T5 code: (raw tokens, targets)."""

    def after(tokens_length: int) -> tuple[int, int]:
        num_noise_tokens = round(tokens_length * density)
        num_nonnoise_tokens = tokens_length - num_noise_tokens
        num_noise_spans = round(num_noise_tokens / mean)
        return num_nonnoise_tokens + num_noise_spans + 1, num_noise_tokens + num_noise_spans + 1

    tokens_length = inputs_length
    while after(tokens_length + 1)[0] <= inputs_length:
        tokens_length += 1
    return tokens_length, after(tokens_length)[1]


# ---- lengths


@pytest.mark.parametrize("length", [64, 128, 256, 512, 1024])
@pytest.mark.parametrize(("rate", "mean"), [(0.15, 3.0), (0.15, 10.0), (0.25, 3.0), (0.1, 2.0)])
def test_spans_have_the_lengths_of_the_published_code(length, rate, mean):
    found = span_lengths(length, rate, mean)
    assert (found.window, found.decoder) == published_lengths(length, rate, mean)


def test_the_published_figures_of_t5():
    config = SpanCorruptionConfig()
    assert config.window(512).length == config.window(512).stride == 568
    assert config.lengths(512) == SampleLengths(inputs=512, targets=114, predicted=114)
    assert (config.spans(512).num_noise, config.spans(512).num_spans) == (85, 28)


@settings(max_examples=300, deadline=None)
@given(
    length=st.integers(3, 2000),
    rate=st.floats(0.001, 0.95),
    mean=st.floats(1.0, 40.0),
)
def test_every_length_of_the_encoder_is_reached_and_the_window_is_the_longest(length, rate, mean):
    found = span_lengths(length, rate, mean)
    assert found.encoder == length
    assert found.window == found.num_kept + found.num_noise
    assert found.decoder == found.num_noise + found.num_spans + 1
    assert found.num_spans <= found.num_noise
    longer = range(found.window + 1, found.window + 50)
    assert all(corrupted(window, rate, mean).encoder > length for window in longer)


@pytest.mark.parametrize(("length", "rate", "mean"), [(2, 0.15, 3.0), (9, 1.0, 3.0), (9, 0.5, 0.5)])
def test_windows_that_cannot_be_are_refused(length, rate, mean):
    with pytest.raises(ValueError, match="no window"):
        span_lengths(length, rate, mean)


def test_lengths_of_the_other_objectives():
    assert CausalConfig().lengths(64) == SampleLengths(64, 64, 64)
    assert (CausalConfig().window(64).stride, CausalConfig().window(64).length) == (64, 65)
    pairs, single = MaskedConfig(), MaskedConfig(pairs=False)
    assert pairs.window(128).length == pairs.window(128).stride == 125
    assert single.window(128).length == 126
    assert pairs.lengths(128) == SampleLengths(128, 128, 19, 1)
    assert single.lengths(128) == SampleLengths(128, 128, 19, 0)
    assert MaskedConfig(pairs=False, rate=0.01).lengths(10).predicted == 1


# ---- ids


def test_ids_are_appended_behind_the_tokenizers():
    masked = MaskedConfig().special(WITH_END)
    assert (masked.mask, masked.cls, masked.sep, masked.eot) == (1000, 1001, 1002, 3)
    assert MaskedConfig().vocab_size(1000) == 1003
    spans = SpanCorruptionConfig().special(WITH_END)
    assert (spans.first_sentinel, spans.eos, spans.start) == (1099, 3, 3)
    assert SpanCorruptionConfig().vocab_size(1000) == 1100
    assert CausalConfig().vocab_size(1000) == 1000
    assert CausalConfig(document_mask=True).special(WITH_END).eot == 3


def test_ids_that_a_vocabulary_has_are_used():
    bert = MaskedConfig(mask_id=103, cls_id=101, sep_id=102)
    assert bert.vocab_size(1000) == 1000
    ids = bert.special(WITH_END)
    assert (ids.mask, ids.cls, ids.sep) == (103, 101, 102)
    assert MaskedConfig(mask_id=7).vocab_size(1000) == 1003
    assert MaskedConfig(mask_id=5000).vocab_size(1000) == 5001
    t5 = SpanCorruptionConfig(first_sentinel_id=32_099, eos_id=1, start_id=0)
    assert t5.vocab_size(32_000) == t5.vocab_size(32_100) == 32_100
    ids = t5.special(TokenizerEntry(kind="x", digest="", vocab_size=32_000))
    assert (ids.first_sentinel, ids.eos, ids.start, ids.eot) == (32_099, 1, 0, None)
    assert SpanCorruptionConfig(eos_id=2000).vocab_size(1000) == 2001


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (CausalConfig(document_mask=True), r"data\.objective\.document_mask"),
        (MaskedConfig(), r"data\.objective\.document_mask"),
        (MaskedConfig(document_mask=False, whole_word=True), r"data\.objective\.whole_word"),
        (SpanCorruptionConfig(), r"data\.objective\.eos_id: .*set eos_id and start_id"),
        (SpanCorruptionConfig(eos_id=1), r"data\.objective\.start_id: .*set start_id"),
        (SpanCorruptionConfig(eos_id=1, start_id=0, document_mask=True), r"document_mask"),
    ],
)
def test_a_tokenizer_that_lacks_something_is_refused_with_the_key_that_mends_it(config, key):
    with pytest.raises(DataError, match=key):
        config.special(ENDLESS)


def test_without_document_masks_an_end_is_not_needed():
    assert CausalConfig().special(ENDLESS).eot is None
    assert MaskedConfig(document_mask=False).special(ENDLESS).eot is None
    assert SpanCorruptionConfig(eos_id=1, start_id=0).special(ENDLESS).eot is None


def test_ids_that_collide_with_this_tokenizer_are_refused():
    with pytest.raises(DataError, match="three different ids"):
        MaskedConfig(mask_id=1001).special(WITH_END)
    with pytest.raises(DataError, match=r"eos_id: the id 3 is a sentinel \(0\.\.99\)"):
        SpanCorruptionConfig(first_sentinel_id=99).special(WITH_END)
    # The last of the sentinels counts too.
    with pytest.raises(DataError, match=r"eos_id: the id 3 is a sentinel \(3\.\.102\)"):
        SpanCorruptionConfig(first_sentinel_id=102).special(WITH_END)
    assert SpanCorruptionConfig(first_sentinel_id=103).special(WITH_END).eos == 3


# ---- mistakes


@pytest.mark.parametrize(
    ("config", "length", "start"),
    [
        (MaskedConfig(rate=0.0), 64, "o.rate:"),
        (MaskedConfig(rate=1.0), 64, "o.rate:"),
        (MaskedConfig(rate=float("nan")), 64, "o.rate:"),
        (MaskedConfig(mask_share=1.1, random_share=0.0), 64, "o.mask_share:"),
        (MaskedConfig(random_share=-0.1), 64, "o.random_share: is -0.1"),
        (MaskedConfig(mask_share=0.8, random_share=0.3), 64, "o.random_share: is 0.3, which"),
        (MaskedConfig(min_segment=0), 64, "o.min_segment:"),
        (MaskedConfig(), 18, "o: two segments of 8 tokens and their marks need"),
        (MaskedConfig(pairs=False), 2, "o: one token"),
        (MaskedConfig(mask_id=-1), 64, "o.mask_id: is -1"),
        (MaskedConfig(mask_id=4, sep_id=4), 64, "o.sep_id: is 4, and so is"),
        (SpanCorruptionConfig(rate=1.5), 64, "o.rate:"),
        (SpanCorruptionConfig(mean_span=0.5), 64, "o.mean_span:"),
        (SpanCorruptionConfig(eos_id=-2), 64, "o.eos_id: is -2"),
        (SpanCorruptionConfig(num_sentinels=0), 64, "o.num_sentinels: is 0 but"),
        (SpanCorruptionConfig(first_sentinel_id=50), 64, "o.first_sentinel_id: is 50"),
        (SpanCorruptionConfig(first_sentinel_id=100, start_id=1), 64, "o.start_id: is 1, which"),
        (SpanCorruptionConfig(), 2, "o: a corrupted row needs a sequence_length of at least 3"),
        (SpanCorruptionConfig(rate=0.7, mean_span=1.0), 64, "o.rate: 0.7 leaves"),
    ],
)
def test_each_mistake_is_one_line_with_its_key(config, length, start):
    (line,) = config.problems("o", length)
    assert line.startswith(start)


def test_more_spans_than_sentinels_says_how_many_are_needed():
    (line,) = SpanCorruptionConfig(num_sentinels=20).problems("o", 512)
    assert line.startswith("o.num_sentinels: is 20")
    assert "28 spans" in line
    assert len(SpanCorruptionConfig(num_sentinels=27).problems("o", 512)) == 1
    assert SpanCorruptionConfig(num_sentinels=28).problems("o", 512) == []


def test_good_objectives_have_no_problems():
    assert MaskedConfig(mask_share=0.7, random_share=0.3).problems("o", 64) == []
    assert MaskedConfig().problems("o", 19) == []
    assert MaskedConfig(pairs=False).problems("o", 3) == []
    assert SpanCorruptionConfig().problems("o", 3) == []
    assert CausalConfig().problems("o", 1) == []


def test_the_data_section_holds_and_checks_its_objective():
    adapter = TypeAdapter(DataConfig)
    head = '{"sources": [{"path": "a"}], "sequence_length": 16'
    assert adapter.validate_json(head + "}").objective == CausalConfig()
    data = adapter.validate_json(head + ', "objective": {"kind": "masked", "rate": 0.2}}')
    assert data.objective == MaskedConfig(rate=0.2)
    (line,) = data.problems("data")
    assert line.startswith("data.objective: two segments")
    spans = adapter.validate_json(head + ', "objective": {"kind": "span_corruption"}}')
    assert spans.problems("data") == []
    with pytest.raises(ValidationError, match="kind"):
        adapter.validate_json(head + ', "objective": {"kind": "electra"}}')
    with pytest.raises(ValidationError, match="mean_span"):
        adapter.validate_json(head + ', "objective": {"kind": "masked", "mean_span": 3.0}}')


def test_all_mistakes_come_with_those_of_the_section():
    sources = (SourceConfig(path="a"),)
    data = DataConfig(
        sources=sources, sequence_length=64, seed=-1, objective=MaskedConfig(rate=2.0)
    )
    assert [line.split(":")[0] for line in data.problems("data")] == [
        "data.seed",
        "data.objective.rate",
    ]


def test_objectives_are_configured_without_torch_or_numpy():
    code = (
        "import sys, mpotrain.data.objective_config;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
