"""Batches: the same samples for every world size, labels that stay inside documents, errors that name the fix."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_tools.synthetic import write_dataset
from kha_train.config import schema
from kha_train.config.compose import dump
from kha_train.config.constants import IGNORE_LABEL
from kha_train.data import stream
from kha_train.data.format.files import Files
from kha_train.data.format.shards import ShardSet
from kha_train.data.format.writer import publish_dataset, write_shard
from kha_train.data.sampling.order import Permutation
from kha_train.errors import ConfigError, DataError


def take(config, count: int, rank: int = 0, world_size: int = 1, samples_seen: int = 0) -> list[stream.Batch]:
    opened = stream.open_stream(config, rank, world_size, samples_seen=samples_seen)
    return list(itertools.islice(opened, count))


def joined(batches: list[stream.Batch]) -> tuple:
    """What a step's parts say together, borders as lengths of segments."""
    return (
        np.concatenate([b.samples_B for b in batches]).tolist(),
        torch.cat([b.tokens_BT for b in batches]).tolist(),
        torch.cat([b.labels_BT for b in batches]).tolist(),
        torch.cat([b.positions_BT for b in batches]).tolist(),
        torch.cat([b.cu_seqlens_S.diff() for b in batches]).tolist(),
        sum(b.label_count for b in batches),
    )


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_the_samples_of_a_step_are_the_same_for_every_world_size(
    small_dataset: Path, make_config, world_size: int
) -> None:
    config = make_config(small_dataset)
    alone = take(config, 6)
    ranks = [take(config, 6, rank, world_size) for rank in range(world_size)]
    for step in range(6):
        assert joined([batches[step] for batches in ranks]) == joined([alone[step]])


@pytest.mark.parametrize("size", [1, 5, 8, 24, 100])
def test_micro_batches_are_the_batch_in_parts(small_dataset: Path, make_config, size: int) -> None:
    (batch,) = take(make_config(small_dataset), 1)
    parts = list(batch.micro_batches(size))
    assert joined(parts) == joined([batch])
    for part in parts:
        assert part.cu_seqlens_S.dtype == torch.int32
        assert part.cu_seqlens_S[0] == 0 and part.cu_seqlens_S[-1] == part.tokens_BT.numel()
        assert part.max_seqlen == part.cu_seqlens_S.diff().max()
    assert max(part.max_seqlen for part in parts) == batch.max_seqlen


@pytest.mark.parametrize("samples_seen", [0, 24, 240, 24_000_000])
def test_a_stream_opened_later_goes_on_as_if_never_stopped(small_dataset: Path, make_config, samples_seen: int) -> None:
    config = make_config(small_dataset)
    resumed = stream.open_stream(config, samples_seen=samples_seen)
    batch = next(resumed)
    assert batch.samples_B[0] == samples_seen
    assert resumed.samples_seen == samples_seen + 24
    if samples_seen < 1000:
        assert joined([batch]) == joined([take(config, samples_seen // 24 + 1)[-1]])


def test_another_batch_size_after_a_resume_takes_up_the_next_sample(small_dataset: Path, make_config) -> None:
    (first,) = take(make_config(small_dataset, batch=24), 1)
    (second,) = take(make_config(small_dataset, batch=6), 1, samples_seen=24)
    small = take(make_config(small_dataset, batch=6), 5)
    assert joined([first, second]) == joined(small)


def test_an_epoch_reads_every_row_once_as_it_stands_in_the_shards(small_dataset: Path, make_config) -> None:
    config = make_config(small_dataset, batch=1)
    opened = stream.open_stream(config)
    assert opened.tokens_per_epoch == opened.samples_per_epoch * 32
    rows = sorted(tuple(next(opened).tokens_BT[0].tolist()) for _ in range(opened.samples_per_epoch))
    shards = ShardSet.open(config.data.train)
    expected = []
    for index, shard in enumerate(shards.manifest.shards):
        ids = shards.read(index, 0, shard.tokens)
        expected += [tuple(ids[i * 32 : i * 32 + 32].tolist()) for i in range((shard.tokens - 1) // 32)]
    assert rows == sorted(expected)


def test_labels_are_the_next_tokens_and_never_cross_a_document(small_dataset: Path, make_config) -> None:
    for batch in take(make_config(small_dataset), 5):
        labels, tokens = batch.labels_BT, batch.tokens_BT
        # every document of this source ends with id 0, and 0 occurs nowhere else
        assert torch.equal(labels == IGNORE_LABEL, tokens == 0)
        inside = labels[:, :-1] != IGNORE_LABEL
        assert torch.equal(labels[:, :-1][inside], tokens[:, 1:][inside])
        starts = torch.zeros_like(tokens).flatten()
        starts[batch.cu_seqlens_S[:-1].long()] = 1
        assert torch.equal(starts.view_as(tokens).bool(), batch.positions_BT == 0)


def test_without_isolation_a_row_is_one_segment_and_no_label_is_masked(small_dataset: Path, make_config) -> None:
    (batch,) = take(make_config(small_dataset, isolate=False), 1)
    assert batch.cu_seqlens_S.tolist() == list(range(0, 24 * 32 + 1, 32)) and batch.max_seqlen == 32
    assert batch.label_count == 24 * 32
    assert torch.equal(batch.positions_BT, torch.arange(32).expand(24, 32))


def trained_on(config, until: int, schedule: list[int], world_size: int, windows=()) -> list[int]:
    """The samples of steps of the batch sizes in `schedule` in turn, every step read by a stream opened anew."""
    seen, position = [], 0
    for batch_size in schedule:
        if position >= until:
            return seen
        resized = replace(config, data=replace(config.data, global_batch_size=batch_size))
        for rank in range(world_size):
            opened = stream.open_stream(resized, rank, world_size, samples_seen=position, skip_windows=windows)
            seen += next(opened).samples_B.tolist()
        position = opened.samples_seen
    return seen


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_stops_world_sizes_and_batch_sizes_never_change_what_comes_next(small_dataset: Path, make_config, data) -> None:
    config = make_config(small_dataset)
    world_size = data.draw(st.sampled_from([1, 2, 3, 4, 8]))
    schedule = data.draw(st.lists(st.sampled_from([24, 48, 72]), min_size=1, max_size=4))
    windows = data.draw(st.lists(st.tuples(st.integers(0, 150), st.integers(0, 40)), max_size=3))
    windows = [(first, first + length) for first, length in windows]
    skipped = {number for first, last in windows for number in range(first, last)}
    seen = trained_on(config, 10**9, schedule, world_size, windows)
    assert seen == [number for number in range(1000) if number not in skipped][: len(seen)]
    assert len(seen) == sum(schedule)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_schedule_of_sizes_reads_the_same_samples_in_the_same_order(small_dataset: Path, make_config, data) -> None:
    """Every rank of every number of them, whether it reads on, ahead, or is opened anew between any two steps."""
    world_size, parts = data.draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (8, 4)]))
    sizes, changes = st.sampled_from([24, 48, 72]), st.integers(2, 9)
    first = data.draw(sizes)
    schedule = sorted(data.draw(st.dictionaries(changes, sizes, max_size=3)).items())
    sections = tuple(schema.BatchChangeSection(start_step=step, global_batch_size=rows) for step, rows in schedule)
    prefetch = data.draw(st.sampled_from([0, 2]))
    config = make_config(small_dataset, batch=first, batch_schedule=sections, prefetch=prefetch)
    config = replace(config, engine=replace(config.engine, context_parallel=parts))
    windows = [(one, one + data.draw(st.integers(0, 90))) for one in data.draw(st.lists(st.integers(0, 400)))]
    stops = data.draw(st.sets(st.integers(1, 9)))

    skipped = {number for begin, end in windows for number in range(begin, end)}
    numbers = (number for number in itertools.count() if number not in skipped)
    rows_of = dict(schedule)
    leaders = range(0, world_size, parts)
    ranks = [stream.open_stream(config, rank, world_size, skip_windows=windows) for rank in leaders]
    rows = first
    for step in range(1, 11):
        rows = rows_of.get(step, rows)
        place = ranks[0].samples_seen
        if step - 1 in stops:
            at = {"samples_seen": place, "steps_done": step - 1, "skip_windows": windows}
            ranks = [stream.open_stream(config, rank, world_size, **at) for rank in leaders]
        read = [number for rank in ranks for number in next(rank).samples_B.tolist()]
        assert read == list(itertools.islice(numbers, rows)), step
        assert {(rank.samples_seen, rank.steps_done) for rank in ranks} == {(read[-1] + 1, step)}


def test_a_rewound_stream_takes_the_size_of_the_step_it_stands_at(small_dataset: Path, make_config) -> None:
    change = schema.BatchChangeSection(start_step=3, global_batch_size=8)
    opened = stream.open_stream(make_config(small_dataset, batch=2, batch_schedule=(change,)))
    assert [len(batch.samples_B) for batch in itertools.islice(opened, 5)] == [2, 2, 8, 8, 8]
    opened.samples_seen, opened.steps_done, opened.skip_windows = 2, 1, [(4, 20)]
    assert [batch.samples_B.tolist() for batch in itertools.islice(opened, 2)] == [[2, 3], list(range(20, 28))]


def test_a_skip_window_is_jumped_and_the_rest_stays_as_it_was(small_dataset: Path, make_config) -> None:
    config = make_config(small_dataset)
    plain = take(config, 4)
    opened = stream.open_stream(config)
    next(opened)
    opened.skip_windows = [(40, 60), (50, 72)]
    batch = next(opened)
    assert batch.samples_B.tolist() == [*range(24, 40), *range(72, 80)] and opened.samples_seen == 80
    assert batch.tokens_BT[:16].tolist() == plain[1].tokens_BT[:16].tolist()
    assert batch.tokens_BT[16:].tolist() == plain[3].tokens_BT[:8].tolist()
    opened.samples_seen = 24
    assert next(opened).samples_B.tolist() == batch.samples_B.tolist(), "a rewind jumps the window again"


def test_small_steps_that_are_read_together_are_those_read_alone(small_dataset: Path, make_config) -> None:
    config = make_config(small_dataset, batch=2)
    opened = stream.open_stream(config)
    for number in range(40):
        if number == 18:
            opened.samples_seen = 6
        if number == 29:
            opened.skip_windows = [(opened.samples_seen + 1, opened.samples_seen + 5)]
        alone = stream.open_stream(config, samples_seen=opened.samples_seen, skip_windows=opened.skip_windows)
        assert joined([next(opened)]) == joined([next(alone)])
        assert opened.samples_seen == alone.samples_seen


@pytest.mark.parametrize("prefetch", [1, 3])
def test_reading_ahead_changes_no_batch(small_dataset: Path, make_config, prefetch: int) -> None:
    plain, ahead = (stream.open_stream(make_config(small_dataset, prefetch=n)) for n in (0, prefetch))
    for _ in range(5):
        assert joined([next(plain)]) == joined([next(ahead)])
    for opened in (plain, ahead):
        opened.samples_seen, opened.skip_windows = 48, [(80, 100)]
    for _ in range(4):
        assert joined([next(plain)]) == joined([next(ahead)])
        assert plain.samples_seen == ahead.samples_seen


@pytest.mark.parametrize("options", [{}, {"packing": "best_fit"}, {"shuffle": "block"}])
def test_a_memory_map_reads_what_pread_reads(small_dataset: Path, make_config, options: dict) -> None:
    first, second = (
        take(make_config(small_dataset, reader=reader, **options), 3) for reader in ("pread", "memory_map")
    )
    assert [joined([batch]) for batch in first] == [joined([batch]) for batch in second]


def mixture_of(make_config, small_dataset: Path, other: Path, weights: tuple[float, float] = (3.0, 1.0), **options):
    sources = (
        schema.SourceSection(name="old", path=str(small_dataset / "train"), weight=weights[0]),
        schema.SourceSection(name="new", path=str(other / "train"), weight=weights[1]),
    )
    return make_config(small_dataset, train="", sources=sources, **options)


def tokens_of_rows(batch: stream.Batch) -> np.ndarray:
    """How many tokens each row holds, by the places that the model is told of."""
    rows, T = batch.tokens_BT.shape
    return np.full(rows, T) if batch.real_R is None else np.bincount(batch.real_R // T, minlength=rows)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_ranks_that_share_rows_read_the_same_ones_and_each_its_own_part(
    small_dataset: Path, make_config, packing: str
) -> None:
    config = make_config(small_dataset, packing=packing)
    shared = replace(config, engine=replace(config.engine, context_parallel=4))
    for group in range(3):
        (whole,) = take(config, 1, group, 3)
        micro = next(whole.micro_batches(3))
        batches = [take(shared, 1, 4 * group + place, 12)[0] for place in range(4)]
        for complete, parts in ((whole, batches), (micro, [next(batch.micro_batches(3)) for batch in batches])):
            for name in ("tokens_BT", "labels_BT", "positions_BT"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(complete, name))
            assert sum(part.label_count for part in parts) == complete.label_count
            assert sum(part.token_count for part in parts) == complete.token_count
            for part in parts:
                assert torch.equal(part.cu_seqlens_S, complete.cu_seqlens_S) and part.max_seqlen == complete.max_seqlen
                assert joined([part.whole]) == joined([complete])
            if complete.real_R is not None:
                tokens = sum(tokens_of_rows(part) for part in parts)
                assert tokens.tolist() == tokens_of_rows(complete).tolist()
                assert [part.real_R.numel() for part in parts] == [part.token_count for part in parts]


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_that_fill_up_a_validation_hold_no_token(
    small_dataset: Path, make_config, packing: str, world_size: int
) -> None:
    config = make_config(small_dataset, packing=packing)
    config = replace(config, validation=replace(config.validation, rows=5))
    found = {}
    for rank in range(world_size):
        for batch in stream.validation_batches(config, rank, world_size):
            for sample, tokens in zip(batch.samples_B.tolist(), tokens_of_rows(batch).tolist(), strict=True):
                assert (tokens == 0) is (sample == -1)
                found[sample] = tokens
    assert sorted(found)[-5:] == [0, 1, 2, 3, 4]
    if packing == "concat":
        assert {found[sample] for sample in range(5)} == {config.model.seq_len}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("other")
    write_dataset(directory, vocab_size=97, documents=60, seed=8, max_length=300, documents_per_shard=40)
    return directory


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_mixture_is_the_rows_of_its_sources_in_their_own_order(
    small_dataset: Path, other: Path, make_config, packing: str
) -> None:
    batches = take(mixture_of(make_config, small_dataset, other, packing=packing, batch=64), 40)
    samples = stream.open_stream(mixture_of(make_config, small_dataset, other, packing=packing)).samples
    sources_N, _ = samples.mixture.samples(0, 40 * 64)
    tokens = torch.cat([batch.tokens_BT for batch in batches])
    labels = torch.cat([batch.labels_BT for batch in batches])
    filled = np.concatenate([tokens_of_rows(batch) for batch in batches])
    for place, source in enumerate(samples.sources):
        own = np.flatnonzero(sources_N == place)
        rows_N = source.order.rows(0, len(own))
        assert np.array_equal(tokens[own].numpy(), source.rows.read(rows_N)[:, :-1])
        masked = (labels[own] == IGNORE_LABEL).flatten().nonzero().flatten().tolist()
        assert masked == sorted(source.rows.layout(rows_N).masked_M.tolist())
        assert packing == "concat" or all(batch.real_R is not None for batch in batches), "ranks compute one graph"
        filled_N = source.rows.layout(rows_N).filled_N
        full_N = np.full(len(own), tokens.shape[1])
        assert np.array_equal(filled[own], full_N if filled_N is None else filled_N)
    assert np.bincount(sources_N).tolist() == [40 * 48, 40 * 16]


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_a_mixture_is_the_same_for_every_world_size(
    small_dataset: Path, other: Path, make_config, world_size: int
) -> None:
    config = mixture_of(make_config, small_dataset, other)
    alone = take(config, 3, samples_seen=1000 * 24)
    ranks = [take(config, 3, rank, world_size, samples_seen=1000 * 24) for rank in range(world_size)]
    for step in range(3):
        assert joined([batches[step] for batches in ranks]) == joined([alone[step]])


def test_sources_of_two_widths_are_read_as_the_wider_one(small_dataset: Path, make_config, tmp_path: Path) -> None:
    """An importer may store 32 bits where ours stores 16."""
    wide = Path(shutil.copytree(small_dataset / "train", tmp_path / "wide"))
    manifest = json.loads((wide / "manifest.json").read_text())
    entries = []
    for index, shard in enumerate(manifest["shards"]):
        ids = np.fromfile(small_dataset / "train" / shard["tok"]["file"], dtype="<u2")
        ends = np.fromfile(small_dataset / "train" / shard["doc"]["file"], dtype="<i8")
        documents = ((part, len(part) - 1) for part in np.split(ids, ends[:-1]))
        entries.append(write_shard(wide, index, documents, vocab_size=97, dtype="uint32"))
    entry = ShardSet.open(small_dataset / "train").manifest.tokenizer
    publish_dataset(wide, entries, entry, dtype="uint32", corpus={})
    sources = (
        schema.SourceSection(name="old", path=str(small_dataset / "train"), weight=1.0),
        schema.SourceSection(name="new", path=str(wide), weight=1.0),
    )
    mixed = make_config(small_dataset, train="", sources=sources)
    narrow = make_config(
        small_dataset, train="", sources=tuple(replace(one, path=str(small_dataset / "train")) for one in sources)
    )
    assert take(mixed, 1)[0].rows_BW.dtype == np.dtype("<u4")
    assert [joined([one]) for one in take(mixed, 20)] == [joined([one]) for one in take(narrow, 20)]


def test_the_content_id_of_a_mixture_covers_every_source(small_dataset: Path, other: Path, make_config) -> None:
    both = stream.open_stream(mixture_of(make_config, small_dataset, other)).content_id
    changed = stream.open_stream(mixture_of(make_config, small_dataset, small_dataset)).content_id
    assert len({both, changed, stream.open_stream(make_config(small_dataset)).content_id}) == 3


def test_the_trillionth_sample_is_found_like_the_first(small_dataset: Path, make_config) -> None:
    opened = stream.open_stream(make_config(small_dataset, isolate=False))
    opened.samples_seen = 10**12
    batch = next(opened)
    n = opened.samples_per_epoch
    rows = Permutation(n, seed=0, source="train", epoch=10**12 // n).forward(np.arange(24) + 10**12 % n)
    assert np.array_equal(batch.tokens_BT.numpy(), opened.samples.sources[0].rows.read(rows)[:, :-1])


def test_seed_changes_the_order_and_nothing_else_in_the_set_of_rows(small_dataset: Path, make_config) -> None:
    epoch = stream.open_stream(make_config(small_dataset)).samples_per_epoch
    first, second = (
        [batch.tokens_BT[0].tolist() for batch in take(make_config(small_dataset, seed=seed, batch=1), epoch)]
        for seed in (0, 1)
    )
    assert first != second and sorted(first) == sorted(second)


@pytest.mark.parametrize("rows", [0, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_is_the_first_rows_in_order_for_every_world_size(
    small_dataset: Path, make_config, world_size: int, rows: int
) -> None:
    config = make_config(small_dataset, rows=rows, micro=2)
    ranks = [list(stream.validation_batches(config, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert {batch.tokens_BT.shape for batches in ranks for batch in batches} == {(2, 32)}
    numbers, labels = [], 0
    for step in zip(*ranks, strict=True):
        numbers += [n for batch in step for n in batch.samples_B.tolist()]
        labels += sum(batch.label_count for batch in step)
    kept = [n for n in numbers if n >= 0]
    everything = make_config(small_dataset, rows=rows, micro=1)
    alone = list(stream.validation_batches(everything))
    assert kept == list(range(len(alone))) and (rows == 0 or len(kept) == rows)
    assert numbers[: len(kept)] == kept
    assert labels == sum(batch.label_count for batch in alone)


def test_ranks_that_share_rows_validate_on_the_parts_of_the_rows_that_one_rank_reads(
    small_dataset: Path, make_config
) -> None:
    held_out = stream.ValidationSet(make_config(small_dataset, rows=7, micro=2))
    groups = [list(held_out.batches(rank, 2)) for rank in range(2)]
    parts = [list(held_out.batches(rank, 4, parts=2)) for rank in range(4)]
    for group in range(2):
        for whole, *halves in zip(groups[group], *parts[2 * group : 2 * group + 2], strict=True):
            assert all(half.samples_B.tolist() == whole.samples_B.tolist() for half in halves)
            for name in ("tokens_BT", "labels_BT", "positions_BT"):
                assert torch.equal(torch.cat([getattr(half, name) for half in halves], 1), getattr(whole, name))


def test_unigram_entropy_is_that_of_the_counted_tokens(small_dataset: Path, make_config) -> None:
    config = make_config(small_dataset)
    shards = ShardSet.open(config.data.validation)
    ids = np.concatenate([shards.read(i, 0, s.tokens) for i, s in enumerate(shards.manifest.shards)]).tolist()
    bits = -sum(np.log2(ids.count(one) / len(ids)) for one in ids)
    text = sum(stream.bytes_per_id(config)[one].item() for one in ids)
    assert text == sum(1 for one in ids if one != 0) == shards.manifest.text_bytes
    assert stream.unigram_bits_per_byte(config) == pytest.approx(bits / text, rel=1e-12)


def test_a_missing_dataset_and_an_unfinished_one_are_configuration_errors(tmp_path: Path, make_config) -> None:
    with pytest.raises(ConfigError, match="data.train.*no such"):
        stream.open_stream(make_config(tmp_path / "nowhere"))
    (tmp_path / "train").mkdir()
    with pytest.raises(ConfigError, match="manifest.json"):
        stream.open_stream(make_config(tmp_path))


def test_another_vocabulary_size_is_a_configuration_error_that_says_which(small_dataset: Path, make_config) -> None:
    for open_it in (stream.open_stream, stream.validation_batches, stream.bytes_per_id, stream.unigram_bits_per_byte):
        with pytest.raises(ConfigError, match="model.vocab_size = 98.*97"):
            open_it(make_config(small_dataset, vocab=98))


def test_a_row_longer_than_every_shard_is_refused(small_dataset: Path, make_config) -> None:
    with pytest.raises(ConfigError, match="model.seq_len"):
        stream.open_stream(make_config(small_dataset, seq_len=1_000_000))


def test_a_global_batch_that_does_not_divide_by_the_ranks_is_refused(small_dataset: Path, make_config) -> None:
    with pytest.raises(ConfigError, match="data.global_batch_size = 24"):
        stream.open_stream(make_config(small_dataset), 0, 5)


def test_validation_of_another_tokenizer_is_refused(
    small_dataset: Path, tmp_path: Path, make_config, text_dataset
) -> None:
    shutil.copytree(text_dataset / "train", tmp_path / "train")
    vocab = ShardSet.open(tmp_path / "train").vocab_size
    write_dataset(tmp_path / "other", vocab_size=vocab, documents=30)
    shutil.copytree(tmp_path / "other" / "validation", tmp_path / "validation")
    with pytest.raises(ConfigError, match="another tokenizer"):
        stream.validation_batches(make_config(tmp_path, vocab=vocab))


def test_a_damaged_row_stops_the_step_and_leaves_the_count(small_dataset: Path, tmp_path: Path, make_config) -> None:
    shutil.copytree(small_dataset, tmp_path / "copy")
    for path in (tmp_path / "copy" / "train").glob("*.tok"):
        path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))
    opened = stream.open_stream(make_config(tmp_path / "copy"), samples_seen=48)
    with pytest.raises(DataError, match="CRC-32"):
        next(opened)
    assert opened.samples_seen == 48


@pytest.mark.parametrize(("prefetch", "trouble"), [(0, KeyboardInterrupt), (0, MemoryError), (2, MemoryError)])
def test_a_stream_whose_planning_broke_off_goes_on_where_it_was(
    small_dataset: Path,
    make_config,
    monkeypatch: pytest.MonkeyPatch,
    prefetch: int,
    trouble: type[BaseException],
) -> None:
    """The generator that plans is at its end then: that must not look like the end of the data."""
    opened = stream.open_stream(make_config(small_dataset, prefetch=prefetch))
    next(opened)
    opened.samples_seen = 24

    def broken(*_: object) -> None:
        raise trouble

    with monkeypatch.context() as patch, pytest.raises(trouble):
        patch.setattr(opened.samples, "layout", broken)
        next(opened)
    assert opened.samples_seen == 24
    assert joined([next(opened)]) == joined([take(make_config(small_dataset), 2)[1]])


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("read_bytes", [1, 1 << 20])
def test_an_interrupt_between_taking_a_batch_and_counting_it_loses_no_step(
    small_dataset: Path, make_config, monkeypatch: pytest.MonkeyPatch, prefetch: int, read_bytes: int
) -> None:
    """Be it the last one of those that were read together, or not."""
    monkeypatch.setattr(stream, "_READ_BYTES", read_bytes)
    opened = stream.open_stream(make_config(small_dataset, batch=2, prefetch=prefetch))
    left = []
    for number in range(40):
        if number % 5 == 4:
            if not opened._batches:
                opened._refill()
            opened._batches.popleft()
            left.append(len(opened._batches))
        assert next(opened).samples_B.tolist() == [2 * number, 2 * number + 1]
    assert set(left) == {0} if read_bytes == 1 else min(left) > 0


@pytest.mark.parametrize("sources", [1, 2])
@pytest.mark.parametrize("options", [{}, {"prefetch": 2}, {"isolate": False}, {"packing": "best_fit"}])
@pytest.mark.parametrize("read_bytes", [1, 200, 500])
def test_every_step_of_a_plan_is_given_once_however_few_are_read_together(
    small_dataset: Path,
    other: Path,
    make_config,
    monkeypatch: pytest.MonkeyPatch,
    sources: int,
    options: dict,
    read_bytes: int,
) -> None:
    """Rows of a real run are so long that a plan is read in many parts, in most of which a light source has no row."""
    config = make_config(small_dataset, batch=2, **options)
    if sources == 2:
        config = mixture_of(make_config, small_dataset, other, weights=(30.0, 1.0), batch=2, **options)
    whole = take(config, 60)
    monkeypatch.setattr(stream, "_READ_BYTES", read_bytes)
    parts = take(config, 60)
    assert [joined([one]) for one in parts] == [joined([one]) for one in whole]
    assert [n for one in parts for n in one.samples_B.tolist()] == list(range(120))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_read_that_fails_amid_a_plan_loses_no_step(
    small_dataset: Path, other: Path, make_config, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    config = mixture_of(make_config, small_dataset, other, batch=2, packing=packing)
    expected = take(config, 30)
    monkeypatch.setattr(stream, "_READ_BYTES", 1)
    opened = stream.open_stream(config)
    read_pieces, reads = Files.read_pieces, itertools.count(1)

    def sometimes(*arguments: object) -> bytearray:
        if next(reads) % 5 == 0:
            raise MemoryError
        return read_pieces(*arguments)

    monkeypatch.setattr(Files, "read_pieces", sometimes)
    given, failed = [], 0
    while len(given) < 30:
        try:
            given.append(next(opened))
        except MemoryError:
            failed += 1
    assert failed > 5
    assert [joined([one]) for one in given] == [joined([one]) for one in expected]


def test_what_is_read_ahead_keeps_no_process_alive(small_dataset: Path, make_config, tmp_path: Path) -> None:
    """A store that hangs must not hold back a run that has failed: half an hour of reads may be queued."""
    program = f"""
import time
from pathlib import Path
from kha_train.config.compose import load
from kha_train.data.stream import open_stream
stream = open_stream(load(Path("{tmp_path}/config.yaml")))
next(stream)
stream.samples_seen = 480
stream._reader.submit(lambda: time.sleep(60))
"""
    (tmp_path / "config.yaml").write_text(dump(make_config(small_dataset, prefetch=4)))
    subprocess.run([sys.executable, "-c", program], check=True, timeout=40)


def test_a_process_that_ends_amid_a_read_keeps_its_exit_code() -> None:
    """A thread that Python stops amid a call of torch aborts the process with 134."""
    program = """
import sys
import torch
from kha_train.data.ahead import InOrder
torch.set_num_threads(1)
reader = InOrder("reader")
first = reader.submit(lambda: None)
for _ in range(10_000):
    reader.submit(lambda: [torch.ones(300).sort() for _ in range(200)])
first.result()
sys.exit(3)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=40).returncode == 3


def test_a_dropped_stream_ends_its_thread(small_dataset: Path, make_config) -> None:
    before = set(threading.enumerate())
    opened = stream.open_stream(make_config(small_dataset, prefetch=1))
    next(opened)
    (thread,) = set(threading.enumerate()) - before
    del opened
    deadline = time.monotonic() + 10
    while thread.is_alive():
        # What is being read at this moment still holds it.
        gc.collect()
        assert time.monotonic() < deadline
        time.sleep(0.01)
