"""Reads a dataset through a shared cache and prints a hash of its ids; every fetch of a token block is logged."""

from __future__ import annotations

import hashlib
import sys

import fsspec

from kha_train.data.format.shards import ShardSet
from kha_train.data.remote import store as remote


class Logged(fsspec.get_filesystem_class("file")):
    """The local file system, its reads written down."""

    protocol = "logged"

    def cat_file(self, path: str, start=None, end=None, **options) -> bytes:
        """As the local file system."""
        if path.endswith(".tok"):
            with open(sys.argv[3], "a") as log:
                log.write(f"{path} {start}\n")
        return super().cat_file(path, start=start, end=end, **options)


def main() -> None:
    """argv: dataset, cache, log."""
    fsspec.register_implementation("logged", Logged)
    remote.BLOCK_BYTES = 1 << 16
    shards = ShardSet.open(f"logged://{sys.argv[1]}", cache=sys.argv[2])
    digest = hashlib.sha256()
    for index, shard in enumerate(shards.manifest.shards):
        digest.update(shards.read(index, 0, shard.tokens).tobytes())
    print(digest.hexdigest())


if __name__ == "__main__":
    main()
