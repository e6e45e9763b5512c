# SPDX-License-Identifier: Apache-2.0
"""Gradients of several backward passes, and of parameters that a backward pass does not reach.

DeepSpeed 0.19.8 keeps the gradients of ZeRO 3, and those of an offloaded optimizer, in buffers
that only another gradient overwrites. A parameter that a step does not use, as of a layer that is
left out, is updated again with its gradient of an earlier step, and the first gradient of a later
micro-batch is added to that one. An offloaded optimizer, and ZeRO 1 with ``overlap_comm``, also
leave out what the last micro-batch of a step does not reach but an earlier one did. Without
offloading ZeRO 1 and 2 take zeros where there is no gradient, and so does every stage here.

ZeRO 3 also begins a new micro-batch with a forward, so that of two backward passes after two
forwards the second gradient overwrites the first; here the second backward pass begins one. ZeRO 1
and 2 overwrite the gradients of a step with those of another backward pass before it, which is
refused here.

The methods are replaced on the optimizer of one engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepspeed_autotp.interop.versions import required


def keep_gradients(engine: Any) -> None:
    """Let the optimizer of ``engine`` have the gradients of all backward passes of a step, and
    zeros where there are none."""
    replace = _REPLACE.get(type(engine.optimizer).__name__)
    if replace is not None:
        replace(engine.optimizer)


def _in_zero_1_and_2(optimizer: Any) -> None:
    """Give what a backward pass did not reach a gradient before its last bucket is reduced.

    ZeRO 1 reduces where a step ends, ZeRO 2 in each backward pass.
    """
    current = _Pass(optimizer)
    reduce, last = _method(optimizer, _REDUCE), _method(optimizer, _EPILOGUE)
    process = _method(optimizer, _PROCESS)

    def process_if_there(parameter: Tensor, group: int) -> Any:
        # Layers with a common input give None for those that were not called.
        return None if parameter.grad is None else process(parameter, group)

    def reduce_and_remember(parameter: Tensor, group: int) -> Any:
        current.add(parameter)
        return reduce(parameter, group)

    def fill_then_end() -> Any:
        current.end()
        ends_step = optimizer.is_gradient_accumulation_boundary()
        if ends_step:
            current.end_step()
        if optimizer.partition_gradients or ends_step:
            for number, group in enumerate(optimizer.bit16_groups):
                for parameter in current.others(group):
                    _reduce_unreached(optimizer, parameter, number, current)
        return last()

    setattr(optimizer, _PROCESS, process_if_there)
    setattr(optimizer, _REDUCE, reduce_and_remember)
    setattr(optimizer, _EPILOGUE, fill_then_end)


def _reduce_unreached(optimizer: Any, parameter: Tensor, group: int, current: _Pass) -> None:
    """Reduce what earlier micro-batches gave, or zeros where an old gradient would be taken."""
    if optimizer.get_gradient_for_reduction(parameter) is None:
        if not optimizer.cpu_offload:
            return
        parameter.grad = torch.zeros_like(parameter)
        optimizer.process_gradients(parameter, group)
    if not current.reaches(parameter):
        optimizer.reduce_ready_partitions_and_remove_grads(parameter, group)


def _in_zero_3(optimizer: Any) -> None:
    """Write zeros into the buffers of what a backward pass did not reach, or add them."""
    current = _Pass(optimizer)
    write, last = _method(optimizer, "partition_grads"), _method(optimizer, _EPILOGUE)

    def write_and_remember(parameters: Sequence[Tensor], partitions: Sequence[Tensor]) -> Any:
        for parameter in parameters:
            current.add(parameter)
        return write(parameters, partitions)

    def end_then_fill() -> Any:
        result = last()
        current.end()
        others: list[Any] = [p for g in optimizer.fp16_groups for p in current.others(g)]
        if others:
            sizes = [p.partition_numel() for p in others]
            zeros = torch.zeros(
                max(sizes), dtype=optimizer.gradient_accumulation_dtype, device=optimizer.device
            )
            write_and_remember(others, [zeros[:size] for size in sizes])
        return result

    optimizer.partition_grads = write_and_remember
    setattr(optimizer, _EPILOGUE, end_then_fill)


class _Pass:
    """The parameters that a backward pass has reached, until the next forward, backward or step."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._ids: set[int] = set()
        self._begins = False
        self._has_ended = self._has_ended_step = False
        for name in ("clear_backward_seen_flag", "zero_grad"):
            setattr(optimizer, name, self._forgetting(name, _method(optimizer, name)))
        self._begin = _method(optimizer, "backward_prologue")
        optimizer.backward_prologue = self._begin_anew

    def add(self, parameter: Tensor) -> None:
        self._ids.add(id(parameter))

    def end(self) -> None:
        self._has_ended = True

    def end_step(self) -> None:
        """ValueError where gradients of another pass wait for the step already."""
        if self._has_ended_step and self._begins:
            raise ValueError(
                "engine.backward: got another backward pass after the one that completes the "
                "gradients of a step, expected engine.step(): ZeRO 1 and 2 would replace the "
                "gradients by its own. Add the losses, or call engine.step() after each backward "
                "pass and have gradient_accumulation_steps count them; to do without the earlier "
                "gradients call engine.optimizer.zero_grad() first"
            )
        self._has_ended_step, self._begins = True, False

    def reaches(self, parameter: Tensor) -> bool:
        return id(parameter) in self._ids

    def others(self, group: Sequence[Tensor]) -> list[Tensor]:
        """The trained parameters of ``group`` that are not among them."""
        return [p for p in group if p.requires_grad and not self.reaches(p)]

    def _begin_anew(self) -> Any:
        if self._has_ended:  # without a forward since
            self._optimizer.clear_backward_seen_flag()
        self._begins = True
        return self._begin()

    def _forgetting(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def forget_then_call(*args: Any, **kwargs: Any) -> Any:
            self._ids.clear()
            self._has_ended = False
            if name == "zero_grad":
                self._has_ended_step = False
            return call(*args, **kwargs)

        return forget_then_call


def _method(optimizer: Any, name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = required(
        optimizer, name, project="deepspeed", needed_for="initialize"
    )
    return found


_EPILOGUE = "independent_gradient_partition_epilogue"
_PROCESS = "process_gradients"
_REDUCE = "reduce_independent_p_g_buckets_and_remove_grads"
_REPLACE: dict[str, Callable[[Any], None]] = {
    "DeepSpeedZeroOptimizer": _in_zero_1_and_2,
    "DeepSpeedZeroOptimizer_Stage3": _in_zero_3,
}
