from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from dipgo_deploy.errors import UserError
from dipgo_deploy.lora.file import parse_choice, read_lora

DOWN = np.arange(12, dtype=np.float32).reshape(2, 6)
UP = np.arange(8, dtype=np.float32).reshape(4, 2)


def written(folder, tensors, metadata=None):
    path = folder / "lora.safetensors"
    save_file(tensors, path, metadata)
    return path


@pytest.mark.parametrize(
    ("down", "up", "component", "module", "flat"),
    [
        ("unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight", "denoiser", "a.to_q", False),
        ("unet.a.to_q.lora_A.default.weight", "unet.a.to_q.lora_B.default.weight", "denoiser", "a.to_q", False),
        ("transformer.a.lora.down.weight", "transformer.a.lora.up.weight", "denoiser", "a", False),
        ("base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight", "denoiser", "a", False),
        (
            "unet.a.attn1.processor.to_out_lora.down.weight",
            "unet.a.attn1.processor.to_out_lora.up.weight",
            "denoiser",
            "a.attn1.to_out.0",
            False,
        ),
        (
            "text_encoder.b.q_proj.lora_linear_layer.down.weight",
            "text_encoder.b.q_proj.lora_linear_layer.up.weight",
            "text_encoder",
            "b.q_proj",
            False,
        ),
        ("lora_unet_a_to_q.lora_down.weight", "lora_unet_a_to_q.lora_up.weight", "denoiser", "a_to_q", True),
        ("lora_te_b_fc1.lora_down.weight", "lora_te_b_fc1.lora_up.weight", "text_encoder", "b_fc1", True),
        ("lora_te1_b_fc1.lora_down.weight", "lora_te1_b_fc1.lora_up.weight", "text_encoder", "b_fc1", True),
        ("lora_te2_b_fc1.lora_down.weight", "lora_te2_b_fc1.lora_up.weight", "text_encoder_2", "b_fc1", True),
        ("lora_te3_b_fc1.lora_down.weight", "lora_te3_b_fc1.lora_up.weight", "text_encoder_3", "b_fc1", True),
        ("text_encoder_2.b.lora_A.weight", "text_encoder_2.b.lora_B.weight", "text_encoder_2", "b", False),
    ],
)
def test_every_spelling(tmp_path, down, up, component, module, flat):
    lora = read_lora(written(tmp_path, {down: DOWN, up: UP}))
    (update,) = lora.updates
    assert (update.component, update.module, update.flat, update.factor) == (component, module, flat, 1.0)
    np.testing.assert_array_equal(update.down, DOWN)
    np.testing.assert_array_equal(update.up, UP)
    assert lora.ignored == ()


def test_alpha_over_rank_and_what_is_ignored(tmp_path):
    tensors = {"unet.a.lora_A.weight": DOWN, "unet.a.lora_B.weight": UP, "unet.a.alpha": np.array(5, np.float32)}
    lora = read_lora(written(tmp_path, {**tensors, "emb_params": UP}))
    assert lora.updates[0].factor == 2.5
    assert lora.ignored == ("emb_params",)


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"unet.lora_alpha": 8}, 4.0),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"a": 3}}, 1.5),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / np.sqrt(2)),
        ({"text_encoder.lora_alpha": 8}, 1.0),
        ({"text_encoder_2.lora_alpha": 8, "unet.lora_alpha": 6}, 3.0),
    ],
)
def test_pefts_configuration_in_the_metadata(tmp_path, config, factor):
    tensors = {"unet.x.a.lora_A.weight": DOWN, "unet.x.a.lora_B.weight": UP}
    path = written(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)})
    assert read_lora(path).updates[0].factor == pytest.approx(factor)


def test_pefts_configuration_beside_the_file(tmp_path):
    path = written(tmp_path, {"base_model.model.a.lora_A.weight": DOWN, "base_model.model.a.lora_B.weight": UP})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    assert read_lora(path).updates[0].factor == 0.5


A, B = "unet.a.lora_A.weight", "unet.a.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: DOWN}, "unet.a: only one of its two matrices"),
        ({A: DOWN, B: UP[:, :1]}, "unet.a: its matrices have ranks 2 and 1"),
        ({A: DOWN[0], B: UP}, r"unet.a: shapes \(6,\) and \(4, 2\)"),
        ({A: DOWN, B: UP * np.nan}, "unet.a: holds NaN"),
        ({A: DOWN, B: UP, "unet.a.alpha": np.array(np.inf, np.float32)}, "its alpha is not a finite"),
        ({A: DOWN, B: UP, "unet.a.lora_magnitude_vector": UP[0]}, "DoRA is not supported"),
        ({"lora_unet_a.hada_w1_a": UP}, "LoHa is not supported"),
        ({"weight": UP}, r"no LoRA weights in it \(first key: weight\)"),
        ({A: DOWN.astype(np.uint8), B: UP}, "has type U8"),
    ],
)
def test_what_is_not_a_lora_is_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message) as caught:
        read_lora(written(tmp_path, tensors))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / "nothing.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_lora(tmp_path / "x.safetensors")


def test_file_and_scale(tmp_path):
    strange = tmp_path / "a:2"
    strange.write_bytes(b"")
    assert parse_choice("a.safetensors") == (parse_choice("a.safetensors:1")[0], 1.0)
    assert parse_choice("dir/a.safetensors:-0.5")[1] == -0.5
    assert parse_choice(str(strange)) == (strange, 1.0)
    for wrong in ("a:strong", "a:nan", "a:inf"):
        with pytest.raises(UserError, match="--lora"):
            parse_choice(wrong)
