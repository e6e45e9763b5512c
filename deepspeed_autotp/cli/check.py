# SPDX-License-Identifier: Apache-2.0
"""``autotp check``: a model trained sharded and in one process, and compared module by module."""

from __future__ import annotations

import argparse
import json
import logging
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from deepspeed_autotp._core import index_pattern
from deepspeed_autotp.cli.arguments import DONE, WRONG
from deepspeed_autotp.cli.check_ranks import Found, check_rank
from deepspeed_autotp.config.dtypes import parse_dtype
from deepspeed_autotp.config.load_config import load_ds_config, refuse_expert_parallel
from deepspeed_autotp.config.training_config import TPTrainingConfig, get_tensor_parallel_config
from deepspeed_autotp.distributed.local_processes import RankError, preload, run_on_ranks
from deepspeed_autotp.interop.named_model import named_inputs, named_model
from deepspeed_autotp.interop.progress_bars import progress_bar, without_warnings
from deepspeed_autotp.planning.model_description import describe
from deepspeed_autotp.self_check.precision import is_16_bit
from deepspeed_autotp.self_check.subject import NoPlan, Subject, find_subject
from deepspeed_autotp.self_check.training import train
from deepspeed_autotp.self_check.training_comparison import FullTraining, Measured

_log = logging.getLogger("deepspeed_autotp")

_OF_MODULES = ("output", "gradient", "weights")
# What a rank imports in any case.
_PRELOADED = ("torch", "deepspeed_autotp.cli.check_ranks", "transformers")


def run(asked: argparse.Namespace, console: Console) -> int:
    """Run the command; the exit status. ValueError and OSError say what is wrong."""
    _refuse_numbers(asked)
    dtype = parse_dtype(asked.dtype, "--dtype")
    settings = _settings(asked)
    named = named_model(asked.model)
    given = None if asked.inputs is None else named_inputs(asked.inputs)
    preload(_PRELOADED)
    with without_warnings():
        try:
            subject, model = find_subject(
                asked.model, named, settings, ranks=asked.tp, dtype=dtype, given=given
            )
            report = _checked(asked, subject, model)
        except NoPlan as error:
            report = Report(asked.model, asked.tp, "", False, 0, str(error))
    if asked.json:
        print(json.dumps(report.content(), indent=2))
    else:
        report.show(console)
    return WRONG if report.problem else DONE


def _refuse_numbers(asked: argparse.Namespace) -> None:
    for flag, value, least in (("--tp", asked.tp, 2), ("--steps", asked.steps, 1)):
        if value < least:
            raise ValueError(f"{flag}: got {value}, expected {least} or more")
    if not 0 < asked.timeout < math.inf:
        raise ValueError(f"--timeout: got {asked.timeout}, expected seconds, such as 600")


def _settings(asked: argparse.Namespace) -> TPTrainingConfig:
    config = {} if asked.config is None else load_ds_config(asked.config)
    refuse_expert_parallel(config, called="autotp check")
    given = get_tensor_parallel_config(config)
    # Without defaults: some count only where they are written.
    written = {key: value for key, value in given if key in given.model_fields_set}
    return TPTrainingConfig(**(written | {"autotp_size": asked.tp}))


@dataclass(frozen=True, slots=True)
class Report:
    """What was found; ``problem`` is None where all is equal. There is only that where the model
    cannot be sharded at all."""

    model: str
    tp_size: int
    name: str
    is_twin: bool
    steps: int
    problem: str | None
    measured: Sequence[Measured] = ()
    losses: Sequence[float] = ()
    full_losses: Sequence[float] = ()
    warnings: Sequence[str] = ()

    def content(self) -> dict[str, Any]:
        """As JSON."""
        wrong = [each for each in self.measured if each.is_wrong]
        return {
            "model": self.model,
            "class": self.name,
            "tp_size": self.tp_size,
            "trained": "a small model of the same class" if self.is_twin else "the model itself",
            "equal": self.problem is None,
            "problem": self.problem,
            "first_module": wrong[0].module if wrong else None,
            "steps": [
                {"loss": own, "loss_of_one_process": full}
                for own, full in zip(self.losses, self.full_losses, strict=False)
            ],
            "modules": [_row_content(pattern, row) for pattern, row in self._rows().items()],
            "warnings": list(self.warnings),
        }

    def show(self, console: Console) -> None:
        """For people."""
        if self.measured:
            console.print(self._table())
        for warning in self.warnings:
            console.print(f"[yellow]warning[/]: {escape(warning)}")
        console.print(escape(self._closing()), soft_wrap=True)

    def _closing(self) -> str:
        what = f"{self.name or self.model} at TP size {self.tp_size}"
        if self.problem is not None:
            return f"{what}: WRONG: {self.problem}"
        kind = "a small model of its class" if self.is_twin else "the model itself"
        largest = max((each.error for each in self.measured), default=0.0)
        return (
            f"{what}: equal to one process over {self.steps} steps of {kind}, loss "
            f"{self.losses[0]:.4f} to {self.losses[-1]:.4f}, largest relative difference "
            f"{largest:.1e}"
        )

    def _table(self) -> Table:
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), title="Largest relative differences")
        table.add_column("module", overflow="fold")
        for what in _OF_MODULES:
            table.add_column(what, justify="right", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        for pattern, row in self._rows().items():
            cells = [_cell(row.get(what)) for what in _OF_MODULES]
            table.add_row(escape(pattern or "(the model)"), *cells, _verdict(row.values()))
        for what in ("loss", "gradient norm"):
            of_steps = [each for each in self.measured if each.what == what]
            worst = max(of_steps, key=lambda each: each.error / each.allowed, default=None)
            if worst is not None:
                table.add_row(f"{what} of each step", _cell(worst), "", "", _verdict(of_steps))
        return table

    def _rows(self) -> dict[str, dict[str, Measured]]:
        """By the pattern of the module's name: the worst of each kind."""
        rows: dict[str, dict[str, Measured]] = {}
        for each in self.measured:
            if each.what in _OF_MODULES:
                row = rows.setdefault(index_pattern(each.module), {})
                before = row.get(each.what)
                if before is None or each.error / each.allowed > before.error / before.allowed:
                    row[each.what] = each
        return rows


def _cell(each: Measured | None) -> str:
    if each is None:
        return ""
    text = "shape" if math.isinf(each.error) else f"{each.error:.1e}"
    return f"[bold red]{text}[/]" if each.is_wrong else text


def _verdict(of: Iterable[Measured]) -> str:
    return "[bold red]differs[/]" if any(each.is_wrong for each in of) else "[green]equal[/]"


def _row_content(pattern: str, row: Mapping[str, Measured]) -> dict[str, Any]:
    values = {what: each.error for what, each in row.items()}
    finite = {what: error if math.isfinite(error) else None for what, error in values.items()}
    return {"pattern": pattern, "equal": not any(r.is_wrong for r in row.values()), **finite}


def _checked(asked: argparse.Namespace, subject: Subject, model: nn.Module) -> Report:
    with (
        tempfile.TemporaryDirectory(prefix="autotp-check-") as folder,
        progress_bar(2 * asked.steps, "check", "step") as done,
    ):
        torch.save(subject, Path(folder, "subject"))
        full = _full_training(subject, model, asked.steps, done)
        torch.save(full, Path(folder, "full"))
        found: list[Found] = []
        problem = None
        try:
            found = run_on_ranks(
                check_rank,
                folder,
                subject.settings,
                asked.steps,
                ranks=asked.tp,
                timeout=asked.timeout,
                told=done,
            )
        except RankError as error:
            problem = str(error)
            _log.debug("%s", error.details)
    measured = [each for rank in found for each in rank.measured]
    return Report(
        model=asked.model,
        tp_size=asked.tp,
        name=type(model).__name__,
        is_twin=subject.is_twin,
        steps=asked.steps,
        problem=problem or next(_problems(found, measured), None),
        measured=measured,
        losses=found[0].losses if found else [],
        full_losses=[float(each) for each in full.training.losses],
        warnings=found[0].warnings if found else [],
    )


def _full_training(subject: Subject, model: nn.Module, steps: int, done: Any) -> FullTraining:
    """ValueError where the model does not train in one process."""
    description = describe(model)
    try:
        training = train(description, subject.inputs, steps=steps, done=done)
    except Exception as error:  # whatever a user's model raises
        raise ValueError(
            f"MODEL: {type(model).__name__} does not train in one process: "
            f"{type(error).__name__}: {error}; give inputs that it takes with --inputs"
        ) from error
    if not all(bool(loss.isfinite()) for loss in training.losses):
        losses = ", ".join(f"{float(loss):g}" for loss in training.losses)
        raise ValueError(
            f"MODEL: {type(model).__name__} does not train in one process: its losses are {losses},"
            " expected finite ones; give other inputs with --inputs, or fewer --steps"
        )
    rounded = None
    if is_16_bit(description.parameters):
        again = subject.made()
        rounded = train(describe(again), subject.inputs, steps=steps, otherwise=True)
    return FullTraining(training, subject.values, rounded)


def _problems(found: Sequence[Found], measured: Sequence[Measured]) -> Iterator[str]:
    """What is wrong, the first first."""
    yield from (rank.problem for rank in found if rank.problem)
    yield from (str(each) for each in measured if each.is_wrong)
