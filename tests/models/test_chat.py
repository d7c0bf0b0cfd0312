from __future__ import annotations

import pytest
from language_models import mistral_tokenizer, qwen_tokenizer

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.chat import MARK, around_prompt

USER = [{"role": "user", "content": MARK}]


def test_a_template_is_what_its_tokenizer_writes() -> None:
    tokenizer = qwen_tokenizer()
    options = {"add_generation_prompt": True, "enable_thinking": False}
    before, after = around_prompt(tokenizer, USER, **options)
    said = [{"role": "user", "content": "a {shoe}"}]
    assert f"{before}a {{shoe}}{after}" == tokenizer.apply_chat_template(said, tokenize=False, **options)
    assert after.endswith("</think>\n\n")


def test_templates_that_cannot_be_used_are_named() -> None:
    tokenizer = qwen_tokenizer()
    with pytest.raises(UserError, match="Qwen2Tokenizer: its chat template has the prompt 2 times, not once"):
        around_prompt(tokenizer, USER * 2)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="Qwen2Tokenizer: its chat template cannot be used"):
        around_prompt(tokenizer, USER)
    with pytest.raises(UserError, match="cannot be used"):  # this one wants a list of contents
        around_prompt(mistral_tokenizer(), [{"role": "user", "content": []}])
