"""From prompts to embeddings, with the tokenizer and text encoder of an engine directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dipgo_deploy.backends.base import Backend, ChangedWeights
from dipgo_deploy.bundle.manifest import TextEncoderEntry
from dipgo_deploy.errors import UserError
from dipgo_deploy.runtime.component import Component

_log = logging.getLogger(__name__)


class PromptTokenizer:
    """Token ids as the text encoder wants them: cut to ``length``, padded with ``pad_id``.

    Raises:
        UserError: the tokenizer file is missing or broken.
    """

    def __init__(self, engine_dir: Path, entry: TextEncoderEntry) -> None:
        from tokenizers import Tokenizer

        path = engine_dir / entry.tokenizer
        if not path.is_file():
            raise UserError(f"{path}: named in the manifest but missing; export the engine directory again")
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path}: not a tokenizer file ({error}); export the engine directory again") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._length = entry.length
        self._pad_id = entry.pad_id

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Token ids, int64 (prompts, length). A prompt that is too long is cut, with a warning in the log."""
        ids = np.full((len(prompts), self._length), self._pad_id, np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            self._tokenizer.no_truncation()
            whole = self._tokenizer.encode(prompt).ids
            if len(whole) > self._length:
                _log.warning("prompt cut from %d to %d tokens: %r", len(whole), self._length, prompt)
                self._tokenizer.enable_truncation(self._length)  # keeps the closing special token
                whole = self._tokenizer.encode(prompt).ids
            row[: len(whole)] = whole
        return ids


class TextEncoder:
    """Prompts -> embeddings. ``weights`` take the place of the encoder's where they change them.

    Raises:
        UserError: tokenizer or graph cannot be loaded.
    """

    def __init__(
        self, engine_dir: Path, entry: TextEncoderEntry, backend: Backend, weights: ChangedWeights | None = None
    ) -> None:
        self._tokenize = PromptTokenizer(engine_dir, entry)
        self._component = Component(engine_dir, entry.graph, backend, weights)

    def __call__(self, prompts: Sequence[str]) -> np.ndarray:
        """Embeddings (prompts, length, width), one run per distinct prompt."""
        graph = self._component.graph
        embedded: dict[str, np.ndarray] = {}
        for prompt in dict.fromkeys(prompts):
            outputs = self._component({graph.inputs[0].name: self._tokenize([prompt])})
            embedded[prompt] = outputs[graph.outputs[0].name]
        return np.concatenate([embedded[prompt] for prompt in prompts])
