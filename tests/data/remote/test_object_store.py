"""Datasets in an object store: S3's own protocol over loopback, spoken by s3fs to moto's server."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kha_train.data import stream
from kha_train.data.format.shards import ShardSet
from kha_train.data.remote import store as remote
from kha_train.errors import ConfigError, DataError, MachineError

pytestmark = pytest.mark.slow

pytest.importorskip("s3fs")
boto3 = pytest.importorskip("boto3")
threaded = pytest.importorskip("moto.server")
BUCKET, SETS = "corpus", "tokens/v1"


class Store:
    """A bucket of one dataset, and the server that it is in."""

    def __init__(self, dataset: Path) -> None:
        self.server = threaded.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.url = f"s3://{BUCKET}/{SETS}"
        host, port = self.server.get_host_and_port()
        self.endpoint = f"http://{host}:{port}"
        self.client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")
        self.client.create_bucket(Bucket=BUCKET)
        for path in dataset.rglob("*.*"):
            self.put(str(path.relative_to(dataset)), path.read_bytes())

    def put(self, name: str, data: bytes) -> None:
        """Put an object into the dataset."""
        self.client.put_object(Bucket=BUCKET, Key=f"{SETS}/{name}", Body=data)

    def get(self, name: str) -> bytes:
        """The bytes of an object."""
        return self.client.get_object(Bucket=BUCKET, Key=f"{SETS}/{name}")["Body"].read()


@pytest.fixture
def store(small_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """Found as a user's store is: by the environment variables of AWS."""
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.001)
    variables = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    made = Store(small_dataset)
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.endpoint)
    yield made
    made.server.stop()


def at(store: Store, cache: Path) -> dict[str, str]:
    """Where a configuration finds the dataset."""
    return {"train": f"{store.url}/train", "validation": f"{store.url}/validation", "cache_dir": str(cache)}


def take(config, count: int) -> list[tuple]:
    return [
        (batch.samples_B.tolist(), batch.tokens_BT.tolist(), batch.cu_seqlens_S.tolist())
        for batch in itertools.islice(stream.open_stream(config), count)
    ]


@pytest.mark.parametrize("options", [{}, {"packing": "best_fit"}, {"shuffle": "block", "prefetch": 2}])
def test_an_object_store_gives_the_batches_of_the_local_directory(
    store: Store, small_dataset: Path, tmp_path: Path, make_config, options: dict
) -> None:
    there = take(make_config(small_dataset, **options, **at(store, tmp_path)), 12)
    assert there == take(make_config(small_dataset, **options), 12)


def test_a_damaged_object_is_named_by_its_url(store: Store, tmp_path: Path) -> None:
    data = bytearray(store.get("train/shard-00000.tok"))
    data[100] ^= 1
    store.put("train/shard-00000.tok", bytes(data))
    shards = ShardSet.open(f"{store.url}/train", cache=str(tmp_path))
    with pytest.raises(DataError, match=r"s3://corpus/tokens/v1/train/shard-00000.tok.*expected CRC-32 .*, found"):
        shards.read(0, 0, 60)


def test_an_object_that_vanishes_while_it_is_used_is_a_data_error(store: Store, tmp_path: Path) -> None:
    shards = ShardSet.open(f"{store.url}/train", cache=str(tmp_path))
    store.client.delete_object(Bucket=BUCKET, Key=f"{SETS}/train/shard-00001.tok")
    shards.read(0, 0, 10)
    with pytest.raises(DataError, match=r"shard-00001.tok.*no such file"):
        shards.read(1, 0, 10)


def test_an_object_of_another_size_is_found_at_open(store: Store, tmp_path: Path) -> None:
    store.put("train/shard-00001.tok", b"short")
    with pytest.raises(DataError, match=r"shard-00001.tok.*expected .* bytes, found 5"):
        ShardSet.open(f"{store.url}/train", cache=str(tmp_path))


@pytest.mark.parametrize("url", ["s3://corpus/nothing", "s3://no-such-bucket/tokens"])
def test_a_place_without_a_dataset_is_a_configuration_error(store: Store, tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="no such dataset directory"):
        ShardSet.open(url, cache=str(tmp_path))


def test_a_store_that_is_gone_is_the_machines_trouble_and_what_is_cached_still_reads(
    store: Store, small_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    shards = ShardSet.open(f"{store.url}/train", cache=str(tmp_path))
    shards.read(0, 0, 10)
    store.server.stop()
    assert np.array_equal(shards.read(0, 0, 60), ShardSet.open(small_dataset / "train").read(0, 0, 60))
    with pytest.raises(MachineError, match=r"the store did not answer in 2 attempts") as caught:
        shards.read(1, 0, 10)
    assert caught.value.exit_code == 75


def test_a_thousand_objects_are_listed_whole(store: Store, tmp_path: Path) -> None:
    """One answer of S3's listing has at most a thousand names."""
    for number in range(1100):
        store.put(f"train/aside-{number:04d}.txt", b"")
    shards = ShardSet.open(f"{store.url}/train", cache=str(tmp_path))
    assert len(shards.read(0, 0, 10)) == 10
