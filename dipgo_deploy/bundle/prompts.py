"""What of a prompt is tokenized: the same for the export's reference and for a run."""

from __future__ import annotations

import html
from typing import Protocol


class PromptSettings(Protocol):
    """What is done to a prompt first; the fields of ``TextScheme`` and of a manifest's text encoder."""

    @property
    def lowercase(self) -> bool:
        """Whether prompts are stripped and lowered."""
        ...

    @property
    def prefix(self) -> str:
        """Text before each prompt, not before a negative one."""
        ...

    @property
    def around(self) -> tuple[str, str]:
        """Text before and after every prompt."""
        ...

    @property
    def unescape(self) -> bool:
        """Whether HTML entities are unescaped and white space becomes single spaces."""
        ...

    @property
    def removed(self) -> tuple[str, ...]:
        """Texts that are taken out."""
        ...


def prepared(settings: PromptSettings, prompt: str, *, negative: bool = False, plain: bool = False) -> str:
    """The text that a tokenizer gets of a prompt or of a negative one. plain: without what is put around it."""
    for text in settings.removed:
        prompt = prompt.replace(text, "")
    if settings.unescape:  # twice, as the pipelines do: what was escaped twice is found too
        prompt = " ".join(html.unescape(html.unescape(prompt)).split())
    if settings.lowercase:
        prompt = prompt.strip().lower()
    if plain:
        return prompt
    before, after = settings.around
    return f"{before}{'' if negative else settings.prefix}{prompt}{after}"
