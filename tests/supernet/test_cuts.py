"""Recording a model's cut points."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from dipgo_deploy.models import BlockSpec, family_for
from dipgo_deploy.supernet.cuts import collect, flatten, unflatten


def _call(unet: torch.nn.Module) -> torch.Tensor:
    return unet(
        torch.randn(2, 4, 8, 8), timestep=torch.tensor([7.0]), encoder_hidden_states=torch.randn(2, 5, 16)
    ).sample


def test_flatten_gives_each_tensor_one_index_by_identity() -> None:
    a, b = torch.zeros(2), torch.zeros(2)  # equal, but two tensors
    tensors, structure = flatten((a, (b, None, a)))
    assert [id(tensor) for tensor in tensors] == [id(a), id(b)]
    assert structure == (0, (1, None, 0))
    again = unflatten([b, a], structure)
    assert again[0] is b and again[1][0] is a and again[1][1] is None and again[1][2] is b


def test_flattened_tensors_go_when_nobody_has_them() -> None:
    """Not when the garbage collector comes: they are a model's activations."""
    gc.disable()
    try:
        tensor = torch.zeros(2)
        gone = weakref.ref(tensor)
        flattened = flatten((tensor, (tensor, None)))
        del tensor
        assert gone() is not None
        del flattened
        assert gone() is None
    finally:
        gc.enable()


def test_flatten_refuses_what_it_cannot_rebuild() -> None:
    with pytest.raises(TypeError, match="dict"):
        flatten({"sample": torch.zeros(1)})


def test_unet_blocks_and_their_skips(unet) -> None:
    specs = family_for("UNet2DConditionModel").blocks(unet.config, "block")
    with collect(unet, specs) as cuts:
        _call(unet)
    # hidden first; the last skip tensor of a down block is the hidden one and has no index of its own
    assert [len(cuts[spec.name].outputs) for spec in specs] == [3, 3, 3, 2, 1, 1, 1, 1, 1]
    assert [tuple(t.shape[1:]) for t in cuts["down_blocks.0"].outputs] == [(16, 4, 4), (16, 8, 8), (16, 8, 8)]
    assert all(not cuts[spec.name].inputs for spec in specs)


def test_layers_are_consistent_with_whole_blocks(unet) -> None:
    family = family_for("UNet2DConditionModel")
    with (
        collect(unet, family.blocks(unet.config, "block")) as whole,
        collect(unet, family.blocks(unet.config, "layer")) as layers,
    ):
        _call(unet)
    assert all(len(cut.outputs) == 1 for cut in layers.values())
    hidden, first, second = whole["down_blocks.1"].outputs
    assert layers["down_blocks.1.downsamplers.0"].outputs[0] is hidden
    assert layers["down_blocks.1.attentions.0"].outputs[0] is first
    assert layers["down_blocks.1.attentions.1"].outputs[0] is second
    assert layers["up_blocks.0.upsamplers.0"].outputs[0] is whole["up_blocks.0"].outputs[0]
    assert layers["up_blocks.3.attentions.2"].outputs[0] is whole["up_blocks.3"].outputs[0]


def test_dit_inputs_are_the_previous_blocks_outputs(dit) -> None:
    specs = family_for("DiTTransformer2DModel").blocks(dit.config, "block")
    with collect(dit, specs) as cuts:
        dit(torch.randn(1, 4, 8, 8), timestep=torch.tensor([3.0]), class_labels=torch.tensor([1]))
    assert list(cuts) == [spec.name for spec in specs]
    for before, after in zip(specs, specs[1:], strict=False):
        assert cuts[after.name].inputs[0] is cuts[before.name].outputs[0]
    assert cuts[specs[0].name].inputs[0].shape == (1, 16, 16)


def test_residual_input_by_position_and_by_keyword() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = torch.nn.Identity()

        def forward(self, x: torch.Tensor, by_keyword: bool) -> torch.Tensor:
            return self.block(input=x) if by_keyword else self.block(x)

    spec = BlockSpec("block", ("block",), ("residual",), residual_inputs=("input",))
    model, x = Twice(), torch.randn(3)
    for by_keyword in (True, False):
        with collect(model, [spec]) as cuts:
            model(x, by_keyword)
        assert cuts["block"].inputs == [x]


def test_model_is_left_as_it_was_and_the_last_forward_counts(unet) -> None:
    specs = family_for("UNet2DConditionModel").blocks(unet.config, "block")
    with collect(unet, specs) as cuts:
        _call(unet)
        first = cuts["mid_block"].outputs[0]
        _call(unet)
    last = cuts["mid_block"].outputs[0]
    assert len(cuts["mid_block"].outputs) == 1 and last is not first
    _call(unet)
    assert cuts["mid_block"].outputs[0] is last
    assert all(not module._forward_hooks for module in unet.modules())


def test_cut_points_can_be_traced(unet) -> None:
    """The exporter enters `collect` inside a forward that torch.export traces."""
    specs = family_for("UNet2DConditionModel").blocks(unet.config, "block")

    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = unet

        def forward(self, sample, timestep, text):
            with collect(self.denoiser, specs) as cuts:
                out = self.denoiser(sample, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
            return [out, *(tensor for cut in cuts.values() for tensor in cut.outputs)]

    inputs = (torch.randn(1, 4, 8, 8), torch.tensor([5.0]), torch.randn(1, 5, 16))
    with torch.no_grad():
        traced = torch.export.export(Wrapper(), inputs, strict=False).module()(*inputs)
        expected = Wrapper()(*inputs)
    assert len(traced) == len(expected) == 1 + 16
    for got, want in zip(traced, expected, strict=True):
        torch.testing.assert_close(got, want)
