from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from toy_engine import Toy, build, manifest_of, token_ids

import dipgo_deploy
from dipgo_deploy.bundle.manifest import TokenizerEntry
from dipgo_deploy.runtime.text import PromptTokenizer

PROMPTS = ["a sneaker", "", "A Dress, and  a bag!", "ünïcode ☃ t-shirt", "a coat " * 60]


def test_ids_are_cut_and_padded(tmp_path):
    entry = manifest_of(Toy()).components.text_encoder
    assert entry is not None
    (tokenizer,) = entry.tokenizers
    tokenize = PromptTokenizer(build(tmp_path, Toy()), tokenizer)
    prompts = ["", "a bag", "a red boot big", "a red boot big blue bag", "a bag"]  # cutting one must not cut the next
    got = tokenize(prompts)["ids"]
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, [token_ids(prompt) for prompt in prompts])


def test_ids_are_those_of_the_models_own_tokenizer():
    transformers = pytest.importorskip("transformers")
    folder = Path(dipgo_deploy.__file__).parent / "assets/fashion-sd/tokenizer"
    own = transformers.AutoTokenizer.from_pretrained(folder)
    length, pad_id = own.model_max_length, own.pad_token_id
    entry = TokenizerEntry(file="tokenizer.json", length=length, pad_id=pad_id, ids="input_ids", mask="attention_mask")
    want = own(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="np")
    got = PromptTokenizer(folder, entry)(PROMPTS)
    assert set(got) == {"input_ids", "attention_mask"}
    for name, array in got.items():
        np.testing.assert_array_equal(array, want[name])


def test_a_token_with_several_vectors_is_expanded_as_diffusers_does(tmp_path: Path) -> None:
    """Textual inversion: tokens of three and two vectors, one of one, in prompts that use them, or none, or twice."""
    transformers = pytest.importorskip("transformers")
    loaders = pytest.importorskip("diffusers.loaders")
    from dipgo_deploy.export.components import _expansions

    folder = Path(dipgo_deploy.__file__).parent / "assets/fashion-sd/tokenizer"
    own = transformers.AutoTokenizer.from_pretrained(folder)
    own.add_tokens(["<my-cat>", "<my-cat>_1", "<my-cat>_2", "<dog>", "<dog>_1", "<bird>", "hat", "hat_1"])
    own.save_pretrained(tmp_path)

    class Stock(loaders.TextualInversionLoaderMixin):
        pass

    expansions = _expansions(Stock(), own)
    assert expansions == {"<dog>": "<dog> <dog>_1", "<my-cat>": "<my-cat> <my-cat>_1 <my-cat>_2", "hat": "hat hat_1"}
    assert _expansions(object(), own) == {}
    length, pad_id = own.model_max_length, own.pad_token_id
    entry = TokenizerEntry(file="tokenizer.json", length=length, pad_id=pad_id, ids="input_ids", expansions=expansions)
    prompts = ["a <my-cat>", "<dog> and <my-cat>", "<bird>, <bird>", "<my-cat><my-cat>", "a hat, a HAT", "", "a coat"]
    want = own(Stock().maybe_convert_prompt(prompts, own), padding="max_length", max_length=length, truncation=True)
    got = PromptTokenizer(tmp_path, entry)(prompts)["input_ids"]
    np.testing.assert_array_equal(got, want.input_ids)
    assert got[0].tolist()[:5].count(own.convert_tokens_to_ids("<my-cat>_2")) == 1
