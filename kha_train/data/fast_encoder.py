"""Wraps gigatoken, which encodes several times faster than sentencepiece with the same BPE model. The only user of
gigatoken; nothing depends on it.

Its ids equal those of sentencepiece with one exception: text that spells a control piece, such as `</s>`, becomes the
control id. `tokenizer.Tokenizer` keeps such texts away from it. Ids are compared with sentencepiece's on a sample of
every corpus before any is used, and again on a part of all batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kha_train.errors import ConfigError


class FastEncoder:
    """A model loaded by gigatoken, from the content of a sentencepiece model or of a `tokenizer.json`; `version` is the
    library's. Raises ConfigError when the library is missing or rejects the model.
    """

    def __init__(self, *, sentencepiece: bytes = b"", tokenizer_json: bytes = b"") -> None:
        fix = "pip install 'kha_train[fast]', or --encoder library"
        try:
            import gigatoken
        except ImportError as error:
            raise ConfigError(f"cannot be imported: {error}", field="encoder", value="gigatoken", fix=fix) from error
        from importlib.metadata import version
        from importlib.util import find_spec

        if find_spec("awkward") is None:
            # Without it the library returns lists, and slowly.
            raise ConfigError("needs the package awkward", field="encoder", value="gigatoken", fix=fix)
        self.version = version("gigatoken")
        try:
            self._tokenizer = (
                gigatoken.Tokenizer.from_json(tokenizer_json)
                if tokenizer_json
                else gigatoken.Tokenizer.from_sentencepiece(sentencepiece)
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ConfigError(f"rejects this model: {error}", field="encoder", value="gigatoken", fix=fix) from error

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids (int32) of each text."""
        if not texts:
            return []
        layout = self._tokenizer.encode_batch(list(texts)).layout
        offsets = np.asarray(layout.offsets.data)
        return np.split(np.asarray(layout.content.data).astype(np.int32)[: offsets[-1]], offsets[1:-1])
