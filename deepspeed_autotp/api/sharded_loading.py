# SPDX-License-Identifier: Apache-2.0
"""Models loaded as shards: each rank reads its own slices of the checkpoint's files.

What transformers' ``from_pretrained`` decides is left to it, and the model has the values that it
would have. No rank ever has the full weights, but of one tensor at a time where a conversion of the
checkpoint needs that, and of what the checkpoint does not have. torch.distributed must be
initialised; every rank makes the same calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deepspeed_autotp.api.pipeline import described
from deepspeed_autotp.api.torch_loop import Settled, sharded_over
from deepspeed_autotp.api.tp_arguments import TPArguments
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.interop.transformers_loading import (
    load_pickled,
    refuse_arguments,
    replaced_from_pretrained,
    traced_loading,
)
from deepspeed_autotp.loading.checkpoint_files import check_index, checkpoint_tensors
from deepspeed_autotp.loading.file_weights import FileWeights, separate_weights
from deepspeed_autotp.loading.read_plan import are_equal
from deepspeed_autotp.loading.traced_tensor import traced
from deepspeed_autotp.planning.agreed_plans import compared


def from_pretrained(
    model_class: Any,
    path: str | os.PathLike[str],
    *,
    tp_size: int | None = None,
    dtype: torch.dtype | str | None = None,
    config: TPTrainingConfig | Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    mesh: Any = None,
    device: torch.device | str | None = None,
    load_arguments: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """``model_class.from_pretrained(path, **kwargs)``, of which each rank loads its shards alone.

    model_class     a model class of transformers, or an AutoModel class
    path            a folder, or a name on the Hugging Face Hub
    dtype           data type of the weights; by default that of the checkpoint
    tp_size, config, mesh, device, and ``group`` for tp_group: as in ``parallelize``
    load_arguments  more of ``kwargs``, such as {"config": a configuration of transformers},
                    whose name is taken here

    Returns a sharded model in evaluation mode, and with ``output_loading_info`` among
    the keyword arguments the pair that transformers returns. Raises one ValueError on every rank.
    """
    arguments = TPArguments(
        called="from_pretrained",
        group_key="group",
        tp_size=tp_size,
        group=group,
        mesh=mesh,
        config=config,
        device=device,
    )
    own = {} if dtype is None else {"dtype": dtype}
    with _loading(arguments):
        model: nn.Module = model_class.from_pretrained(
            path, **own, **(load_arguments or {}), **kwargs
        )
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
    arguments = TPArguments(
        called="sharded_init",
        group_key="group",
        tp_size=tp_size,
        group=group,
        mesh=mesh,
        config=config,
        device=device,
    )
    with _loading(arguments):
        yield


@contextmanager
def _loading(arguments: TPArguments) -> Iterator[None]:
    given = arguments.given_group()

    def load(call: Callable[[], Any], keywords: Mapping[str, Any]) -> Any:
        return _loaded(call, keywords, arguments, given)

    with replaced_from_pretrained(load):
        yield


def _loaded(
    call: Callable[[], Any],
    keywords: Mapping[str, Any],
    arguments: TPArguments,
    given: dist.ProcessGroup | None,
) -> Any:
    made: list[tuple[_Parts, FileWeights]] = []

    def settle() -> Settled:
        arguments.check()
        _refuse_model_config(arguments)
        settings = arguments.settings(given)
        if settings.autotp_size <= 1:
            return settings, compared(settings), None
        refuse_arguments(keywords)
        files = _Files()
        with traced_loading(files.tensors, are_equal, check_index):
            parts = _Parts.of(call())
        made.append((parts, separate_weights(parts.model)))
        return settings, compared(settings) | files.compared, described(parts.model)

    group = sharded_over(
        given,
        settle,
        example_inputs=None,
        device=arguments.device,
        weights=lambda: made[0][1] if made else None,
    )
    if group is not None:
        return made[0][0].joined
    parts = _Parts.of(call())
    if arguments.device is not None:
        parts.model.to(arguments.device)
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


def _refuse_model_config(arguments: TPArguments) -> None:
    """ValueError for the configuration of a model in the place of that of its sharding."""
    config = arguments.config
    if config is not None and not isinstance(config, (TPTrainingConfig, Mapping)):
        raise ValueError(
            f"{arguments.called}: config: got {type(config).__name__}, expected a dictionary with "
            "keys of DeepSpeed's tensor_parallel section; give that of the model as "
            "load_arguments={'config': ...}, or within sharded_init to its class"
        )


class _Files:
    """The files that were found, and what all ranks have to find alike."""

    def __init__(self) -> None:
        self.compared: dict[str, str] = {}

    def tensors(self, files: Sequence[str]) -> Mapping[str, Tensor]:
        """The tensors of ``files``, traced."""
        stored = checkpoint_tensors(files, load_pickled)
        self.compared |= {f"checkpoint {name}": str(each) for name, each in stored.items()}
        return {name: traced(each) for name, each in stored.items()}
