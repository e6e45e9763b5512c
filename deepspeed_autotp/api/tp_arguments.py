# SPDX-License-Identifier: Apache-2.0
"""The arguments that ``parallelize``, ``from_pretrained`` and ``sharded_init`` have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deepspeed_autotp.config.tp_size import group_size, settle_tp_size
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.config.validation import wrong
from deepspeed_autotp.interop.process_groups import mesh_group


@dataclass(frozen=True, slots=True, kw_only=True)
class TPArguments:
    """Over which ranks a model is sharded, how, and where its shards go.

    ``called`` is the function that was called, and ``group_key`` what it calls its group.
    """

    called: str
    group_key: str
    tp_size: int | None
    group: dist.ProcessGroup | None
    mesh: Any
    config: TPTrainingConfig | Mapping[str, Any] | None
    device: torch.device | str | None

    def given_group(self) -> dist.ProcessGroup | None:
        """The process group that the user gives."""
        if not dist.is_initialized():
            raise ValueError(
                f"{self.called} needs torch.distributed: call "
                "torch.distributed.init_process_group and start the script with torchrun"
            )
        handle = self.group if self.mesh is None else mesh_group(self.mesh, self.called)
        if handle is not None:
            group_size(handle, dist, f"{self.called}: {self.group_key}")
        return handle

    def check(self) -> None:
        """ValueError for what contradicts itself, and for a device that is not here."""
        if sum(way is not None for way in (self.tp_size, self.group, self.mesh)) > 1:
            raise ValueError(
                f"{self.called}: got several of tp_size, {self.group_key} and mesh; pass one"
            )
        if self.device is not None and (reason := _missing(self.device)):
            expected = "a device of this machine, such as 'cuda'"
            raise ValueError(f"{self.called}: device: {wrong(self.device, expected)}: {reason}")

    def settings(self, handle: dist.ProcessGroup | None) -> TPTrainingConfig:
        """The configuration with the TP size in ``autotp_size``, wherever it was given."""
        settings = TPTrainingConfig.read(self.config)
        if "dtype" in settings.model_fields_set:
            raise ValueError(
                f"{self.called}: config.dtype has no effect here: the model trains in the data "
                "type of its weights; leave it out"
            )
        if settings.monitor:
            raise ValueError(
                f"{self.called}: config.monitor: got true, which needs the monitor of DeepSpeed's "
                "engine; leave it out, or call initialize"
            )
        nested = settings.tensor_parallel
        if nested.tp_group is not None or nested.mpu is not None:
            raise ValueError(
                f"{self.called}: config.tp has a tp_group or an mpu, which has no effect here; "
                f"pass {self.group_key} to {self.called} instead"
            )
        size = settle_tp_size(
            settings,
            tp_size=self.tp_size,
            group_ranks=None if handle is None else dist.get_world_size(handle),
            ranks=dist.get_world_size(),
            called=self.called,
            group_key=self.group_key,
        )
        return settings.model_copy(update={"autotp_size": size})


def _missing(device: torch.device | str) -> str:
    """Why ``device`` is not here; empty where it is."""
    try:
        is_meta = torch.empty(0, device=device).device.type == "meta"
    except (TypeError, RuntimeError, AssertionError, NotImplementedError) as error:
        return str(error).partition("\n")[0]
    return "it holds no values" if is_meta else ""
