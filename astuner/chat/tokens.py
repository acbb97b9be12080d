"""Text to ids and back with one tokenizer, from any thread.

The fast tokenizers of transformers may not be used by two threads at once, so every
use in this room goes through one lock. Knows no messages.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from astuner.errors import RequestError
from astuner.types import TokenIds, token_ids


class Tokens:
    """A transformers tokenizer that may be shared."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.lock = threading.RLock()
        self.added: dict[str, int] = {
            token.content: i for i, token in tokenizer.added_tokens_decoder.items()
        }
        """Special and other whole-word tokens: text is always split at them."""

    def encode(self, text: str) -> TokenIds:
        """Ids [T] of the text as it stands: nothing is put before or after it.

        RequestError (400) for half a surrogate pair, which JSON can hold but UTF-8 cannot.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"The messages are not valid Unicode: {error}") from error
        with self.lock:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return token_ids(ids)

    def decode(self, ids: Sequence[int] | TokenIds, *, skip_special: bool = True) -> str:
        with self.lock:
            return self.tokenizer.decode(
                np.asarray(ids).tolist(),
                skip_special_tokens=skip_special,
                clean_up_tokenization_spaces=False,
            )

    def eos_ids(self) -> tuple[int, ...]:
        """The tokenizer's end of text, and those of the model's generation config."""
        ids = [self.tokenizer.eos_token_id]
        folder = str(self.tokenizer.name_or_path or "")
        path = Path(folder) / "generation_config.json"
        if folder and path.is_file():
            listed = json.loads(path.read_text()).get("eos_token_id")
            ids += listed if isinstance(listed, list) else [listed]
        return tuple(dict.fromkeys(i for i in ids if i is not None))
