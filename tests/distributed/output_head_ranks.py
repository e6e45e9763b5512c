# SPDX-License-Identifier: Apache-2.0
"""Models that are given labels in training."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from deepspeed_autotp.vocab_parallel.lazy_logits import LazyLogits
from tests.support import logit_forwards
from tests.support.engine_config import Setting, engine_config, initialize
from tests.support.log_records import logged_warnings
from tests.support.loss_curves import RATE, own_rows
from tests.support.model_snapshot import refusal
from tests.support.output_head_models import (
    VOCABULARY,
    batch,
    build,
    gradient_difference,
    section,
    shard,
    soft_cap,
)
from tests.support.recorded_collectives import recorded_collectives
from tests.support.recorded_soft_caps import recorded_soft_caps
from tests.support.small_models import tokens

# Bytes that the first call gathers: hashes of its batch and of the random state, and, in a loop of
# torch, one of every shard.
FIRST_BATCH = 32
HASH = 8


def _hidden_widths(model: nn.Module) -> set[int]:
    """Columns of the embeddings whose output is gathered."""
    plan = deepspeed_autotp.tensor_parallel(model).plan
    hidden = [plan.entries[layer.weight] for layer in plan.layers if layer.kind == "hidden"]
    return {max(entry.width(rank) for rank in range(plan.ranks)) for entry in hidden}


def against_one_process(family: str, tied: bool, more: Mapping[str, Any]) -> dict[str, Any]:
    """One step with labels in one process and over the ranks; ``more`` goes to the forward."""
    inputs: dict[str, Any] = {**batch(), **more}
    unsharded, model = build(family, tied=tied), shard(build(family, tied=tied), family)
    expected = unsharded(**inputs).loss
    expected.backward()
    with recorded_collectives() as calls, recorded_soft_caps() as found_caps:
        outputs = model(**inputs)
        outputs.loss.backward()
    count = inputs["labels"].numel()
    hidden = {width * count * 4 for width in _hidden_widths(model)}
    gathers = [size for name, size in calls if name == "all-gather" and size not in hidden]
    return {
        "loss": abs(float((outputs.loss - expected).detach())),
        "gradients": gradient_difference(model, unsharded),
        "kind": type(outputs.logits) is LazyLogits,
        "gathers": gathers[0] == FIRST_BATCH
        and gathers[1] % HASH == 0
        and gathers[2:] == [3 * count * 4],
        "caps": found_caps == [soft_cap(family)],
    }


def between_head_and_loss(name: str, self_check: Any) -> dict[str, Any]:
    """As above, with a model that does something with its logits before or beside the loss."""
    inputs = batch()
    unsharded, model = (logit_forwards.build(name, VOCABULARY) for _ in range(2))
    with logged_warnings() as warnings:
        shard(model, "llama", self_check=self_check)
    found: dict[str, Any] = {}
    for one in (unsharded, model):
        outputs = one(**inputs)
        loss, logits = outputs[:2] if isinstance(outputs, tuple) else (outputs.loss, outputs.logits)
        found["lazy"] = type(logits) is LazyLogits
        seen = logits.detach() + 0
        loss.backward()
        found.setdefault("before", (float(loss.detach()), seen))
    expected, expected_logits = found.pop("before")
    return {
        **found,
        "warnings": warnings,
        "loss": abs(float(loss.detach()) - expected),
        "gradients": gradient_difference(model, unsharded),
        "logits": torch.allclose(seen, expected_logits, atol=1e-5),
    }


def left_of_logits(family: str) -> int:
    """How many tensors of their shape are left after a step in which logits are read."""
    model = shard(build(family, tied=False), family)
    outputs = model(**batch())
    shape = outputs.logits.detach().shape
    outputs.loss.backward()
    del outputs
    gc.collect()
    tensors = (value for value in gc.get_objects() if issubclass(type(value), Tensor))
    return sum(tensor.shape == shape for tensor in tensors)


def function_of_logits(kind: str) -> str:
    """The error of a model that gives its logits to an autograd.Function, without a self-check."""
    model = shard(logit_forwards.build(kind, VOCABULARY), "llama", self_check=False)
    try:
        model(**batch())
    except RuntimeError as error:
        return str(error)
    return ""


def insisting(name: str, self_check: bool) -> str:
    """What is said where sharded logits are asked for, when sharding or in the first step."""
    model = logit_forwards.build(name, VOCABULARY)
    try:
        shard(model, "llama", vocab_parallel_lm_head=True, self_check=self_check)
        model(**batch())
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def positional() -> dict[str, Any]:
    """Labels as the model's fifth argument, and its outputs as a tuple."""
    inputs = batch()
    unsharded, model = build("llama", tied=False), shard(build("llama", tied=False), "llama")
    places = (inputs["input_ids"], None, None, None, None, inputs["labels"])
    expected = unsharded(*places, return_dict=False)
    loss, logits, *_ = model(*places, return_dict=False)
    return {
        "loss": abs(float(loss.detach() / expected[0].detach()) - 1) < 1e-6,
        "kind": type(logits) is LazyLogits,
        "logits": torch.allclose(logits.detach() + 0, expected[1].detach(), atol=1e-5),
    }


def full_logits(wanted: bool | None) -> dict[str, bool]:
    """Where logits are plain tensors: evaluation, no labels, after a failure, switched off."""
    model = shard(build("llama", tied=True), "llama", vocab_parallel_lm_head=wanted)
    inputs = batch()
    failed = False
    try:
        model(**(inputs | {"labels": torch.full_like(inputs["labels"], VOCABULARY)}))
    except (ValueError, IndexError):
        failed = True
    after = model(input_ids=inputs["input_ids"]).logits
    kept = type(model(**inputs).logits) is LazyLogits
    model.eval()
    return {
        "failed": failed,
        "without labels": type(after) is Tensor and after.shape[-1] == VOCABULARY,
        "evaluation": type(model(**inputs).logits) is Tensor,
        "training": kept is (wanted is not False),
    }


def extra_term() -> tuple[float, float, bool]:
    """Accuracy and a second loss term from outputs.logits, as trainers form them."""
    inputs = batch()
    unsharded, model = build("gemma2", tied=True), shard(build("gemma2", tied=True), "gemma2")
    losses, accuracies = [], []
    for one in (unsharded, model):
        outputs = one(**inputs)
        with torch.no_grad():
            found = outputs.logits[..., :-1, :].argmax(dim=-1)
            accuracies.append(found == inputs["labels"][..., 1:])
        loss = outputs.loss + 0.01 * outputs.logits.float().logsumexp(-1).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
    same = torch.equal(*accuracies)
    return abs(losses[1] / losses[0] - 1), gradient_difference(model, unsharded), same


def generated() -> bool:
    """Greedy tokens after a training step, from the unsharded model and over the ranks."""
    inputs = batch()
    unsharded, model = build("llama", tied=False), shard(build("llama", tied=False), "llama")
    texts = []
    for one in (unsharded, model):
        one(**inputs).loss.backward()
        with torch.no_grad():
            for parameter in one.parameters():
                if parameter.grad is not None:
                    parameter -= 0.5 * parameter.grad
        one.eval()
        ids = inputs["input_ids"][:, :4]
        texts.append(one.generate(ids, max_new_tokens=6, do_sample=False))
    return torch.equal(*texts)


def watched() -> dict[str, bool]:
    """What a user's hooks on the output head see; one is older than the sharding."""
    unsharded, model = build("llama", tied=False), build("llama", tied=False)
    seen: dict[nn.Module, list[Tensor]] = {unsharded: [], model: []}
    for one in (unsharded, model):
        one.lm_head.register_forward_hook(lambda m, a, y, one=one: seen[one].append(y.detach()))
    shard(model, "llama")
    seen[model].clear()  # the self-check has run
    for one in (unsharded, model):
        one.lm_head.register_full_backward_hook(
            lambda m, given, dy, one=one: seen[one].append(dy[0].detach() + 0)
        )
        outputs = one(**batch())
        seen[one][0] = seen[one][0] + 0
        outputs.loss.backward()
    (y, dy), (expected_y, expected_dy) = seen[model], seen[unsharded]
    return {
        "output": y.shape == expected_y.shape and torch.allclose(y, expected_y, atol=1e-5),
        "gradient": dy.shape == expected_dy.shape and torch.allclose(dy, expected_dy, atol=1e-6),
        "gradients": gradient_difference(model, unsharded) < 1e-5,
    }


def checkpointed(reentrant: bool) -> tuple[float, float]:
    """A step with activation checkpointing."""
    unsharded, model = build("llama", tied=False), shard(build("llama", tied=False), "llama")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected, loss = unsharded(**batch()).loss, model(**batch()).loss
    expected.backward()
    loss.backward()
    return abs(float(loss.detach() / expected.detach()) - 1), gradient_difference(model, unsharded)


def autocast() -> dict[str, Any]:
    """bfloat16 autocast of a float32 model."""
    unsharded, model = build("llama", tied=False), shard(build("llama", tied=False), "llama")
    with torch.autocast("cpu", torch.bfloat16):
        expected, outputs = unsharded(**batch()), model(**batch())
    outputs.loss.backward()
    return {
        "loss": abs(float((outputs.loss / expected.loss).detach()) - 1) < 1e-2,
        "dtypes": outputs.loss.dtype == expected.loss.dtype
        and outputs.logits.dtype == expected.logits.dtype,
    }


def compiled() -> tuple[float, float, bool]:
    """A step of a compiled model, which has full logits."""
    torch._dynamo.reset()
    unsharded, model = (build("llama", tied=False, num_hidden_layers=1) for _ in range(2))
    shard(model, "llama")
    expected = unsharded(**batch()).loss
    expected.backward()
    outputs = torch.compile(model, backend="eager")(**batch())
    outputs.loss.backward()
    plain = type(outputs.logits) is Tensor and outputs.logits.shape[-1] == VOCABULARY
    return (
        abs(float((outputs.loss - expected).detach())),
        gradient_difference(model, unsharded),
        plain,
    )


@contextmanager
def _gathers(group: Any) -> Iterator[list[int]]:
    """Elements of every all-gather over ``group``."""
    sizes: list[int] = []
    gather = group.all_gather

    def all_gather(x: Tensor, shapes: Any) -> Any:
        sizes.append(x.numel())
        return gather(x, shapes)

    group.all_gather = all_gather
    try:
        yield sizes
    finally:
        del group.all_gather


def through_engine(zero: int, family: str) -> dict[str, Any]:
    """Three steps through DeepSpeed with TP 2; losses, and what was gathered over the group."""
    expected = []
    unsharded = build(family, tied=True)
    optimizer = torch.optim.SGD(unsharded.parameters(), lr=RATE)
    for step in range(3):
        ids = tokens(step, vocabulary=VOCABULARY)
        loss = unsharded(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    model = build(family, tied=True)
    engine, *_ = deepspeed_autotp.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config=engine_config(Setting(tp=2, zero=zero, clip=0.0)),
    )
    worst, rows = 0.0, 0
    with (
        _gathers(deepspeed_autotp.tensor_parallel(engine).group) as sizes,
        recorded_soft_caps() as found,
    ):
        for step in range(3):
            ids = own_rows(tokens(step, vocabulary=VOCABULARY), tp=2)
            rows = ids.numel()
            outputs = engine(input_ids=ids, labels=ids)
            engine.backward(outputs.loss)
            engine.step()
            total = outputs.loss.detach().clone()
            dist.all_reduce(total)
            mean = float(total) / dist.get_world_size()
            worst = max(worst, abs(mean / expected[step] - 1))
    kind = type(outputs.logits) is LazyLogits
    engine.destroy()
    return {
        "worst": worst,
        "gathers": sizes == [FIRST_BATCH, *[3 * rows] * 3],
        "kind": kind,
        "caps": found,
    }


def extra_term_in_engine(zero: int) -> dict[str, float]:
    """A loss that is formed from outputs.logits alone, through DeepSpeed; the worst loss."""
    unsharded, model = build("llama", tied=False), build("llama", tied=False)
    plain = torch.optim.SGD(unsharded.parameters(), lr=RATE)
    engine, *_ = deepspeed_autotp.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config=engine_config(Setting(tp=2, zero=zero, clip=0.0)),
    )
    worst = 0.0
    for step in range(3):
        ids = tokens(step, vocabulary=VOCABULARY)
        outputs = unsharded(input_ids=ids, labels=ids)
        expected = outputs.loss + outputs.logits.logsumexp(-1).square().mean() * 0.01
        expected.backward()
        plain.step()
        plain.zero_grad()
        outputs = engine(input_ids=ids, labels=ids)
        loss = outputs.loss + outputs.logits.logsumexp(-1).square().mean() * 0.01
        engine.backward(loss)
        engine.step()
        worst = max(worst, abs(float((loss / expected).detach()) - 1))
    engine.destroy()
    return {"worst": worst}


class Headless(nn.Module):
    """A model without a configuration, which nobody can ask for its output head."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return F.mse_loss(self.down(torch.relu(self.up(x))), x)


_PAIR: dict[str, Any] = {
    "layer_specs": [
        {"patterns": [r"up\.weight"], "partition_type": "column"},
        {"patterns": [r"down\.weight"], "partition_type": "row"},
    ]
}
_NO_HEAD: dict[str, Any] = {
    "layer_specs": [
        {"patterns": [r".*\.(gate|up)_proj\.weight"], "partition_type": "column"},
        {"patterns": [r".*\.down_proj\.weight"], "partition_type": "row"},
    ],
    "use_default_specs": False,
}


def refused() -> list[str]:
    """vocab_parallel_lm_head: true where there is no head that could do it."""
    headless, llama = Headless(), build("llama", tied=False)
    insisting = {"autotp_size": 2, "vocab_parallel_lm_head": True}
    bert = build("bert", tied=False)
    return [
        refusal(bert, lambda: initialize(bert, insisting | section("bert"))),
        refusal(headless, lambda: initialize(headless, insisting | {"partition_config": _PAIR})),
        refusal(llama, lambda: initialize(llama, insisting | {"partition_config": _NO_HEAD})),
    ]


def quiet() -> bool:
    """The same models without insisting."""
    headless, llama = Headless(), build("llama", tied=False)
    deepspeed_autotp.parallelize(
        headless, tp_size=2, config={"partition_config": _PAIR, "self_check": False}
    )
    deepspeed_autotp.parallelize(llama, tp_size=2, config={"partition_config": _NO_HEAD})
    return type(llama(**batch()).logits) is Tensor
