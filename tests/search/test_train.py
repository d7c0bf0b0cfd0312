from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dipgo_deploy.errors import UserError
from dipgo_deploy.models.guidance import Guidance, beyond_conditional
from dipgo_deploy.search import checkpoint
from dipgo_deploy.search.loop_loss import CheckpointedSupernet, LoopLoss
from dipgo_deploy.search.problem import Pair, Problem
from dipgo_deploy.search.pruner import Pruner, PrunerSize
from dipgo_deploy.search.samples import SampleStream
from dipgo_deploy.search.train import LOG_NAME, Progress, Trainer, TrainOptions, learning_rate, train
from dipgo_deploy.supernet import Supernet

SIZE = PrunerSize(width=16, hidden=(8,))
OPTIONS = TrainOptions(iterations=4, batch=2, optimizer="adam", lr=0.3, save_every=1)
SETTINGS = {"model": "tiny"}


def trainer(problem: Problem, options: TrainOptions = OPTIONS) -> Trainer:
    torch.manual_seed(0)
    pruner = Pruner(problem.steps, len(problem.target.blocks), SIZE)
    return Trainer(problem, pruner, options, SampleStream(len(problem.conditions)))


def soft_gradient(problem: Problem, options: TrainOptions) -> torch.Tensor:
    """Gradient of the loss with respect to gates between keep and remove."""
    made = trainer(problem, options)
    torch.manual_seed(1)
    gates = torch.rand(problem.steps, len(problem.target.blocks), requires_grad=True)
    made._loss(gates, made.samples.pairs(0, 2)).backward()
    assert gates.grad is not None
    return gates.grad


@pytest.mark.parametrize("loss", ["ssim", "latent-l2"])
def test_checkpointing_changes_no_gradient(problem: Problem, loss: str) -> None:
    options = replace(OPTIONS, loss=loss)
    plain = soft_gradient(problem, replace(options, checkpoint_steps=False))
    stepwise = soft_gradient(problem, options)
    assert torch.allclose(plain, stepwise, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    # Through time: the gates of every step but the first, which is kept, have an effect.
    assert torch.equal(plain[0], torch.zeros_like(plain[0]))
    assert (plain[1:].abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("checkpoint_steps", [False, True])
def test_the_loop_is_guided_as_the_model_is(problem: Problem, checkpoint_steps: bool) -> None:
    """Not every family's guidance is the plain one."""
    net = problem.supernet
    guided = Supernet(net.model, net.specs, net.cache_kinds, net.call, Guidance(beyond_conditional, off=0.0))
    problem = replace(problem, supernet=guided)
    loss = LoopLoss(problem, "latent-l2", checkpoint_steps=checkpoint_steps)
    assert loss(torch.ones(problem.steps, 3), (Pair(0, 1),)).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("gradients", [False, True])
def test_checkpointed_steps_keep_the_caches_they_are_told_to(problem: Problem, gradients: bool) -> None:
    net, names = problem.supernet, [block.name for block in problem.target.blocks]
    batch = problem.batch(SampleStream(len(problem.conditions)).pairs(0, 1))
    kept: list[set[str]] = []
    problem.run(
        batch,
        torch.ones(problem.steps, len(names), requires_grad=gradients),
        CheckpointedSupernet(net.model, net.specs, net.cache_kinds, net.call),
        record=lambda evaluation: kept.append(set(evaluation.after.tensors)),
        keep=lambda step: names[:1],
    )
    assert kept == [set(names[:1])] * problem.steps


def test_the_gradient_is_that_of_the_loss(problem: Problem) -> None:
    """Against a finite difference, in one direction, on the latents."""
    made = trainer(problem, replace(OPTIONS, loss="latent-l2"))
    pairs = made.samples.pairs(0, 2)
    torch.manual_seed(1)
    gates = 0.25 + 0.5 * torch.rand(problem.steps, 3)
    direction = torch.randn_like(gates)
    direction[0] = 0
    leaf = gates.clone().requires_grad_()
    made._loss(leaf, pairs).backward()
    assert leaf.grad is not None
    step = 1e-2
    with torch.no_grad():
        ahead, behind = (made._loss(gates + sign * step * direction, pairs).item() for sign in (1, -1))
    assert (leaf.grad * direction).sum().item() == pytest.approx((ahead - behind) / (2 * step), rel=0.05)


def test_an_interrupted_run_resumes_to_the_same_result(problem: Problem, tmp_path: Path) -> None:
    whole = train(trainer(problem), SETTINGS, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.iteration == 2:
            raise Interrupted

    folder = tmp_path / "interrupted"
    with pytest.raises(Interrupted):
        train(trainer(problem), SETTINGS, folder, notify=stop)
    assert checkpoint.load(folder).iteration == 1
    resumed = trainer(problem)
    torch.nn.init.zeros_(resumed.pruner.queries)  # must come from the checkpoint
    assert train(resumed, SETTINGS, folder, resume=True) == whole
    logs = [
        [json.loads(line) for line in (path / LOG_NAME).read_text().splitlines()]
        for path in (tmp_path / "whole", folder)
    ]
    for left, right in zip(*logs, strict=True):
        left.pop("seconds"), right.pop("seconds")
        assert left == right
    assert [line["iteration"] for line in logs[0]] == [1, 2, 3, 4]
    assert {"loss", "kept", "lr", "distance", "sparsity"} < set(logs[0][0])


def test_resuming_wants_the_same_settings(problem: Problem, tmp_path: Path) -> None:
    short = replace(OPTIONS, iterations=1)
    train(trainer(problem, short), SETTINGS, tmp_path)
    with pytest.raises(UserError, match="was begun with train.iterations 1, now it is"):
        train(trainer(problem), SETTINGS, tmp_path, resume=True)
    with pytest.raises(UserError, match="was begun with model 'tiny', now it is 'other'"):
        train(trainer(problem, short), {"model": "other"}, tmp_path, resume=True)
    with pytest.raises(UserError, match="no such checkpoint"):
        train(trainer(problem), SETTINGS, tmp_path / "nowhere", resume=True)
    (tmp_path / checkpoint.NAME).write_bytes(b"\x80\x04broken")
    with pytest.raises(UserError, match="is no checkpoint"):
        train(trainer(problem, short), SETTINGS, tmp_path, resume=True)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(
    problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(problem, replace(OPTIONS, save_every=100))
    good = {}

    def spoil(progress: Progress) -> None:
        if progress.iteration == 2:
            good.update({name: tensor.clone() for name, tensor in made.pruner.state_dict().items()})
            spoiled = lambda pruned, full: pruned.mean(dim=(1, 2, 3)) * float("nan")  # noqa: E731
            monkeypatch.setattr(made._loss, "_distance", spoiled)

    with pytest.raises(UserError, match=r"iteration 3: the loss is not a number; .* keeps the state before it"):
        train(made, SETTINGS, tmp_path, notify=spoil)
    kept = checkpoint.load(tmp_path)
    assert kept.iteration == 2
    assert all(torch.equal(kept.tensors[f"model.{name}"], tensor) for name, tensor in good.items())
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_sparsity_pushes_until_few_gates_are_left(problem: Problem, optimizer: str) -> None:
    """With a large weight on sparsity gates go; below the stop share nothing pushes any more."""
    options = replace(
        OPTIONS, alpha=1000.0, optimizer=optimizer, lr=0.02 if optimizer == "sgd" else 0.3, iterations=6, stop_share=0.5
    )
    steps: list[Progress] = []
    train(trainer(problem, options), SETTINGS, notify=steps.append)
    assert steps[0].kept == 1.0
    assert min(step.kept for step in steps) < 0.5
    assert all((step.sparsity == 0) == (step.kept < 0.5) for step in steps)


def test_accumulation_is_a_larger_batch(problem: Problem) -> None:
    one = trainer(problem, replace(OPTIONS, batch=2, accumulation=1, optimizer="sgd", lr=1.0))
    two = trainer(problem, replace(OPTIONS, batch=1, accumulation=2, optimizer="sgd", lr=1.0))
    for made in (one, two):
        made.pruner.warm_start([[True] * 3, [True, False, True], [False] * 3, [True] * 3, [False, True, False]])
        made.iterate()
    for left, right in zip(one.pruner.parameters(), two.pruner.parameters(), strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-6)


def test_bfloat16_runs(problem: Problem) -> None:
    made = trainer(problem, replace(OPTIONS, precision="bf16"))
    made.pruner.warm_start([[True] * 3, [False] * 3, [True] * 3, [False] * 3, [True] * 3])
    assert made.iterate().distance > 0


def test_the_learning_rate_warms_up_and_falls() -> None:
    options = replace(OPTIONS, iterations=10, warmup=2, lr=1.0)
    rates = [learning_rate(options, iteration) for iteration in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[6] == pytest.approx(0.5)


def test_relative_prices_have_mean_one(problem: Problem) -> None:
    plain, relative = (
        trainer(problem, replace(OPTIONS, alpha=0.5, relative_price=kind)).iterate() for kind in (False, True)
    )
    gamma = problem.costs.gamma
    assert plain.sparsity == pytest.approx(0.5 * sum(gamma) / len(gamma))
    assert relative.sparsity == pytest.approx(0.5)
