# SPDX-License-Identifier: Apache-2.0
"""Labels that go with the tokens of a model, and the loss in its output."""

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed_autotp.interop.labels import loss_of, with_labels
from tests.support.small_models import build

IDS = torch.arange(12).reshape(2, 6)
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 3,
}


def test_a_language_model_is_given_its_tokens_as_labels() -> None:
    found = with_labels(build("llama", tied=False), {"input_ids": IDS})
    assert found is not None and found["labels"] is IDS and found["input_ids"] is IDS


def test_labels_that_are_there_stay() -> None:
    own = {"input_ids": IDS, "labels": IDS + 1}
    assert with_labels(build("llama", tied=False), own) == own


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("BertForSequenceClassification", torch.tensor([0, 1])),
        ("BertForTokenClassification", IDS % 3),
        ("BertModel", None),
        ("BertForQuestionAnswering", None),
    ],
)
def test_a_classifier_is_given_classes_that_it_has(kind: str, expected: Any) -> None:
    import transformers

    model = vars(transformers).get(kind) or getattr(transformers, kind)
    found = with_labels(model(transformers.BertConfig(**SMALL)), {"input_ids": IDS})
    if expected is None:
        assert found is None
    else:
        assert found is not None and torch.equal(found["labels"], expected)


def test_a_model_of_ones_own_is_given_no_labels() -> None:
    assert with_labels(nn.Linear(2, 2), {"input": IDS}) is None


def test_a_loss_is_found_in_any_usual_form() -> None:
    loss = torch.tensor(1.0)
    pair = namedtuple("pair", "loss logits")
    for output in (
        loss,
        {"loss": loss, "logits": IDS},
        (loss, IDS),
        pair(loss, IDS),
        SimpleNamespace(loss=loss),
    ):
        assert loss_of(output) is loss
    for output in ({"logits": loss}, (torch.zeros(2), loss), [], None, torch.zeros(2), IDS.sum()):
        assert loss_of(output) is None
