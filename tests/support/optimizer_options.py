# SPDX-License-Identifier: Apache-2.0
"""Optimizers, as rows of the table of options."""

from typing import Any

from tests.support.options import EVERYWHERE, LOOP, NOT_OURS, NOT_TRIED, REFUSED, Option


def _optimizer(kind: str) -> Option:
    name, *options = kind.split()
    shown = ", ".join([f"`torch.optim.{name}`", *(f"`{option}`" for option in options)])
    return Option(shown, optimizer=kind, stages=EVERYWHERE)


def _refused_optimizer(name: str, kind: str, formed: str) -> Option:
    return Option(name, REFUSED, optimizer=kind, stages=EVERYWHERE, words=formed)


def _refused_type(name: str, formed: str) -> Option:
    return Option(
        f"`optimizer.type: {name}`",
        REFUSED,
        {"optimizer": {"type": name, "params": {"lr": 1e-2}}},
        optimizer="config",
        words=f"optimizer.type: got {name}, which forms {formed}",
    )


def _type(name: str, **params: Any) -> Option:
    params = {"lr": 1e-2, **params}
    config = {"optimizer": {"type": name, "params": params}}
    more = "".join(f", `{key}`" for key in params if key != "lr")
    return Option(f"`optimizer.type: {name}`{more}", config=config, optimizer="config")


OPTIMIZERS = (
    Option("`torch.optim.SGD` with momentum", optimizer="SGD+momentum", stages=EVERYWHERE),
    _optimizer("AdamW"),
    _optimizer("AdamW fused"),
    _optimizer("AdamW foreach"),
    _optimizer("Adam amsgrad"),
    *(
        _optimizer(name)
        for name in ("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop")
    ),
    Option("`torch.optim.Adagrad`", optimizer="Adagrad", stages=(LOOP,)),
    Option(
        "`torch.optim.Adagrad`, a function that builds it",
        optimizer="Adagrad later",
        stages=(0, 1),
    ),
    Option(
        "`torch.optim.Adagrad`, built before `initialize`",
        REFUSED,
        optimizer="Adagrad",
        stages=(0, 1),
        words="the optimizer holds state of the full weights already",
        note="it makes its state when it is built",
    ),
    _type("AdamW", torch_adam=True),
    _type("Adagrad"),
    _type("SGD"),
    Option(
        "`optimizer.type: Adam`, `AdamW` (DeepSpeed's FusedAdam)",
        tested="integration/test_initialize_arguments.py",
    ),
    Option(
        "`optimizer.type: Lion`",
        NOT_TRIED,
        note="its kernels, which work element by element, need a GPU",
    ),
    Option(
        "`optimizer.type: MuAdam`, `MuAdamW`, `MuSGD`",
        NOT_TRIED,
        note="of the package mup, which sets rates from shapes before; they step element by "
        "element",
    ),
    Option(
        "an optimizer of your own, element by element",
        optimizer="Lion",
        stages=EVERYWHERE,
        note="tried on a small tensor and on its parts, which are updated alike; where it cannot "
        "be tried, as with tensors or modules among its attributes, a warning says so",
        fast=True,
    ),
    Option(
        "an optimizer of your own, with a number over a tensor (as LARS)",
        REFUSED,
        optimizer="Trusting",
        stages=EVERYWHERE,
        words="got Trusting, which updates a shard otherwise than the full tensor",
        note="found by trying it, whatever its name",
        fast=True,
    ),
    Option(
        "an optimizer of your own, with products of a matrix (as Shampoo)",
        REFUSED,
        optimizer="Preconditioned",
        stages=EVERYWHERE,
        words="got Preconditioned, which updates a shard otherwise than the full tensor",
        note="found by trying it; what begins only after many steps is not found",
    ),
    _refused_optimizer("`torch.optim.Muon`", "Muon", "got Muon, which forms an orthogonal matrix"),
    _refused_optimizer("`torch.optim.Adafactor`", "Adafactor", "got Adafactor, which forms"),
    _refused_optimizer(
        "`transformers.Adafactor`", "transformers.Adafactor", "got Adafactor, which forms"
    ),
    _refused_optimizer("`torch.optim.LBFGS`", "LBFGS", "got LBFGS, which forms one step size"),
    Option(
        "`torch.optim.SparseAdam`",
        NOT_OURS,
        note="takes sparse gradients alone; a rule that shards a sparse embedding is refused",
    ),
    *(
        _refused_type(name, formed)
        for name, formed in (
            ("Muon", "an orthogonal matrix"),
            ("Lamb", "a ratio of the norms"),
            ("OneBitAdam", "the mean size of a tensor"),
            ("OneBitLamb", "the mean size of a tensor"),
            ("ZeroOneAdam", "the mean size of a tensor"),
        )
    ),
)
