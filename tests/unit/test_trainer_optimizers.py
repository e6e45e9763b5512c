# SPDX-License-Identifier: Apache-2.0
"""The table of options has every name that ``optim`` of the Trainer takes."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed_autotp.interop.optimizers import refuse_optimizer_over_tensors
from tests.support.optimizer_options import OPTIMIZERS
from tests.support.options import REFUSED, WORKS
from tests.support.trainer_optimizers import (
    CLASSES_ELSEWHERE,
    OPTIMIZERS_OF_THE_TRAINER,
    names_of,
)

OUTCOMES = {name: option for option in OPTIMIZERS_OF_THE_TRAINER for name in names_of(option)}
WORKING = {
    re.split(r"\W", option.name.removeprefix("`torch.optim."))[0]
    for option in OPTIMIZERS
    if option.outcome == WORKS and option.name.startswith("`torch.optim.")
}


def built(name: str, out: Path) -> tuple[type[Any], dict[str, Any]]:
    """Class and options of the optimizer that the Trainer makes."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(str(out), optim=name, use_cpu=True)
    return Trainer.get_optimizer_cls_and_kwargs(arguments, nn.Linear(2, 2))


def test_every_name_is_in_the_table_once() -> None:
    from transformers.training_args import OptimizerNames

    names = [name for option in OPTIMIZERS_OF_THE_TRAINER for name in names_of(option)]
    assert sorted(names) == sorted(each.value for each in OptimizerNames)


@pytest.mark.parametrize("name", [n for n, option in OUTCOMES.items() if option.outcome == WORKS])
def test_a_name_that_works_is_a_class_that_was_trained(name: str, tmp_path: Path) -> None:
    cls, _ = built(name, tmp_path)
    assert cls is vars(torch.optim)[cls.__name__]
    assert cls.__name__ in WORKING


@pytest.mark.parametrize("name", CLASSES_ELSEWHERE)
def test_a_name_that_is_refused_is_a_class_that_is_refused(name: str) -> None:
    assert OUTCOMES[name].outcome == REFUSED
    with pytest.raises(ValueError, match=OUTCOMES[name].words):
        refuse_optimizer_over_tensors(CLASSES_ELSEWHERE[name], before="initialize: optimizer")


def test_the_others_that_are_refused_are_those_of_torch_and_transformers(tmp_path: Path) -> None:
    refused = {n for n, option in OUTCOMES.items() if option.outcome == REFUSED}
    assert refused - CLASSES_ELSEWHERE.keys() == {"adafactor", "adagrad"}
    cls, options = built("adafactor", tmp_path)
    with pytest.raises(ValueError, match=OUTCOMES["adafactor"].words):
        refuse_optimizer_over_tensors(
            cls([nn.Parameter(torch.ones(2, 2))], **options), before="initialize: optimizer"
        )
    cls, options = built("adagrad", tmp_path)
    weight = nn.Parameter(torch.ones(2, 2))
    assert cls([weight], **options).state[weight]
