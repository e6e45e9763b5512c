# SPDX-License-Identifier: Apache-2.0
"""Which models give their logits to a loss function that can be replaced."""

import types
from typing import Any

import pytest

from deepspeed_autotp.interop.loss_function import shifts_labels
from deepspeed_autotp.interop.torch_private import has_user_hooks
from tests.support import logit_forwards
from tests.support.output_head_models import build


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
def test_causal_models_of_transformers_do(family: str) -> None:
    assert shifts_labels(build(family, tied=False)) is True


def test_a_masked_language_model_with_a_loss_of_its_own_does_not() -> None:
    assert shifts_labels(build("bert", tied=False)) is None
    assert shifts_labels(logit_forwards.build("Own", 16)) is None


def test_a_forward_or_loss_that_was_replaced_does_not() -> None:
    model: Any = build("llama", tied=False)
    model.forward = types.MethodType(type(model).forward, model)
    assert shifts_labels(model) is None
    model = build("llama", tied=False)
    model.loss_function = lambda logits, labels, vocab_size: logits.mean()
    assert shifts_labels(model) is None


def test_hooks_of_deepspeed_are_no_users() -> None:
    head = build("llama", tied=False).get_output_embeddings()  # type: ignore[operator]
    hook = types.FunctionType((lambda *args: None).__code__, {})
    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    head.register_forward_hook(hook)
    assert not has_user_hooks(head)
    head.register_full_backward_hook(lambda *args: None)
    assert has_user_hooks(head)
