"""What runs in Triton's Python backend: requests of Triton as batches of an engine directory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pydantic

from dipgo_deploy.errors import UserError
from dipgo_deploy.schedule.validation import one_line
from dipgo_deploy.serve.batching import Batcher
from dipgo_deploy.serve.lane import Abandoned, draw_apart
from dipgo_deploy.serve.schemas import GenerationRequest
from dipgo_deploy.serve.triton import IMAGE, SEED, Tensor, inputs_of

if TYPE_CHECKING:
    from dipgo_deploy.serve.engine import Drawn, Engine, Wanted


class Model:
    """A model of Triton's. folder: of model.py, which a relative path of the engine directory begins at."""

    folder: ClassVar[Path]

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine directory. args: as Triton gives them."""
        if args.get("model_instance_kind") == "GPU":
            # Every instance is a process of its own; before anything looks for a GPU.
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        from dipgo_deploy.runtime.pipeline import Pipeline
        from dipgo_deploy.serve.engine import Engine

        config = json.loads(args["model_config"])
        given = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        threads = int(given["threads"]) if given["threads"] else None
        pipeline = Pipeline.from_engine_dir(
            self.folder / given["engine_dir"], given["backend"], threads=threads, load="call"
        )
        self._engine: Engine = Engine(config["name"], pipeline)
        self._inputs = inputs_of(list(self._engine.manifests.values()))
        self._engine.load()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """A response for each request, in their order; one that is wrong or has no picture fails alone."""
        batcher: Batcher[tuple[int, int]] = Batcher(self._engine.batch, 0.0)
        wanted: list[list[Wanted]] = []
        drawn: list[dict[int, Drawn]] = [{} for _ in requests]
        errors: list[Any] = [None] * len(requests)
        for number, request in enumerate(requests):
            try:
                wanted.append(self._wanted(request))
            except UserError as error:
                errors[number] = _error(error, "INVALID_ARG")
                wanted.append([])
            for place, one in enumerate(wanted[number]):
                batcher.add((number, place), one.key, 0.0)
        while batch := [item for item, _ in batcher.take()]:
            numbers = {number for number, _ in batch}

            def check(numbers: set[int] = numbers) -> None:
                if all(requests[number].is_cancelled() for number in numbers):
                    raise Abandoned("cancelled")

            try:
                outcomes = draw_apart(self._engine.draw, [wanted[number][place] for number, place in batch], check)
            except Exception as error:
                outcomes = [error] * len(batch)
            for (number, place), outcome in zip(batch, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    errors[number] = _error(outcome, "CANCELLED" if isinstance(outcome, Abandoned) else "INTERNAL")
                else:
                    drawn[number][place] = outcome
        return [_response(wanted[number], drawn[number], errors[number]) for number in range(len(requests))]

    def finalize(self) -> None:
        """Let go of the engine directory."""
        self._engine.close()

    def _wanted(self, request: Any) -> list[Wanted]:
        """The pictures of a request, each a row of its inputs."""
        import triton_python_backend_utils as triton

        columns: dict[str, list[Any]] = {}
        for tensor in self._inputs:
            given = triton.get_input_tensor_by_name(request, tensor.name)
            if given is not None:
                columns[tensor.name] = [_value(tensor, value) for value in given.as_numpy().reshape(-1)]
        rows = len(next(iter(columns.values()), ()))
        if not rows:
            raise UserError("a request without inputs; give at least a seed")
        found = []
        for place in range(rows):
            fields = {name: values[place] for name, values in columns.items()}
            height, width = fields.pop("height", None), fields.pop("width", None)
            if (height is None) != (width is None):
                raise UserError("height and width: give both or none")
            if height is not None:
                fields["size"] = f"{width}x{height}"
            try:
                asked = GenerationRequest(**fields)
            except pydantic.ValidationError as error:
                raise UserError(one_line(error)) from None
            found += self._engine.wanted(asked)
        if len({(one.schedule, one.row.height, one.row.width) for one in found}) > 1:
            raise UserError("pictures of several sizes or schedules in one request; give each a request")
        return found


def _value(tensor: Tensor, value: Any) -> Any:
    """One number or text, of Python's own types."""
    if tensor.dtype != "STRING":
        return value.item()
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise UserError(f"{tensor.name}: not UTF-8 text") from None


def _error(error: Exception, code: str) -> Any:
    import triton_python_backend_utils as triton

    return triton.TritonError(str(error), getattr(triton.TritonError, code))


def _response(wanted: Sequence[Wanted], drawn: dict[int, Drawn], error: Any) -> Any:
    import triton_python_backend_utils as triton

    if error is not None:
        return triton.InferenceResponse(error=error)
    images = np.stack([np.asarray(drawn[place].image) for place in range(len(wanted))])
    seeds = np.array([[one.seed] for one in wanted], np.uint64)
    return triton.InferenceResponse(output_tensors=[triton.Tensor(IMAGE, images), triton.Tensor(SEED, seeds)])
