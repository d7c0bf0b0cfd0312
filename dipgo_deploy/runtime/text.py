"""From prompts to conditions, with the tokenizers and text encoders of an engine directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dipgo_deploy.backends.base import Backend, ChangedWeights
from dipgo_deploy.bundle.manifest import TextEncoderEntry, TokenizerEntry
from dipgo_deploy.bundle.prompts import prepared
from dipgo_deploy.errors import UserError, one_line
from dipgo_deploy.runtime.component import Component

_log = logging.getLogger(__name__)


class PromptTokenizer:
    """Token ids as a text encoder wants them: cut to ``length`` on the right, padded with ``pad_id``.

    Raises:
        UserError: the tokenizer file is missing or broken.
    """

    def __init__(self, engine_dir: Path, entry: TokenizerEntry) -> None:
        from tokenizers import Tokenizer

        path = engine_dir / entry.file
        if not path.is_file():
            raise UserError(f"{path}: named in the manifest but missing; export the engine directory again")
        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise UserError(f"{path}: not a tokenizer file ({error}); export the engine directory again") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._entry = entry

    def __call__(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """Token ids, and the mask where one is wanted, by graph input name: int64 (prompts, length).

        A prompt that is too long is cut, with a warning in the log.
        """
        length = self._entry.length
        ids = np.full((len(prompts), length), self._entry.pad_id, np.int64)
        mask = np.zeros_like(ids)
        for row, used, given in zip(ids, mask, prompts, strict=True):
            self._tokenizer.no_truncation()
            prompt = self._expanded(given)
            whole = self._encode(prompt)
            if len(whole) > length:
                _log.warning("prompt cut from %d to %d tokens: %s", len(whole), length, one_line(prompt))
                self._tokenizer.enable_truncation(length)  # keeps the closing special token
                whole = self._encode(prompt)
            place = slice(length - len(whole), length) if self._entry.padding == "left" else slice(len(whole))
            row[place] = whole
            used[place] = 1
        return {self._entry.ids: ids} | ({} if self._entry.mask is None else {self._entry.mask: mask})

    def _encode(self, prompt: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(prompt, add_special_tokens=self._entry.special).ids
        return ids

    def _expanded(self, prompt: str) -> str:
        """With all tokens of a textual inversion in the place of its first one."""
        if not self._entry.expansions:
            return prompt
        used = set(self._tokenizer.encode(prompt, add_special_tokens=False).tokens)
        for token, text in self._entry.expansions.items():
            if token in used:
                prompt = prompt.replace(token, text)
        return prompt


class TextEncoder:
    """Prompts -> conditions. ``weights`` take the place of the encoders' where they change them.

    Raises:
        UserError: a tokenizer or the graph cannot be loaded.
    """

    def __init__(
        self, engine_dir: Path, entry: TextEncoderEntry, backend: Backend, weights: ChangedWeights | None = None
    ) -> None:
        self._entry = entry
        self._tokenizers = [PromptTokenizer(engine_dir, tokenizer) for tokenizer in entry.tokenizers]
        self._component = Component(engine_dir, entry.graph, backend, weights)

    def __call__(self, prompts: Sequence[str], *, negative: bool = False) -> dict[str, np.ndarray]:
        """The text conditions by name, (prompts, ...) each; one run per distinct prompt."""
        encoded = {prompt: self._component(self.tokens(prompt, negative=negative)) for prompt in dict.fromkeys(prompts)}
        names = [spec.name for spec in self._component.graph.outputs]
        return {name: np.concatenate([encoded[prompt][name] for prompt in prompts]) for name in names}

    def tokens(self, prompt: str, *, negative: bool = False) -> dict[str, np.ndarray]:
        """Token ids and masks of one prompt by graph input name, int64 (1, length)."""
        found: dict[str, np.ndarray] = {}
        for tokenize, entry in zip(self._tokenizers, self._entry.tokenizers, strict=True):
            found |= tokenize([prepared(self._entry, prompt, negative=negative, plain=entry.plain)])
        return found
