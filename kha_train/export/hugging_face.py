"""The only user of transformers: loads an export, and checks one.

As a program of its own, `python -I hugging_face.py REQUEST`, it is the second half of an export's verification. It
loads the export as anybody would, and cannot import the trainer: it imports nothing of it at its top, Python's `-I`
keeps its directory out of the path, and `Fence` refuses an installed one. What it compares is in the directory REQUEST,
see `check`.
"""

# B rows   T tokens   V vocabulary

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HEADS = "kha_heads"
HEADS_FILE = "kha_heads.json"
REQUEST, ANSWER = "request.json", "answer.json"
TRAINER = ("kha_train", "data_tools")


class Fence:
    """A finder of modules that refuses the trainer's, installed or not."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Raises ImportError for a module of the trainer; others are left to the finders behind."""
        if name.partition(".")[0] in TRAINER:
            raise ImportError(f"{name} is the trainer's, and this process does without")
        return None


def missing() -> str | None:
    """Why no export can be loaded on this machine, or None; nothing is imported for the answer."""
    return None if find_spec("transformers") else "transformers is not installed"


def load(directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of an export in `directory`, with the heads that belong to it. It runs no code from there, and opens no
    pickle.

    Raises ValueError when a tensor is missing or left over, for a damaged file, and for a value of config.json that its
    class refuses; otherwise as transformers and `kha_heads` do.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    # A relative path that is no directory would be taken for the name of a model on the hub.
    directory = Path(directory).resolve()
    auto: Any = transformers.AutoModelForCausalLM
    try:
        model, told = auto.from_pretrained(
            directory, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            output_loading_info=True,
        )  # fmt: skip
    except (SafetensorError, StrictDataclassError) as error:
        raise ValueError(str(error)) from error
    if faults := {kind: sorted(map(str, found))[:3] for kind, found in told.items() if found}:
        raise ValueError(f"the tensors do not fit the class {type(model).__name__}: {faults}")
    if (directory / HEADS_FILE).is_file():
        heads().load(model, directory)
    ready: nn.Module = model.eval()
    return ready


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of an export, as transformers loads it."""
    import transformers

    return transformers.AutoTokenizer.from_pretrained(
        Path(directory).resolve(), local_files_only=True, trust_remote_code=False
    )


def bare(values: dict[str, Any]) -> nn.Module:
    """The model that a config.json of such `values` describes, on `meta`."""
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = auto.from_config(transformers.AutoConfig.for_model(**values))
    return model


def heads() -> ModuleType:
    """The package `kha_heads`: the one of this tree, under the name that it has where there is no trainer."""
    if HEADS not in sys.modules:
        place = Path(__file__).resolve().parents[1] / "heads"
        spec = spec_from_file_location(HEADS, place / "__init__.py", submodule_search_locations=[str(place)])
        assert spec is not None and spec.loader is not None
        sys.modules[HEADS] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[HEADS])
    return sys.modules[HEADS]


def check(request: Path) -> dict[str, Any]:
    """What the directory `request` asks: `request.json` names the export, and texts with their ids; `tokens.npy` [B, T]
    and `logits.npy` [B, T, V] are the trainer's. The largest difference of logits at each token, and the texts with
    other ids or other bytes after decoding.
    """
    asked = json.loads((request / REQUEST).read_text())
    directory = Path(asked["directory"])
    answer: dict[str, Any] = {
        "versions": {name: version(name) for name in ("transformers", "torch", "safetensors")},
        "trainer": _trainer(),
    }
    tokens_BT, logits_BTV = (torch.from_numpy(np.load(request / f"{name}.npy")) for name in ("tokens", "logits"))
    model = load(directory)
    with torch.no_grad():
        theirs_BTV: Tensor = model(tokens_BT).logits
    answer["class"] = type(model).__name__
    answer["difference"] = (theirs_BTV - logits_BTV).abs().amax(-1).tolist()
    if asked["ids"]:
        answer["tokenizer"] = check_tokenizer(directory, asked["lines"], asked["ids"])
    return answer


def _trainer() -> str:
    """Proves that the trainer cannot be imported here."""
    for name in TRAINER:
        try:
            __import__(name)
        except ImportError:
            continue
        return f"{name} can be imported"
    return "cannot be imported"


def check_tokenizer(directory: Path, lines: list[str], ids: list[list[int]]) -> dict[str, Any]:
    """The `lines` to which the tokenizer in `directory` gives other ids than `ids`, and those whose text is lost."""
    tokenizer = load_tokenizer(directory)
    other: list[str] = []
    lossy: list[str] = []
    for line, expected in zip(lines, ids, strict=True):
        found = tokenizer(line, add_special_tokens=False)["input_ids"]
        if found != expected:
            other.append(line)
        elif tokenizer.decode(found, clean_up_tokenization_spaces=False) != line:
            lossy.append(line)
    return {"class": type(tokenizer).__name__, "other_ids": other, "other_text": lossy}


def main(request: str) -> None:
    """Answer the `request` in a file beside it."""
    sys.meta_path.insert(0, Fence())
    answer = check(Path(request))
    (Path(request) / ANSWER).write_text(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1])
