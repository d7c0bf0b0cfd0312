"""Tiny language models with random weights and their kinds of tokenizers, as text encoders of image pipelines."""

from __future__ import annotations

from typing import Any

from family_checks import random_weights
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WIDTH = 16
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# What Qwen 3's own template writes for one message of a user.
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen's own class with a small vocabulary of bytes and two merges, padded with the end of a text."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = sorted(bytes_to_unicode().values())
    merges = [("r", "e"), ("re", "d")]
    tokens = [*letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges, extra_special_tokens=list(_SPECIAL[1:]))
    tokenizer.chat_template = _CHAT
    return tokenizer


def qwen3(layers: int = 3, **changes: Any) -> Qwen3ForCausalLM:
    """Qwen 3's grouped queries and normalised heads."""
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": False,
    }
    return random_weights(Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes})))


# The roles and the list of contents of the template that comes with FLUX.2-dev.
_INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% set text = message.content[0].text %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]"
    "{% else %}[INST]{{ text }}[/INST]{% endif %}{% endfor %}"
)


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    """With a first token of its own, padded on the left."""
    special = ["[INST]", "[/INST]", "[IMG]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(qwen_tokenizer().backend_tokenizer.to_str()),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=special,
        padding_side="left",
        chat_template=_INSTRUCT,
    )
    first = ("<s>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[first])
    return tokenizer


def mistral3(layers: int = 3) -> Mistral3ForConditionalGeneration:
    """With the parts for pictures, which no prompt needs."""
    vision = PixtralVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8, patch_size=14
    )
    text = MistralConfig(
        vocab_size=300,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    config = Mistral3Config(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=264)
    return random_weights(Mistral3ForConditionalGeneration(config))


def qwen25_vl(layers: int = 2) -> Qwen2_5_VLForConditionalGeneration:
    """With the parts for pictures, which no prompt needs."""
    vision = {"hidden_size": 8, "intermediate_size": 8, "depth": 1, "num_heads": 1, "out_hidden_size": WIDTH}
    text = {
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6},
    }
    return random_weights(Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=text)))
