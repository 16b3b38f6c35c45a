"""Adapters of other data loaders for `kha bench data`: how each format is written, how it is read.

They run in the peers' own environment, which has only the contract of ours. A peer's format is made once from
our shards and kept beside them. Every loader yields batches of int64 ids in one process, in an order as random as the
peer offers: a global shuffle, except for litdata (chunks, and inside chunks) and mosaicml-streaming (windows of 2^18
samples). None uses threads, except OLMo-core in its default setting, which starts four.
"""

# B rows  L tokens of a row

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from kha_train.bench.peers import LoaderPeer, Opened, Shape

SEED = 1
EOS, PAD = 1, 0
_CHUNK_BYTES = 64 << 20


def permuted(dataset: Any, B: int, row: Callable[[Any], Any]) -> Opened:
    """Batches of a dataset indexed by row number, with the rows permuted as torch's own sampler does it."""
    order = np.random.default_rng(SEED).permutation(len(dataset))

    def batches(step: int) -> Iterator[torch.Tensor]:
        """Batches from `step` on, endlessly."""
        for number in itertools.count(step):
            first = number * B % (len(order) - B)
            yield torch.stack([torch.as_tensor(row(dataset[int(i)])) for i in order[first : first + B]]).long()

    return Opened(batches(0), batches)


def _shards(ours: Path) -> list[np.ndarray]:
    return [np.memmap(path, dtype="<u2", mode="r") for path in sorted(ours.glob("*.tok"))]


def _documents(ours: Path) -> Iterator[np.ndarray]:
    for path in sorted(ours.glob("*.tok")):
        ends = np.fromfile(path.with_suffix(".doc"), dtype="<i8")
        yield from np.split(np.memmap(path, dtype="<u2", mode="r"), ends[:-1])


def _write_nothing(ours: Path, directory: Path, shape: Shape) -> None:
    """Does nothing: this peer reads our files directly."""


def _write_datatrove(ours: Path, directory: Path, shape: Shape) -> None:
    for path in sorted(ours.glob("*.tok")):
        os.link(path, directory / f"{path.stem}.ds")
        os.link(path.with_suffix(".doc"), directory / f"{path.stem}.ds.index")


def _open_datatrove(directory: Path, shape: Shape) -> Opened:
    module = import_module("datatrove.utils.dataset")
    dataset = module.DatatroveFolderDataset(str(directory), shape.L, token_size=2)
    return permuted(dataset, shape.B, lambda item: item["input_ids"][: shape.L])


def _open_grain(directory: Path, shape: Shape) -> Opened:
    grain = import_module("grain")
    files = _shards(directory.with_name("ours"))
    rows = [(len(file) - 1) // shape.L for file in files]
    ends = np.cumsum(rows)

    class Source:
        """Rows of memory-mapped files by number, as grain asks for them."""

        def __len__(self) -> int:
            return int(ends[-1])

        def __getitem__(self, index: int) -> np.ndarray:
            shard = int(np.searchsorted(ends, index, side="right"))
            start = (index - int(ends[shard]) + rows[shard]) * shape.L
            return files[shard][start : start + shape.L].astype(np.int64)

    def batches(step: int) -> Iterator[torch.Tensor]:
        """Batches from `step` on."""
        data = grain.MapDataset.source(Source()).seed(SEED).shuffle().repeat().batch(shape.B)
        for number in range(step, len(data)):
            yield torch.from_numpy(data[number])

    return Opened(batches(0), batches)


def _write_litdata(ours: Path, directory: Path, shape: Shape) -> None:
    # Not with `optimize`, which cleans up directories that it chooses itself.
    loader = import_module("litdata.streaming.item_loader").TokensLoader(shape.L)
    writer = import_module("litdata.streaming.writer").BinaryWriter(
        str(directory), chunk_bytes=_CHUNK_BYTES, item_loader=loader
    )
    number = itertools.count()
    for ids in _shards(ours):
        for first in range(0, len(ids) - shape.L + 1, shape.L):
            writer[next(number)] = torch.from_numpy(ids[first : first + shape.L].copy())
    writer.done()
    writer.merge()


def _open_litdata(directory: Path, shape: Shape) -> Opened:
    litdata = import_module("litdata")

    def loader(step: int) -> Any:
        """A loader that begins at `step`."""
        dataset = litdata.StreamingDataset(
            str(directory),
            item_loader=litdata.TokensLoader(block_size=shape.L),
            shuffle=True,
            drop_last=True,
            seed=SEED,
        )
        made = litdata.StreamingDataLoader(dataset, batch_size=shape.B, num_workers=0)
        if step:
            state = {"dataset": dataset.state_dict(step * shape.B, 0, shape.B), "current_epoch": 1}
            made.load_state_dict(state | {"latest_worker_idx": 0, "num_samples_yielded": step * shape.B})
        return made

    def batches(step: int) -> Iterator[torch.Tensor]:
        """Batches from `step` on, endlessly."""
        made = loader(step)
        while True:
            for batch in made:
                yield batch.long()

    return Opened(batches(0), batches)


def _streaming() -> ModuleType:
    """mosaicml-streaming. It imports torchvision only for images, and one built for another torch does not load."""
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        stub = ModuleType(name)
        stub.__spec__ = ModuleSpec(name, None)
        stub.__path__ = []
        stub.__dict__.update(VisionDataset=object, CIFAR10=object, to_tensor=None)
        sys.modules[name] = stub
    return import_module("streaming")


def _write_mosaic(ours: Path, directory: Path, shape: Shape) -> None:
    with _streaming().MDSWriter(out=str(directory), columns={"tokens": f"ndarray:uint16:{shape.L}"}) as writer:
        for ids in _shards(ours):
            for first in range(0, len(ids) - shape.L + 1, shape.L):
                writer.write({"tokens": np.asarray(ids[first : first + shape.L])})


def _open_mosaic(directory: Path, shape: Shape) -> Opened:
    streaming = _streaming()
    import_module("streaming.base.util").clean_stale_shared_memory()

    dataset = streaming.StreamingDataset(
        local=str(directory), shuffle=True, shuffle_seed=SEED, batch_size=shape.B, num_canonical_nodes=1
    )
    loader = streaming.StreamingDataLoader(dataset, batch_size=shape.B, num_workers=0, drop_last=True)

    def batches() -> Iterator[torch.Tensor]:
        """Batches, endlessly."""
        while True:
            for batch in loader:
                yield batch["tokens"].long()

    return Opened(batches(), None)


def _open_olmo(directory: Path, shape: Shape, *, threads: int | None) -> Opened:
    """`threads` None: the loader's default, which is four."""
    data = import_module("olmo_core.data")
    loaders = import_module("olmo_core.data.data_loader")
    dataset = data.NumpyFSLDataset(
        *(str(path) for path in sorted(directory.with_name("ours").glob("*.tok"))),
        sequence_length=shape.L,
        pad_token_id=PAD,
        eos_token_id=EOS,
        vocab_size=shape.vocab,
        dtype=np.uint16,
    )
    dataset.work_dir = directory

    def batches(step: int) -> Iterator[torch.Tensor]:
        """Batches from `step` on, endlessly."""
        loader = loaders.NumpyDataLoaderBase.wrap_numpy_dataset(
            dataset,
            global_batch_size=shape.B * shape.L,
            collator=data.DataCollator(pad_token_id=PAD),
            work_dir=directory,
            seed=SEED,
            num_threads=threads,
        )
        for epoch in itertools.count(1):
            loader.reshuffle(epoch=epoch)
            loader.batches_processed = step
            yield from (batch["input_ids"].long() for batch in loader)
            loader.reset()
            step = 0

    return Opened(batches(0), batches)


def _write_megatron(ours: Path, directory: Path, shape: Shape) -> None:
    module = import_module("megatron.core.datasets.indexed_dataset")
    builder = module.IndexedDatasetBuilder(str(directory / "tokens.bin"), dtype=np.uint16)
    for ids in _documents(ours):
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(directory / "tokens.idx"))


class _Vocabulary(NamedTuple):
    """The part of a tokenizer that Megatron needs."""

    vocab_size: int
    eod: int = EOS
    pad: int = PAD
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012


def _open_megatron(directory: Path, shape: Shape) -> Opened:
    gpt = import_module("megatron.core.datasets.gpt_dataset")
    indexed = import_module("megatron.core.datasets.indexed_dataset").IndexedDataset(str(directory / "tokens"))
    config = gpt.GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=shape.L,
        blend=([str(directory / "tokens")], None),
        split="1,0,0",
        path_to_cache=str(directory / "cache"),
        tokenizer=_Vocabulary(shape.vocab),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    split = import_module("megatron.core.datasets.utils").Split.train
    documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
    dataset = gpt.GPTDataset(indexed, str(directory / "tokens"), documents, None, split, config)

    def batches(step: int) -> Iterator[torch.Tensor]:
        """Batches from `step` on, endlessly; the dataset shuffles itself."""
        for number in itertools.count(step):
            first = number * shape.B % (len(dataset) - shape.B)
            yield torch.stack([dataset[i]["tokens"] for i in range(first, first + shape.B)]).long()

    return Opened(batches(0), batches)


PEERS: dict[str, LoaderPeer] = {
    "datatrove": LoaderPeer(_write_datatrove, _open_datatrove),
    "litdata": LoaderPeer(_write_litdata, _open_litdata),
    "grain": LoaderPeer(_write_nothing, _open_grain),
    "olmo-core": LoaderPeer(_write_nothing, partial(_open_olmo, threads=0)),
    "olmo-core, as it comes": LoaderPeer(_write_nothing, partial(_open_olmo, threads=None)),
    "megatron-core": LoaderPeer(_write_megatron, _open_megatron),
    "mosaicml-streaming": LoaderPeer(_write_mosaic, _open_mosaic),
}
PACKAGES = (
    ("datatrove",),
    ("litdata",),
    ("grain",),
    ("ai2-olmo-core",),
    ("megatron-core",),
    ("mosaicml-streaming", "transformers<5"),
)
"""The packages of the peers; if one does not install, the others are still measured."""
