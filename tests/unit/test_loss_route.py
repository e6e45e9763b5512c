# SPDX-License-Identifier: Apache-2.0
"""Which forwards are known to do nothing with their logits that needs all of them."""

import types
from typing import Any

import pytest

from deepspeed_autotp.interop.loss_route import LossRoute, has_user_hooks, loss_route
from tests.support import logit_forwards
from tests.support.output_head_models import build


def route(model: Any) -> LossRoute | None:
    return loss_route(model, model.get_output_embeddings())


@pytest.mark.parametrize(
    ("family", "soft_cap"),
    [
        ("llama", ""),
        ("gemma2", "self.config.final_logit_softcapping"),
        ("cohere", ""),
        ("granite", ""),
    ],
)
def test_forwards_of_transformers_are_known(family: str, soft_cap: str) -> None:
    found = route(build(family, tied=False))
    assert found is not None
    assert (found.shifts, found.soft_cap, found.ends_in_tanh) == (True, soft_cap, False)


def test_a_masked_language_model_with_a_loss_of_its_own_is_not() -> None:
    assert route(build("bert", tied=False)) is None


@pytest.mark.parametrize(
    ("name", "soft_cap", "flags"),
    [
        ("Plain", "", ()),
        ("Scaled", "", ("ends_in_tanh",)),
        ("Upcast", "", ("upcasts",)),
        ("UpcastAtTimes", "", ()),
        ("UpcastInCap", "self.number", ("cap_upcasts",)),
        ("CappedThenScaled", "", ()),
    ],
)
def test_steps_by_numbers_are_known(name: str, soft_cap: str, flags: tuple[str, ...]) -> None:
    found = route(logit_forwards.build(name, 16))
    assert found is not None and found.soft_cap == soft_cap
    known = ("ends_in_tanh", "upcasts", "cap_upcasts")
    assert tuple(flag for flag in known if getattr(found, flag)) == flags


@pytest.mark.parametrize("kind", logit_forwards.GATHERED)
def test_what_may_need_all_logits_has_no_route(kind: type) -> None:
    assert route(logit_forwards.build(kind.__name__, 16)) is None


def test_a_forward_or_loss_that_was_replaced_has_no_route() -> None:
    model = build("llama", tied=False)
    model.forward = types.MethodType(type(model).forward, model)  # type: ignore[method-assign]
    assert route(model) is None
    model = build("llama", tied=False)
    model.loss_function = lambda logits, labels, vocab_size: logits.mean()  # type: ignore[assignment]
    assert route(model) is None


def test_a_soft_cap_is_left_out_and_put_back() -> None:
    model: Any = build("gemma2", tied=False)
    found = route(model)
    assert found is not None
    for _ in range(2):
        with pytest.raises(KeyError), found.without_soft_cap() as cap:
            assert cap == 2.0 and model.config.final_logit_softcapping is None
            raise KeyError
        assert model.config.final_logit_softcapping == 2.0
    model.config.final_logit_softcapping = None
    with found.without_soft_cap() as cap:
        assert cap == 0.0


def test_hooks_of_deepspeed_are_no_users() -> None:
    head = build("llama", tied=False).get_output_embeddings()  # type: ignore[operator]
    hook = types.FunctionType((lambda *args: None).__code__, {})
    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    head.register_forward_hook(hook)
    assert not has_user_hooks(head)
    head.register_full_backward_hook(lambda *args: None)
    assert has_user_hooks(head)
