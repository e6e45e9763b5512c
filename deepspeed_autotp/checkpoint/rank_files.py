# SPDX-License-Identifier: Apache-2.0
"""The files of a checkpoint that DeepSpeed's engine has written, one or two for each rank.

They are mapped into memory: of a tensor only what is used is read.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.serialization import safe_globals

from deepspeed_autotp.base.printable import printable
from deepspeed_autotp.interop.deepspeed.checkpoints import saved_classes
from deepspeed_autotp.interop.torch_archive import check_archive, check_loaded

# How a file of torch.save begins.
_ARCHIVE = b"PK\x03\x04"
# What torch says of a class that is not let in.
_OTHER_CLASS = re.compile(r"GLOBAL (\S+) was not an allowed global")
# What all ranks note alike when they save.
_OF_RUN = ("global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_version")
_OF_OPTIMIZER = ("zero_stage", "ds_version")

# What code raises that takes the content of a file at its word.
_UNLIKE_SAVED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,  # of torch, where sizes do not go together
    TypeError,
)

_Facts = Mapping[str, str]
_FactsOf = Callable[[Mapping[str, Any]], _Facts]


@contextmanager
def as_saved(folder: Path) -> Iterator[None]:
    """Within it what is found in the place of what an engine saves is a ValueError: the files of a
    checkpoint may be of others, and what DeepSpeed puts into them is not described."""
    try:
        yield
    except _UNLIKE_SAVED as error:
        raise ValueError(
            f"the checkpoint {str(folder)!r} does not hold what save_checkpoint of an engine "
            f"writes: {type(error).__name__}: {printable(str(error))}; load another checkpoint"
        ) from error


class CheckpointFiles:
    """The names of the files in ``folder``, and what they hold. ValueError for one that is missing,
    damaged or of another save than that of rank 0.

    Objects of other classes than torch's, DeepSpeed's and Python's own are loaded only where the
    files are ``trusted``, as by an engine that loads them itself: making them can run any code.
    """

    def __init__(self, folder: Path, *, trusted: bool = False) -> None:
        self.folder = folder
        self._trusted = trusted
        self._opened: dict[str, dict[str, Any]] = {}
        self._facts: dict[str, _Facts] = {}  # of the files of rank 0
        self._of_optimizer = "bf16_zero_" if any(folder.glob("bf16_zero_pp_rank_*")) else "zero_"
        self.is_stage3 = any(folder.glob("zero_pp_rank_*_model_states.pt"))

    def model_name(self, rank: int, replica: int) -> str:
        """The file with the weights of a TP rank."""
        prefix = f"zero_pp_rank_{replica}_" if self.is_stage3 else ""
        return f"{prefix}mp_rank_{rank:02d}_model_states.pt"

    def optimizer_name(self, rank: int, replica: int) -> str:
        """The file with what a rank has of the optimizer under ZeRO."""
        return f"{self._of_optimizer}pp_rank_{replica}_mp_rank_{rank:02d}_optim_states.pt"

    def model(self, rank: int, replica: int = 0) -> dict[str, Any]:
        """What the file with the weights of a rank holds. ValueError as of the class."""
        return self._open(self.model_name(rank, replica), self.model_name(0, 0), _model_facts)

    def optimizer(self, rank: int, replica: int) -> dict[str, Any]:
        """DeepSpeed's optimizer of a rank under ZeRO."""
        states: dict[str, Any] = self.optimizer_file(rank, replica)["optimizer_state_dict"]
        return states

    def optimizer_file(self, rank: int, replica: int) -> dict[str, Any]:
        """All that the file with it holds."""
        names = self.optimizer_name(rank, replica), self.optimizer_name(0, 0)
        return self._open(*names, _optimizer_facts)

    def check_all(self, names: Sequence[str]) -> None:
        """ValueError naming those of ``names`` that are missing, or were cut off."""
        missing = [name for name in names if not (self.folder / name).is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"the checkpoint {str(self.folder)!r} is not whole: {', '.join(missing[:3])}{more} "
                "missing; copy the files of all ranks into one folder, as use_node_local_storage "
                "leaves them on each node, or load another checkpoint"
            )
        for name in names:
            file = self.folder / name
            with open(file, "rb") as opened:
                is_archive = opened.read(len(_ARCHIVE)) == _ARCHIVE
            if is_archive and not zipfile.is_zipfile(file):
                raise self._unreadable(file, "its end is missing")

    def _open(self, name: str, first: str, facts: _FactsOf) -> dict[str, Any]:
        """What the file ``name`` holds; ``first`` is that of rank 0."""
        if name not in self._opened:
            opened = self._read(name)
            with as_saved(self.folder):
                own = facts(opened)
            if name == first:
                self._facts[first] = own
            else:
                self._open(first, first, facts)
                self._refuse_another_save(first, self._facts[first], name, own)
            self._opened[name] = opened
        return self._opened[name]

    def _read(self, name: str) -> dict[str, Any]:
        self.check_all([name])
        file = self.folder / name
        options: dict[str, Any] = {"map_location": "cpu", "mmap": zipfile.is_zipfile(file)}
        if self._trusted:
            options["weights_only"] = False
        try:
            check_archive(file)
            # Not said otherwise, torch's environment variable can still trust the file.
            with safe_globals(saved_classes()):
                read: dict[str, Any] = torch.load(file, **options)
            if not self._trusted:
                check_loaded(read, file)
        except pickle.UnpicklingError as error:
            if found := _OTHER_CLASS.search(str(error)):
                raise ValueError(
                    f"the file {str(file)!r} of the checkpoint holds {printable(found[1])}, and "
                    "making objects of other classes than torch's and DeepSpeed's can run code; "
                    "set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 if you trust who wrote it"
                ) from None
            raise self._unreadable(file, str(error)) from error
        except Exception as error:  # whatever torch.load raises for bytes that it did not write
            raise self._unreadable(file, str(error)) from error
        if not isinstance(read, dict):
            raise self._unreadable(file, f"it holds {type(read).__name__}, expected a dictionary")
        return read

    def _refuse_another_save(self, first: str, theirs: _Facts, name: str, own: _Facts) -> None:
        """ValueError where the files of two ranks say other things of the run."""
        for what, value in theirs.items():
            if own.get(what, value) != value:
                differ = f"{what} is {value} in {first!r} and {own[what]} in {name!r}"
                raise ValueError(
                    f"the checkpoint {str(self.folder)!r} has files of different saves: "
                    f"{printable(differ)}, expected the same; put the files of one save into the "
                    "folder, or load another checkpoint"
                )

    def _unreadable(self, file: Path, why: str) -> ValueError:
        return ValueError(
            f"the file {str(file)!r} of the checkpoint cannot be read, it may have been cut off: "
            f"{printable(why)}; load another checkpoint"
        )


def _model_facts(states: Mapping[str, Any]) -> _Facts:
    """What a file with weights says that is the same in those of all ranks."""
    facts = {key: str(states[key]) for key in _OF_RUN if key in states}
    module = states["module"]
    facts["the number of weights and buffers"] = str(len(module))
    for name, value in module.items():
        if isinstance(value, Tensor):
            facts[f"the data type of {name}"] = str(value.dtype)
    return facts


def _optimizer_facts(states: Mapping[str, Any]) -> _Facts:
    """What a file with the optimizer says that is the same in those of all ranks."""
    saved = states["optimizer_state_dict"]
    facts = {key: str(saved[key]) for key in _OF_OPTIMIZER if key in saved}
    base = saved.get("base_optimizer_state", saved.get("optimizer_state_dict"))
    if isinstance(base, Mapping):  # it is a list with elastic_checkpoint
        for unit, state in base["state"].items():
            step = state.get("step") if isinstance(state, Mapping) else None
            if isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1):
                facts[f"the step of the optimizer's unit {unit}"] = str(float(step))
    return facts
