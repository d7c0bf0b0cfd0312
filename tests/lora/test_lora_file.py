from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dipgo_deploy.errors import UserError
from dipgo_deploy.lora.file import check_scale, parse_choice, read_lora

DOWN = np.arange(12, dtype=np.float32).reshape(2, 6)
UP = np.arange(8, dtype=np.float32).reshape(4, 2)


def written(folder, tensors, metadata=None, name="lora.safetensors"):
    path = folder / name
    save_file({key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}, path, metadata)
    return path


@pytest.mark.parametrize(
    ("down", "up", "component", "module"),
    [
        ("unet.a.to_q.lora_A.weight", "unet.a.to_q.lora_B.weight", "denoiser", "a.to_q"),
        ("unet.a.to_q.lora_A.default.weight", "unet.a.to_q.lora_B.default.weight", "denoiser", "a.to_q"),
        ("transformer.a.lora.down.weight", "transformer.a.lora.up.weight", "denoiser", "a"),
        ("base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight", "denoiser", "a"),
        ("diffusion_model.a.lora_A.weight", "diffusion_model.a.lora_B.weight", "denoiser", "a"),
        (
            "unet.a.attn1.processor.to_out_lora.down.weight",
            "unet.a.attn1.processor.to_out_lora.up.weight",
            "denoiser",
            "a.attn1.to_out.0",
        ),
        (
            "text_encoder.b.q_proj.lora_linear_layer.down.weight",
            "text_encoder.b.q_proj.lora_linear_layer.up.weight",
            "text_encoder",
            "b.q_proj",
        ),
        (
            "text_encoder_2.b.self_attn.to_out_lora.down.weight",
            "text_encoder_2.b.self_attn.to_out_lora.up.weight",
            "text_encoder_2",
            "b.self_attn.out_proj",
        ),
        ("lora_unet_a_to_q.lora_down.weight", "lora_unet_a_to_q.lora_up.weight", "denoiser", "a_to_q"),
        ("lora_te_b_fc1.lora_down.weight", "lora_te_b_fc1.lora_up.weight", "text_encoder", "b_fc1"),
        ("lora_te1_b_fc1.lora_down.weight", "lora_te1_b_fc1.lora_up.weight", "text_encoder", "b_fc1"),
        ("lora_te2_b_fc1.lora_down.weight", "lora_te2_b_fc1.lora_up.weight", "text_encoder_2", "b_fc1"),
        ("lora_te3_b_fc1.lora_down.weight", "lora_te3_b_fc1.lora_up.weight", "text_encoder_3", "b_fc1"),
        ("text_encoder_2.b.lora_A.weight", "text_encoder_2.b.lora_B.weight", "text_encoder_2", "b"),
        (
            "base_model.model.text_model.b.lora_A.weight",
            "base_model.model.text_model.b.lora_B.weight",
            "text_encoder",
            "b",
        ),
    ],
)
def test_every_spelling(tmp_path, down, up, component, module):
    lora = read_lora(written(tmp_path, {down: DOWN, up: UP}))
    (update,) = lora.changes
    layer = update.layer
    assert (layer.components[0], layer.module, update.factor) == (component, module, 1.0)
    np.testing.assert_array_equal(update.rows(np.array([3, 0])), (UP @ DOWN)[[3, 0]])
    assert lora.others == ()


def test_alpha_over_rank_differences_biases_and_what_is_not_understood(tmp_path):
    tensors = {"unet.a.lora_A.weight": DOWN, "unet.a.lora_B.weight": UP, "unet.a.alpha": np.array(5, np.float32)}
    more = {"unet.a.lora_B.bias": UP[:, 0], "lora_unet_b.diff": DOWN, "lora_unet_b.diff_b": UP[:, 1]}
    left = {"emb_params": UP, "unet.c.lora_A.weight": DOWN, "unet.c.lora_B.weight": UP, "unet.c.dora_scale": UP[0]}
    lora = read_lora(written(tmp_path, {**tensors, **more, **left, "lora_unet_d.alpha": np.array(5, np.float32)}))
    found = {(change.layer.module, change.parameter): change for change in lora.changes}
    assert found.keys() == {("a", "weight"), ("a", "bias"), ("b", "weight"), ("b", "bias")}
    assert found["a", "weight"].factor == found["a", "bias"].factor == 2.5
    assert found["b", "weight"].factor == 1.0
    np.testing.assert_array_equal(found["b", "bias"].rows(np.arange(4))[:, 0], UP[:, 1])
    # A layer is applied as a whole or not at all: without its magnitudes, c's update would be another one.
    assert dict(lora.others) == {
        "emb_params": "an unknown kind of change",
        "unet.c.dora_scale": "DoRA",
        "lora_unet_d.alpha": "an unknown kind of change",
    }


@pytest.mark.parametrize(
    ("config", "factor"),
    [
        ({"unet.lora_alpha": 8}, 4.0),
        ({"unet.r": 2}, 4.0),  # PEFT's default is 8
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"a": 3}}, 1.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"b|a": 3}}, 1.5),
        ({"unet.lora_alpha": 8, "unet.alpha_pattern": {"b|xa": 3}}, 4.0),
        ({"unet.lora_alpha": 8, "unet.r": 4, "unet.rank_pattern": {"x.*": 2}}, 4.0),
        ({"unet.lora_alpha": 8, "unet.use_rslora": True}, 8 / np.sqrt(2)),
        ({"text_encoder.lora_alpha": 8}, 1.0),
        ({"text_encoder_2.lora_alpha": 8, "unet.lora_alpha": 6}, 3.0),
    ],
)
def test_pefts_configuration_in_the_metadata(tmp_path, config, factor):
    tensors = {"unet.x.a.lora_A.weight": DOWN, "unet.x.a.lora_B.weight": UP}
    path = written(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)})
    assert read_lora(path).changes[0].factor == pytest.approx(factor)


def test_pefts_folder_and_what_its_configuration_decides(tmp_path):
    tensors = {"base_model.model.a.lora_A.weight": DOWN, "base_model.model.a.lora_B.weight": UP}
    with pytest.raises(UserError, match=r"neither adapter_model\.safetensors nor"):
        read_lora(tmp_path)
    path = written(tmp_path, tensors, name="adapter_model.safetensors")
    plain = read_lora(tmp_path)
    assert (plain.path, plain.changes[0].factor) == (path, 1.0)
    hashes = {plain.sha256()}
    for alpha in (1, 3):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": alpha}))
        lora = read_lora(tmp_path)
        assert lora.changes[0].factor == alpha / 2
        hashes.add(lora.sha256())
    assert len(hashes) == 3  # the same matrices are other changes with another alpha


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not JSON"),
        ('{"peft_type": "LOHA"}', "peft_type 'LOHA' is not supported"),
        ('{"init_lora_weights": "pissa_niter_4"}', "trains beside changed weights"),
        ('{"alora_invocation_tokens": [1]}', "alora_invocation_tokens is not supported"),
        ('{"lora_alpha": "8"}', "lora_alpha '8' is not a number"),
        ('{"lora_alpha": NaN}', "NaN is no JSON number"),
        ('{"lora_alpha": 1e400}', "1e400 is too large a number"),
        ('{"r": 2, "r": 4}', "the key 'r' stands twice"),
        ('{"r": 3}', "a: the rank is 3, the matrices have 2"),
        ('{"alpha_pattern": [1]}', "alpha_pattern is not an object"),
        ('{"alpha_pattern": {"(to_q": 16}}', r"alpha_pattern '\(to_q': missing \) at 5"),
        ('{"rank_pattern": {"((a+)+)+$": 16}}', "a repetition in what is repeated is not supported"),
    ],
)
def test_configurations_that_are_refused(tmp_path, config, message):
    path = written(tmp_path, {"base_model.model.a.lora_A.weight": DOWN, "base_model.model.a.lora_B.weight": UP})
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=message) as caught:
        read_lora(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


A, B = "unet.a.lora_A.weight", "unet.a.lora_B.weight"
HUGE = np.zeros((300, 6), np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({A: DOWN}, "unet.a: only one of its two matrices"),
        ({A: DOWN, B: UP[:, :1]}, "unet.a: its matrices have ranks 2 and 1"),
        ({A: DOWN[0], B: UP}, r"unet.a: shapes \(6,\) and \(4, 2\)"),
        ({A: DOWN[:, :0], B: UP}, "the file is not whole"),
        ({A: HUGE, B: HUGE.reshape(6, 300)}, "rank 300, where the layer has at most 256"),
        ({A: DOWN, B: UP, "unet.a.lora_A.second.weight": DOWN}, "another key of this layer says the same"),
        ({A: DOWN, B: UP, "unet.a.alpha": np.array(np.inf, np.float32)}, "is not a finite number"),
        ({A: DOWN, B: UP, "unet.a.alpha": np.ones(2, np.float32)}, "an alpha is one number"),
        ({A: DOWN, B: UP, "unet.\x1b[2J.alpha": UP}, "a tensor's name is not a name"),
        ({A: DOWN, B: UP, "x" * 10_000: UP}, "a tensor's name is not a name"),
        ({}, "no LoRA weights in it"),
        ({A: DOWN.astype(np.uint8), B: UP}, "has type U8"),
    ],
)
def test_what_is_not_a_lora_is_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message) as caught:
        read_lora(written(tmp_path, tensors))
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_alpha_and_configuration_that_differ(tmp_path):
    tensors = {A: DOWN, B: UP, "unet.a.alpha": np.array(4, np.int64)}
    assert read_lora(written(tmp_path, tensors)).changes[0].factor == 2.0
    for alpha, same in ((4, True), (5, False)):
        path = written(tmp_path, tensors, {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": alpha})})
        if same:
            assert read_lora(path).changes[0].factor == 2.0
        else:
            with pytest.raises(UserError, match="its alpha gives a factor of 2, PEFT's configuration one of 2.5"):
                read_lora(path)


def test_values_are_looked_at_when_asked_for(tmp_path):
    lora = read_lora(written(tmp_path, {A: DOWN, B: UP * np.nan, "unet.z.diff": DOWN * 0}))
    bad, zero = lora.changes
    with pytest.raises(UserError, match="unet.a.lora_B.weight: holds NaN or infinity"):
        lora.check_values(bad)
    lora.check_values(zero)
    assert lora.is_zero(zero)
    whole = read_lora(written(tmp_path, {A: DOWN, B: UP}, name="whole.safetensors")).changes[0]
    with open(tmp_path / "whole.safetensors", "r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match="was cut while it was read"):
        whole.rows(np.arange(4))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_lora(tmp_path / "nothing.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_lora(tmp_path / "x.safetensors")


def test_file_and_scale(tmp_path):
    strange = tmp_path / "a:2"
    strange.write_bytes(b"")
    assert parse_choice("a.safetensors") == parse_choice("a.safetensors:1")
    assert parse_choice("transformer_2=dir/a.safetensors:0.5") == (Path("dir/a.safetensors"), 0.5, "transformer_2")
    assert parse_choice("dir/a.safetensors:-0.5")[1] == -0.5
    assert parse_choice(str(strange)) == (strange, 1.0, "")
    for wrong in ("a:strong", "a:nan", "a:inf", "a:1e300"):
        with pytest.raises(UserError, match="--lora"):
            parse_choice(wrong)
    for value in ("1", None, True):
        with pytest.raises(UserError, match="give a number"):
            check_scale(value)
