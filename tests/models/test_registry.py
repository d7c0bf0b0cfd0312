"""Families of other packages: a small one of its own, installed beside this one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dipgo_deploy.errors import UserError
from dipgo_deploy.models import families, family_for, registry

AURA = "AuraFlowTransformer2DModel"
OUTSIDE = """
from dipgo_deploy.models import InputSpec, ModelFamily, TextScheme
from dipgo_deploy.models.sublayers import whole_blocks


def blocks(config, granularity):
    return whole_blocks("single_transformer_blocks", config["num_single_dit_layers"])


def inputs(config, batch, height, width, text_length):
    states = (batch, text_length, config["joint_attention_dim"])
    return (
        InputSpec("hidden_states", (batch, config["in_channels"], height, width), "model", "latent"),
        InputSpec("timestep", (1,), "float32", "timestep"),
        InputSpec("encoder_hidden_states", states, "model", "condition", "text"),
    )


def call(model, latent, timestep, conditions):
    return model(latent, timestep=timestep / 1000, return_dict=False, **conditions)[0]


FAMILY = ModelFamily(
    class_name="AuraFlowTransformer2DModel",
    pipelines=("AuraFlowPipeline",),
    component="transformer",
    blocks=blocks,
    inputs=inputs,
    latent_channels=lambda config: config["in_channels"],
    call=call,
    text=lambda config, pipeline: TextScheme(length=6, encode=lambda pipeline, tokens: {}),
    kind="flow",
    defaults={"in_channels": 4, "num_single_dit_layers": 32, "joint_attention_dim": 2048},
)
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """A package of that name with a module and entry points (name -> value) of the group of families.

    The family that it brings is not built in while the test runs.
    """
    own = tuple(family for family in registry.BUILT_IN if family.class_name != AURA)
    monkeypatch.setattr(registry, "BUILT_IN", own)
    families.cache_clear()

    def installed(package: str, source: str, **points: str) -> None:
        site = tmp_path / "site"
        info = site / f"{package}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{package}.py").write_text(source)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "\n".join(f"{name} = {value}" for name, value in points.items())
        (info / "entry_points.txt").write_text(f"[dipgo_deploy.families]\n{lines}\n")
        monkeypatch.syspath_prepend(site)
        families.cache_clear()

    yield installed
    families.cache_clear()
    for name in ("outside", "other"):
        sys.modules.pop(name, None)


def test_a_family_of_another_package_is_found_and_exported(install: Install, tmp_path: Path) -> None:
    import torch
    from diffusers import AuraFlowTransformer2DModel
    from family_checks import random_weights, schedule_for

    from dipgo_deploy.export.exporter import ExportOptions, export_bundle

    with pytest.raises(UserError, match=f"model class '{AURA}' is not supported"):
        family_for(AURA)
    install("outside", OUTSIDE, aura="outside:FAMILY")
    assert family_for(AURA).latent_channels({}) == 4
    torch.manual_seed(0)
    sizes = {"num_mmdit_layers": 1, "num_single_dit_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2}
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pos_embed_max_size": 16}
    model = random_weights(AuraFlowTransformer2DModel(sample_size=8, **sizes, **widths))
    model.save_pretrained(tmp_path / "model")
    schedule = schedule_for(tmp_path / "model", ratio=0.4, sampler="FlowMatchEulerDiscreteScheduler")
    assert schedule.block_names == tuple(f"single_transformer_blocks.{index}" for index in range(3))
    # Every variant and launch is compared with the model in torch before the directory gets its name.
    export_bundle(str(tmp_path / "model"), schedule, tmp_path / "engine", ExportOptions(components=False))
    assert (tmp_path / "engine" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ({"gone": "outside:NOTHING"}, "gone (outside:NOTHING) of outside: cannot be loaded (AttributeError: "),
        ({"gone": "no_such_module:FAMILY"}, "of outside: cannot be loaded (ModuleNotFoundError: No module named"),
        ({"gone": "outside:blocks"}, "of outside: is a function, not a ModelFamily; it is left out: correct or unins"),
        ({"again": "outside:DIT"}, "again (outside:DIT) of outside: there is a family for DiTTransformer2DModel alr"),
        ({"aura": "outside:FAMILY", "twice": "outside:FAMILY"}, "twice (outside:FAMILY) of outside: there is a fami"),
    ],
)
def test_one_that_is_no_use_is_left_out_in_one_line(
    install: Install, caplog: pytest.LogCaptureFixture, points: dict[str, str], words: str
) -> None:
    built_in = set(families())
    install("outside", f"{OUTSIDE}\nfrom dipgo_deploy.models.dit import FAMILY as DIT\n", **points)
    assert set(families()) - built_in == ({AURA} if "aura" in points else set())
    (record,) = caplog.records
    assert words in record.getMessage() and "\n" not in record.getMessage()
    assert families()["DiTTransformer2DModel"].pipelines == ("DiTPipeline",)
