# SPDX-License-Identifier: Apache-2.0
"""What says that a model drops in training, and what does not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed_autotp.distributed.dropout_rng import DropoutRNG
from deepspeed_autotp.interop.dropout import declares_dropout


class Holder(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        vars(self).update(attributes)


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.1),
        nn.AlphaDropout(0.1),
        nn.RReLU(),
        nn.MultiheadAttention(4, 2, dropout=0.1),
        Holder(attention_dropout=0.1),
        Holder(config=SimpleNamespace(attn_pdrop=0.1)),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_with_a_dropout_probability_declares_it(module: nn.Module) -> None:
    assert declares_dropout(nn.Sequential(nn.Linear(1, 1), module))


@pytest.mark.parametrize(
    "module",
    [
        nn.Dropout(0.0),
        nn.MultiheadAttention(4, 2),
        Holder(attention_dropout=0.0, dropout=None, drop_last=True, p=0.1),
        Holder(config=SimpleNamespace(attn_pdrop=0, classifier_dropout=None)),
        Holder(config={"dropout": 0.1}),
    ],
    ids=lambda module: type(module).__name__,
)
def test_other_modules_declare_none(module: nn.Module) -> None:
    assert not declares_dropout(nn.Sequential(nn.Linear(1, 1), module))


@pytest.mark.parametrize("declared", [True, False])
def test_a_captured_graph_of_a_model_with_dropout_is_refused(
    monkeypatch: pytest.MonkeyPatch, declared: bool
) -> None:
    """Where nothing drops the RNG state is left alone."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    rng = DropoutRNG(0, declared=declared, uneven=True)

    def run() -> bool:
        rng.enter(torch.device("cuda", 0))
        return True

    if declared:
        with pytest.raises(RuntimeError, match="while a CUDA graph is captured.*set the dropout"):
            rng.run_block(run, (), {})
    else:
        assert rng.run_block(run, (), {})
