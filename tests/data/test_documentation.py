"""docs/data.md explains how to read a dataset without kha_train: it must work."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from data_tools.corpus import read_split
from kha_train.data.tokenizer_kinds import open_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_foreign_reader_of_the_documentation_reads_a_dataset(text_dataset: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "shards").symlink_to(text_dataset)
    code += "print(json.dumps([document.tolist() for document in documents]))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    documents = json.loads(run.stdout)
    tokenizer = open_tokenizer(text_dataset / "train" / "tokenizer.model")
    texts = [tokenizer.decode(document) for document in documents]
    assert texts == [document.text for document in read_split(text_dataset / "corpus", "train")]
    assert {document[-1] for document in documents} == {tokenizer.special_ids["eos"]}
