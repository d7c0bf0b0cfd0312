"""Chat templates: what a pipeline's tokenizer puts around a prompt, taken from the tokenizer itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dipgo_deploy.errors import UserError

# Stands for the prompt in a template that is rendered once: nothing that one would take apart or strip.
MARK = "<<prompt>>"


def around_prompt(tokenizer: Any, messages: Sequence[Any], **options: Any) -> tuple[str, str]:
    """What the chat template of a tokenizer (or processor) writes before and after a prompt.

    Args:
        messages: of the conversation, with ``MARK`` in the place of the prompt.
        options: of ``apply_chat_template``.

    Raises:
        UserError: a tokenizer without a template, or whose template does not hold the prompt once.
    """
    name = type(tokenizer).__name__
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # of a template that is missing or cannot be rendered: any kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name}: its chat template cannot be used: {reason}") from error
    parts = str(text).split(MARK)
    if len(parts) != 2:
        raise UserError(f"{name}: its chat template has the prompt {len(parts) - 1} times, not once")
    return parts[0], parts[1]
