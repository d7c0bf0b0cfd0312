"""The block graph read off a trace."""

from __future__ import annotations

from types import SimpleNamespace

from dipgo_deploy.export.exporter import PlannedExport
from dipgo_deploy.export.planning import launched_evaluations


def test_unet_dependencies_come_from_the_graph(planned_unet: PlannedExport) -> None:
    graph = planned_unet.traced.graph
    assert [block.name for block in graph.blocks] == [
        "down_blocks.0",
        "down_blocks.1",
        "mid_block",
        "up_blocks.0",
        "up_blocks.1",
    ]
    assert all(block.cache == "output" and not block.inputs for block in graph.blocks)
    # The last down block has no downsampler: its output is its last skip tensor, one value.
    assert [len(block.outputs) for block in graph.blocks] == [2, 1, 1, 1, 1]
    assert graph.values["mid_block/out0"].reads >= {"down_blocks.1/out0", "encoder_hidden_states"}
    # The last up block takes a skip of the first down block, and conv_in's output, which is no block's.
    assert graph.values["up_blocks.1/out0"].reads >= {"latent", "up_blocks.0/out0", "timestep"}
    assert graph.values["noise_pred"].reads == {"up_blocks.1/out0", "guidance_scale"}
    assert graph.inputs == {
        "latent": "step",
        "timestep": "step",
        "guidance_scale": "constant",
        "encoder_hidden_states": "constant",
    }


def test_value_sizes_are_bytes_of_both_guidance_halves(planned_unet: PlannedExport) -> None:
    assert planned_unet.traced.graph.values["up_blocks.1/out0"].nbytes == 2 * 16 * 8 * 8 * 4
    assert planned_unet.traced.graph.values["mid_block/out0"].nbytes == 2 * 32 * 4 * 4 * 4


def test_residual_blocks_are_a_chain_of_their_inputs(planned_dit: PlannedExport) -> None:
    graph = planned_dit.traced.graph
    assert [block.inputs for block in graph.blocks] == [
        ("transformer_blocks.0/in0",),
        *((f"transformer_blocks.{i}/out0",) for i in range(3)),
    ]
    assert graph.values["transformer_blocks.0/in0"].reads == {"latent"}
    # The head is conditioned on timestep and class again.
    assert graph.values["noise_pred"].reads == {
        "transformer_blocks.3/out0",
        "timestep",
        "class_labels",
        "guidance_scale",
    }


def test_layers_of_a_transformer_depend_on_all_layers_before_them(planned_dit_layers: PlannedExport) -> None:
    graph = planned_dit_layers.traced.graph
    assert [block.name for block in graph.blocks] == [
        f"transformer_blocks.{index}.{part}" for index in range(4) for part in ("attn1", "ff")
    ]
    assert all(block.cache == "output" and len(block.outputs) == 1 for block in graph.blocks)
    # A layer is added to the hidden state through its gate, which is of this step.
    own = {"latent", "timestep", "class_labels"}
    assert graph.values["transformer_blocks.0.attn1/out0"].reads == own
    assert graph.values["transformer_blocks.1.attn1/out0"].reads == {
        *own,
        "transformer_blocks.0.attn1/out0",
        "transformer_blocks.0.ff/out0",
    }
    layers = {f"{block.name}/out0" for block in graph.blocks}
    assert graph.values["noise_pred"].reads == {*own, *layers, "guidance_scale"}


def test_the_layer_inventory_is_found_in_the_graph(planned_unet_layers: PlannedExport) -> None:
    graph = planned_unet_layers.traced.graph
    assert len(graph.blocks) == 8
    assert all(len(block.outputs) == 1 for block in graph.blocks)
    # An up block's pair takes its skip from the pair of the down block that made it.
    assert graph.values["up_blocks.1.attentions.0/out0"].reads >= {
        "up_blocks.0.upsamplers.0/out0",
        "down_blocks.0.attentions.0/out0",
    }


def test_macs_of_a_transformer_block(planned_dit_output: PlannedExport) -> None:
    graph = planned_dit_output.traced.graph
    width, tokens, batch = 16, 16, 2
    linear = 4 * width * width + 8 * width * width
    attention = 2 * tokens * width
    conditioning = 6 * width * width + 256 * width + width * width  # adaLN, and its own timestep embedding
    expected = batch * (tokens * (linear + attention) + conditioning)
    actual = sum(graph.costs[node] for node in graph.values["transformer_blocks.1/out0"].work)
    assert actual == expected


def test_no_stack_trace_or_path_is_left(planned_unet: PlannedExport) -> None:
    import onnx_ir as ir

    text = str(ir.to_proto(planned_unet.traced.model.graph).SerializeToString())
    assert ".py" not in text and "site-packages" not in text


def test_weights_have_their_parameters_names(planned_unet: PlannedExport) -> None:
    parameters = dict(planned_unet.source.denoiser.named_parameters())
    initializers = planned_unet.traced.model.graph.initializers
    assert set(parameters) - set(initializers) == set()
    # Where the exporter transposed a matrix, the values are still the parameter's.
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    stored = initializers[name].const_value
    assert stored is not None
    assert (parameters[name].detach().numpy() == stored.numpy().T).all()


def test_evaluations_that_repeat_the_last_prediction_have_no_launch(planned_unet: PlannedExport) -> None:
    blocks, steps = len(planned_unet.schedule.blocks), planned_unet.schedule.steps
    sampling = SimpleNamespace(used=planned_unet.used, strength=None, begin=None)
    for kept in ({0}, {0, steps - 1}, set(range(steps))):
        schedule = planned_unet.schedule.with_gates([[step in kept] * blocks for step in range(steps)])
        found = launched_evaluations(planned_unet.source, schedule, sampling, planned_unet.traced.graph)  # type: ignore[arg-type]
        assert found == len(kept)
