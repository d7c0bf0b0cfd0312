"""One gated evaluation, and gates through time, against forwards written out by hand."""

from __future__ import annotations

import pytest
import torch
from dit_by_hand import forward as dit_by_hand_layers
from torch import Tensor, nn

from dipgo_deploy.errors import UserError
from dipgo_deploy.models import family_for
from dipgo_deploy.schedule.forecast import RuleForecast
from dipgo_deploy.supernet import CacheState, Supernet


def specs_of(model: nn.Module, granularity: str = "block"):
    return family_for(type(model).__name__).blocks(model.config, granularity)


def evaluations(count: int, *, labels: bool, dtype=torch.float32):
    """Latent, timestep and conditions for each evaluation: new latents, one condition."""
    conditions = (
        {"class_labels": torch.tensor([3, 7])}
        if labels
        else {"encoder_hidden_states": torch.randn(2, 5, 16, dtype=dtype)}
    )
    return [(torch.randn(2, 4, 8, 8, dtype=dtype), torch.full((2,), 900 - 100 * i), conditions) for i in range(count)]


def run(supernet: Supernet, rows, gates) -> list[Tensor]:
    state, predictions = CacheState(), []
    for step, (latent, timestep, conditions) in enumerate(rows):
        prediction, state = supernet.step(latent, timestep, conditions, gates[step], state, step)
        predictions.append(prediction)
    return predictions


def random_gates(steps: int, blocks: int, kept: float = 0.5) -> list[list[bool]]:
    gates = (torch.rand(steps, blocks) < kept).tolist()
    return [[True] * blocks, *gates[1:]]


def dit_by_hand(model: nn.Module, row, keep: list[bool], cache: dict[int, Tensor], kind: str) -> Tensor:
    latent, timestep, conditions = row
    labels = conditions["class_labels"]
    hidden = model.pos_embed(latent)
    for index, block in enumerate(model.transformer_blocks):
        if keep[index]:
            new = block(hidden, timestep=timestep, class_labels=labels)
            cache[index] = new - hidden if kind == "residual" else new
            hidden = new
        else:
            hidden = hidden + cache[index] if kind == "residual" else cache[index]
    embedding = model.transformer_blocks[0].norm1.emb(timestep, labels, hidden_dtype=hidden.dtype)
    shift, scale = model.proj_out_1(nn.functional.silu(embedding)).chunk(2, dim=1)
    hidden = model.proj_out_2(model.norm_out(hidden) * (1 + scale[:, None]) + shift[:, None])
    side = model.config.sample_size // 2
    hidden = hidden.reshape(-1, side, side, 2, 2, model.out_channels)
    return hidden.permute(0, 5, 1, 3, 2, 4).reshape(-1, model.out_channels, 2 * side, 2 * side)


def unet_by_hand(model: nn.Module, row, keep: list[bool], cache: dict[int, Tensor]) -> Tensor:
    """The UNet with one gate a layer, composed of its resnets, attentions and samplers in the paper's order."""
    latent, timestep, conditions = row
    text, units = conditions["encoder_hidden_states"], iter(range(len(keep)))
    embedding = model.time_embedding(model.time_proj(timestep).to(latent.dtype))

    def unit(compute, hidden: Tensor) -> Tensor:
        index = next(units)
        if keep[index]:
            cache[index] = compute(hidden)
        return cache[index]

    def pair(block: nn.Module, index: int, tail=None):
        def compute(hidden: Tensor) -> Tensor:
            hidden = block.resnets[index](hidden, embedding)
            if getattr(block, "attentions", None) is not None:
                hidden = block.attentions[index](hidden, encoder_hidden_states=text).sample
            return tail(hidden) if tail is not None else hidden

        return compute

    hidden = model.conv_in(latent)
    skips = [hidden]
    for block in model.down_blocks:
        for index in range(len(block.resnets)):
            hidden = unit(pair(block, index), hidden)
            skips.append(hidden)
        if block.downsamplers is not None:
            hidden = unit(block.downsamplers[0], hidden)
            skips.append(hidden)
    hidden = unit(lambda h: model.mid_block(h, embedding, encoder_hidden_states=text), hidden)
    for block in model.up_blocks:
        for index in range(len(block.resnets)):
            last = index == len(block.resnets) - 1
            tail = block.upsamplers[0] if last and block.upsamplers is not None else None
            hidden = unit(pair(block, index, tail), torch.cat([hidden, skips.pop()], dim=1))
    assert next(units, None) is None
    return model.conv_out(model.conv_act(model.conv_norm_out(hidden)))


@pytest.mark.parametrize("kind", ["residual", "output"])
def test_dit_equals_blocks_composed_by_hand(dit, kind) -> None:
    rows, gates = evaluations(8, labels=True), random_gates(8, 4)
    with torch.no_grad():
        got = run(Supernet(dit, specs_of(dit), [kind] * 4), rows, gates)
        cache: dict[int, Tensor] = {}
        expected = [dit_by_hand(dit, row, keep, cache, kind) for row, keep in zip(rows, gates, strict=True)]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_dit_layers_equal_the_authors_blocks(dit) -> None:
    rows, gates = evaluations(8, labels=True), random_gates(8, 8)
    specs = specs_of(dit, "layer")
    assert [spec.name.split(".", 1)[1] for spec in specs[:3]] == ["0.attn1", "0.ff", "1.attn1"]
    with torch.no_grad():
        got = run(Supernet(dit, specs), rows, gates)
        stored: dict[int, Tensor] = {}
        expected = [
            dit_by_hand_layers(dit, latent, timestep, conditions["class_labels"], keep, stored)
            for (latent, timestep, conditions), keep in zip(rows, gates, strict=True)
        ]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_residual_is_the_default_of_dit_and_differs_from_output(dit) -> None:
    rows, gates = evaluations(2, labels=True), [[True] * 4, [True, False, False, True]]
    with torch.no_grad():
        default = run(Supernet(dit, specs_of(dit)), rows, gates)[1]
        residual, output = (
            run(Supernet(dit, specs_of(dit), [kind] * 4), rows, gates)[1] for kind in ("residual", "output")
        )
    assert torch.equal(default, residual)
    assert not torch.allclose(residual, output, atol=1e-3)


def test_unet_layers_equal_layers_composed_by_hand(unet) -> None:
    rows, gates = evaluations(6, labels=False), random_gates(6, 24)
    with torch.no_grad():
        got = run(Supernet(unet, specs_of(unet, "layer")), rows, gates)
        cache: dict[int, Tensor] = {}
        expected = [unet_by_hand(unet, row, keep, cache) for row, keep in zip(rows, gates, strict=True)]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_unet_blocks_equal_a_stock_model_whose_blocks_are_patched(unet) -> None:
    rows, gates = evaluations(8, labels=False), random_gates(8, 9)
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    with torch.no_grad():
        got = run(Supernet(unet, specs_of(unet)), rows, gates)
        memory: dict[int, object] = {}
        expected = []
        for (latent, timestep, conditions), keep in zip(rows, gates, strict=True):
            for index, block in enumerate(blocks):

                def patched(*args, _index=index, _block=block, _keep=keep, **kwargs):
                    if _keep[_index]:
                        memory[_index] = type(_block).forward(_block, *args, **kwargs)
                    return memory[_index]

                block.forward = patched
            expected.append(unet(latent, timestep, **conditions).sample)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "granularity"), [("unet", "block"), ("unet", "layer"), ("dit", "block")])
def test_soft_gates_of_zero_and_one_equal_bools(request, name, granularity) -> None:
    model = request.getfixturevalue(name)
    supernet = Supernet(model, specs_of(model, granularity))
    rows = evaluations(5, labels=name == "dit")
    hard = random_gates(5, len(supernet.specs))
    soft = torch.tensor(hard, dtype=torch.float32)
    with torch.no_grad():
        expected = run(supernet, rows, hard)
        got = run(supernet, rows, soft)  # the first row, all ones, needs no cache
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_half_open_gate_mixes_and_stores_the_mix(dit) -> None:
    rows = evaluations(3, labels=True)
    supernet = Supernet(dit, specs_of(dit), ["output"] * 4)
    half = torch.tensor(0.25)
    with torch.no_grad():
        _, first = supernet.step(*rows[0], [True] * 4, CacheState(), 0)
        _, mixed = supernet.step(*rows[1], [True, half, True, True], first, 1)
        _, fresh = supernet.step(*rows[1], [True] * 4, first, 1)
    name = "transformer_blocks.1"
    expected = 0.25 * fresh.tensors[name][0] + 0.75 * first.tensors[name][0]
    torch.testing.assert_close(mixed.tensors[name][0], expected)


def test_steps_leave_their_inputs_and_the_model_alone(unet) -> None:
    supernet = Supernet(unet, specs_of(unet))
    row = evaluations(1, labels=False)[0]
    empty = CacheState()
    with torch.no_grad():
        stock = unet(row[0], row[1], **row[2]).sample
        prediction, after = supernet.step(*row, [True] * 9, empty, 0)
        kept = {name: [t.clone() for t in tensors] for name, tensors in after.tensors.items()}
        supernet.step(*row, [False, True] * 4 + [False], after, 1)
        again = unet(row[0], row[1], **row[2]).sample
    assert torch.equal(prediction, stock) and torch.equal(again, stock)
    assert not empty.tensors and set(after.tensors) == {spec.name for spec in supernet.specs}
    for name, tensors in kept.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, after.tensors[name], strict=True))
    assert all(not module._forward_hooks and "forward" not in vars(module) for module in unet.modules())


def test_a_removed_block_is_not_run(unet) -> None:
    supernet = Supernet(unet, specs_of(unet))
    rows = evaluations(2, labels=False)
    calls = []
    unet.down_blocks[2].resnets[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        _, state = supernet.step(*rows[0], [True] * 9, CacheState(), 0)
        supernet.step(*rows[1], [i != 2 for i in range(9)], state, 1)
    assert len(calls) == 1


def test_model_is_restored_after_an_error(unet) -> None:
    supernet = Supernet(unet, specs_of(unet))
    rows = evaluations(2, labels=False)
    with torch.no_grad():
        _, state = supernet.step(*rows[0], [True] * 9, CacheState(), 0)
        with pytest.raises(TypeError):
            supernet.step(*rows[1][:2], {"no_such_input": rows[0][0]}, [False] + [True] * 8, state, 1)
    assert all(not module._forward_hooks and "forward" not in vars(module) for module in unet.modules())


@pytest.mark.parametrize(("name", "granularity"), [("unet", "block"), ("unet", "layer"), ("dit", "block")])
def test_declared_modules_are_exactly_what_a_removed_block_does_without(request, name, granularity) -> None:
    """A removed block's own parameters have no part in the prediction, all other blocks' have."""
    model = request.getfixturevalue(name).requires_grad_(True)
    specs = specs_of(model, granularity)
    supernet = Supernet(model, specs)
    rows = evaluations(2, labels=name == "dit")
    with torch.no_grad():
        _, state = supernet.step(*rows[0], [True] * len(specs), CacheState(), 0)
    for removed in range(0, len(specs), 1 if len(specs) < 12 else 5):
        model.zero_grad(set_to_none=True)
        prediction, _ = supernet.step(*rows[1], [k != removed for k in range(len(specs))], state, 1)
        prediction.square().sum().backward()
        own = {id(p) for path in specs[removed].modules for p in model.get_submodule(path).parameters()}
        assert own
        for path, parameter in model.named_parameters():
            if id(parameter) in own:
                assert parameter.grad is None, path
        # Residual caches pass on what comes before; with output caches some of it is dead.
        used = [k for k in range(len(specs)) if k > removed or (k < removed and name == "dit")]
        for k in used:
            grads = [p.grad for path in specs[k].modules for p in model.get_submodule(path).parameters()]
            assert any(grad is not None and grad.abs().max() > 0 for grad in grads), specs[k].name


def test_reading_what_was_never_written_names_step_and_block(unet) -> None:
    supernet = Supernet(unet, specs_of(unet))
    row = evaluations(1, labels=False)[0]
    for missing in (False, torch.tensor(0.5)):
        with pytest.raises(UserError, match=r"evaluation 3, block mid_block: removed, but its cache was never written"):
            supernet.step(*row, [k != 4 or missing for k in range(9)], CacheState(), 3)


@pytest.mark.parametrize("gate", [2, 0.5, "1", None, torch.zeros(2)])
def test_what_is_no_gate_is_refused(dit, gate) -> None:
    supernet = Supernet(dit, specs_of(dit))
    with pytest.raises(UserError, match=r"evaluation 0, block transformer_blocks.1: gate"):
        supernet.step(*evaluations(1, labels=True)[0], [True, gate, True, True], CacheState(), 0)


def test_wrong_numbers_are_refused(dit, unet) -> None:
    with pytest.raises(UserError, match="3 gates for 4 blocks"):
        Supernet(dit, specs_of(dit)).step(*evaluations(1, labels=True)[0], [True] * 3, CacheState(), 0)
    with pytest.raises(UserError, match="1 cache kinds for 4 blocks"):
        Supernet(dit, specs_of(dit), ["output"])
    with pytest.raises(UserError, match="down_blocks.0.*'residual'"):
        Supernet(unet, specs_of(unet), ["residual"] * 9)


@pytest.mark.parametrize("kind", ["residual", "output"])
def test_a_forecast_block_is_the_weighted_sum_of_what_it_stored(dit, kind) -> None:
    """Two blocks read with weights by a rule, by hand: the last stored values, the latest first."""
    rows = evaluations(6, labels=True)
    gates = [[True] * 4, [True, False, True, True], [True] * 4, [True] * 4, *[[True, False, False, True]] * 2]
    supernet = Supernet(dit, specs_of(dit), [kind] * 4)
    supernet.forecast = RuleForecast(kind="taylor", order=2)
    with torch.no_grad():
        state = CacheState()
        for step, row in enumerate(rows):
            prediction, after = supernet.step(*row, gates[step], state, step)
            if step in (1, 5):
                # The same evaluation with plain reads of the sums, put together by hand.
                sums = {}
                for block in (1, 2):
                    name = f"transformer_blocks.{block}"
                    if not gates[step][block]:
                        weights = supernet.forecast.weights_of(step, block, state.stored_at[name])
                        held = [values[0] for values in state.stored(name)]
                        assert len(held) == (1 if step == 1 else 3) and len(weights) == len(held)
                        sums[name] = [sum(w * tensor for w, tensor in zip(weights, held, strict=True))]
                plain = Supernet(dit, specs_of(dit), [kind] * 4)
                by_hand = CacheState({**state.tensors, **sums}, state.structures)
                expected, _ = plain.step(*row, gates[step], by_hand, step)
                torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)
            state = after
        assert state.stored_at["transformer_blocks.1"] == (3, 2, 0)
        assert state.stored_at["transformer_blocks.0"] == (5, 4, 3)
        with pytest.raises(UserError, match="a soft gate cannot be forecast"):
            supernet.step(*rows[0], [torch.tensor(0.5), True, True, True], state, 6)


def test_a_forecast_reads_halves_where_an_evaluation_is_conditional_only(dit) -> None:
    """Of guided values the second half, beside those that such evaluations stored; a guided one reads what was stored
    since."""
    rows = evaluations(5, labels=True)
    half = [
        (latent[1:], timestep[1:], {"class_labels": labels["class_labels"][1:]}) for latent, timestep, labels in rows
    ]
    specs, name = specs_of(dit), "transformer_blocks.1"
    supernet = Supernet(dit, specs, ["output"] * 4)
    supernet.forecast = RuleForecast(kind="taylor", order=1)
    kept, removed = [True] * 4, [True, False, True, True]
    with torch.no_grad():
        states = [CacheState()]
        for step, (row, alone) in enumerate([(rows[0], False), (rows[1], False), (half[2], True), (rows[3], False)]):
            states.append(supernet.step(*row, kept, states[-1], step, conditional=alone)[1])
        _, _, guided, alone, again = states
        first, second = (values[0] for values in guided.read(name))
        assert guided.steps_read(name) == guided.steps_read(name, "conditional") == (1, 0)
        # 2 forecasts from the halves of 1 and 0: the last one, and as much again as it differs from the one before.
        by_hand = CacheState({**guided.tensors, name: [(2 * first - second)[1:]]}, guided.structures, halved={name})
        plain = Supernet(dit, specs, ["output"] * 4)
        expected, _ = plain.step(*half[2], removed, by_hand, 2, conditional=True)
        found, _ = supernet.step(*half[2], removed, guided, 2, conditional=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        # What evaluation 2 stored is half, and so is what is held of the one before it.
        assert [len(values[0]) for values in alone.read(name, "conditional")] == [1, 1]
        torch.testing.assert_close(alone.read(name, "conditional")[1][0], first[1:])
        with pytest.raises(UserError, match="since a conditional-only one wrote it"):
            supernet.step(*rows[3], removed, alone, 3)
        # After a guided evaluation guided ones read that alone, others both.
        assert (again.steps_read(name), again.steps_read(name, "conditional")) == ((3,), (3, 2))
        assert [len(values[0]) for values in again.read(name)] == [2]
        assert [len(values[0]) for values in again.read(name, "conditional")] == [1, 1]
        torch.testing.assert_close(again.read(name, "unconditional")[0][0], again.read(name)[0][0][:1])
