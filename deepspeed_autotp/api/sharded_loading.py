# SPDX-License-Identifier: Apache-2.0
"""Models loaded as shards: each rank reads its own slices of the checkpoint's files.

What transformers' ``from_pretrained`` decides is left to it, and the model has the values that it
would have. No rank ever has the full weights, but of one tensor at a time where a conversion of the
checkpoint needs that, and of what the checkpoint does not have. torch.distributed must be
initialised; every rank makes the same calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp.api.pipeline import described
from deepspeed_autotp.api.torch_loop import (
    Settled,
    check_device,
    check_one,
    given_group,
    settings_of,
    sharded_over,
)
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.interop.transformers_loading import (
    load_pickled,
    refuse_arguments,
    replaced_from_pretrained,
    traced_loading,
)
from deepspeed_autotp.loading.checkpoint_files import checkpoint_tensors
from deepspeed_autotp.loading.file_weights import FileWeights, separate_weights
from deepspeed_autotp.loading.read_plan import are_equal
from deepspeed_autotp.loading.traced_tensor import traced
from deepspeed_autotp.planning.planner import compared


def from_pretrained(
    model_class: Any,
    path: str,
    *,
    tp_size: int | None = None,
    dtype: torch.dtype | str | None = None,
    config: TPTrainingConfig | Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    mesh: Any = None,
    device: torch.device | str | None = None,
    load_arguments: Mapping[str, Any] | None = None,
) -> nn.Module:
    """``model_class.from_pretrained(path)``, of which each rank loads its shards alone.

    model_class     a model class of transformers, or an AutoModel class
    path            a folder, or a name on the Hugging Face Hub
    dtype           data type of the weights; by default that of the checkpoint
    load_arguments  further keyword arguments of ``model_class.from_pretrained``
    tp_size, config, mesh, device, and ``group`` for tp_group: as in ``parallelize``

    Returns a sharded model in evaluation mode, and with ``output_loading_info`` among
    ``load_arguments`` the pair that transformers returns. Raises one ValueError on every rank.
    """
    arguments = dict(load_arguments or {})
    if dtype is not None:
        arguments["dtype"] = dtype
    with sharded_init(tp_size=tp_size, config=config, group=group, mesh=mesh, device=device):
        model: nn.Module = model_class.from_pretrained(path, **arguments)
    return model


@contextmanager
def sharded_init(
    *,
    tp_size: int | None = None,
    config: TPTrainingConfig | Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    mesh: Any = None,
    device: torch.device | str | None = None,
) -> Iterator[None]:
    """Within it every ``from_pretrained`` of a transformers model does as
    :func:`from_pretrained` with these arguments."""
    given = given_group(group, mesh)
    check_one(tp_size, group, mesh)

    def load(call: Callable[[], Any], arguments: Mapping[str, Any]) -> Any:
        return _loaded(call, arguments, tp_size=tp_size, config=config, given=given, device=device)

    with replaced_from_pretrained(load):
        yield


def _loaded(
    call: Callable[[], Any],
    arguments: Mapping[str, Any],
    *,
    tp_size: int | None,
    config: TPTrainingConfig | Mapping[str, Any] | None,
    given: dist.ProcessGroup | None,
    device: torch.device | str | None,
) -> Any:
    made: list[tuple[_Parts, FileWeights]] = []

    def settle() -> Settled:
        check_device(device)
        settings = settings_of(config, tp_size, given)
        if settings.autotp_size <= 1:
            return settings, compared(settings), None
        refuse_arguments(arguments)
        files = _Files()
        with traced_loading(files.tensors, are_equal):
            parts = _Parts.of(call())
        made.append((parts, separate_weights(parts.model)))
        return settings, compared(settings) | files.compared, described(parts.model)

    group = sharded_over(
        given,
        settle,
        example_inputs=None,
        device=device,
        weights=lambda: made[0][1] if made else None,
    )
    if group is not None:
        return made[0][0].joined
    parts = _Parts.of(call())
    if device is not None:
        parts.model.to(device)
    return parts.joined


@dataclass(frozen=True, slots=True)
class _Parts:
    """What ``from_pretrained`` of transformers has returned: a model, and with
    ``output_loading_info`` what it says of the loading."""

    model: nn.Module
    info: Mapping[str, Any] | None

    @staticmethod
    def of(returned: Any) -> _Parts:
        return _Parts(*returned) if isinstance(returned, tuple) else _Parts(returned, None)

    @property
    def joined(self) -> Any:
        return self.model if self.info is None else (self.model, self.info)


class _Files:
    """The files that were found, and what all ranks have to find alike."""

    def __init__(self) -> None:
        self.compared: dict[str, str] = {}

    def tensors(self, files: Sequence[str]) -> Mapping[str, Tensor]:
        """The tensors of ``files``, traced."""
        stored = checkpoint_tensors(files, load_pickled)
        self.compared |= {f"checkpoint {name}": str(each) for name, each in stored.items()}
        return {name: traced(each) for name, each in stored.items()}
