# SPDX-License-Identifier: Apache-2.0
"""Three steps of a model in one process, and of the same model sharded; what both have."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.prove.case import NAMES, NETWORK_NAMES, Case
from tests.support.prove.families import make_family
from tests.support.prove.model import CLASSES, make_language
from tests.support.prove.norms import Dropout

STEPS = 3
CLIP = 0.3
LORA = 2  # rank

OUTPUTS = {names[3] for names in NAMES.values()} | {n[2] for n in NETWORK_NAMES.values()}

Gradients = dict[str, Tensor]


@dataclass
class Curve:
    """Losses and norms of all steps, gradients of the first and of the last, weights at the end,
    and the loss in evaluation."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[Gradients] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    evaluated: float = 0.0
    replicas: str = "all equal"


def make(case: Case, dtype: torch.dtype) -> nn.Module:
    """The model of a case; every parameter and the numbers of buffers are drawn by its seed."""
    torch.manual_seed(case.seed)
    model = make_family(case) if case.family else make_language(case)
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad(), torch.device("cpu"):
        draw = torch.Generator().manual_seed(case.seed)
        for parameter in () if is_meta else model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        if not is_meta:
            make_tiny(case, model)
    model = model.to(dtype)
    if case.frozen:
        for number, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(number % 3 != case.frozen - 1)
    return model.train()


def make_tiny(case: Case, model: nn.Module) -> None:
    """Scale some parameters down, as those that start at zero are at first."""
    for name, parameter in model.named_parameters():
        path = name.split(".")
        is_scale = parameter.numel() == 1 or "residual" in name
        first_index = next((part for part in path if part.isdigit()), "")
        is_output = path[-1] == "weight" and path[-2] in OUTPUTS
        is_matrix_of_first = first_index == "0" and parameter.dim() > 1
        chosen = {"outputs": is_output, "scales": is_scale, "one layer": is_matrix_of_first}
        if chosen.get(case.tiny, False):
            parameter *= 1e-4


def add_lora(case: Case, model: nn.Module, names: list[str]) -> nn.Module:
    """Adapters on the linear layers with these names."""
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(r=LORA, target_modules=names, init_lora_weights=False)
    torch.manual_seed(case.seed + 7)
    adapted: nn.Module = get_peft_model(model, options)
    return adapted


def lora_targets(case: Case, model: nn.Module) -> list[str]:
    """Names of some linear layers of an unsharded model."""
    draw = torch.Generator().manual_seed(case.seed)
    leaves = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if is_linear(m)})
    leaves = [name for name in leaves if not name.isdigit()]
    return [n for n in leaves if torch.rand((), generator=draw) < 0.7] or leaves[:1]


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def batch(case: Case, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and what follows them."""
    draw = torch.Generator().manual_seed(1000 * case.seed + step)
    length = case.length - 2 if case.lengths and step == 1 else case.length
    ids = torch.randint(case.vocabulary, (case.rows, length + 1), generator=draw)
    ids, targets = ids[:, :-1], ids[:, 1:].clone()
    if case.ignored:  # equally many in each row, so that means over rows are those of the batch
        targets[:, :2] = -100
    return ids, targets


def loss_of(case: Case, model: Callable[..., Any], ids: Tensor, targets: Tensor) -> Tensor:
    """Of one forward, or of two."""
    loss = one_loss(case, model, ids, targets)
    if case.twice:
        loss = loss + 0.5 * one_loss(case, model, ids.flip(1), targets)
    return loss


def one_loss(case: Case, model: Callable[..., Any], ids: Tensor, targets: Tensor) -> Tensor:
    if case.family:
        return family_loss(case, model, ids, targets)
    if case.signature == "loss":
        return model(ids, targets)
    if case.signature == "labels":
        return model(input_ids=ids, labels=targets)["loss"]
    logits = model(ids)
    if case.outputs == "classes":
        return F.cross_entropy(logits[:, -1], targets[:, -1] % CLASSES)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss + (0.1 * logits.logsumexp(-1).square().mean() if case.outputs == "z-loss" else 0.0)


def family_loss(case: Case, model: Callable[..., Any], ids: Tensor, targets: Tensor) -> Tensor:
    """Formed by the loop, or by transformers, which casts logits to float32."""
    if case.signature == "loss":
        logits = model(input_ids=ids).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    labels = torch.where(targets < 0, targets, ids)  # shifted by transformers
    outputs = model(input_ids=ids, labels=labels)
    if case.outputs == "z-loss":
        return outputs.loss + 0.1 * outputs.logits.logsumexp(-1).square().mean()
    return outputs.loss


def casting(case: Case) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if case.autocast else nullcontext()


def make_optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad or case.between == "thaw"]
    if case.optimizer == "adamw":
        # A small gradient in a sum of large ones is rounded; by eps it is not scaled up.
        return torch.optim.AdamW(trained, lr=0.01, eps=1e-3, weight_decay=0.1)
    return torch.optim.SGD(trained, lr=0.02, momentum=0.9, weight_decay=0.01)


def chunks(case: Case, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    ids, targets = batch(case, step)
    return zip(ids.chunk(case.accumulate), targets.chunk(case.accumulate), strict=True)


def train_unsharded(
    case: Case,
    model: nn.Module,
    masks: list[Mapping[str, list[Tensor]]] | None = None,
    *,
    rounds: bool = False,
) -> Curve:
    """``masks`` of each step are what dropouts drop. ``rounds``: gradients and weights are rounded
    to float32, as an optimizer rounds them that has copies of the weights in float32."""
    optimizer, curve = make_optimizer(case, model), Curve()
    for step in range(STEPS):
        if rounds:
            round_all(list(model.parameters()))
        if masks is not None:
            replay(model, masks[step])
        total = 0.0
        for ids, targets in chunks(case, step):
            with casting(case):
                loss = loss_of(case, model, ids, targets) / case.accumulate
            loss.backward()
            total += float(loss.detach())
        curve.losses.append(total)
        trained = [p for p in model.parameters() if p.grad is not None]
        if rounds:
            round_all([p.grad for p in trained if p.grad is not None])
        curve.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP if case.clip else float("inf"))
        curve.norms.append(float(norm))
        optimizer.step()
        optimizer.zero_grad()
        if step == STEPS - 2:
            between(case, model)
    if rounds:
        round_all(list(model.parameters()))
    curve.evaluated = evaluate(case, model)
    curve.weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return curve


@torch.no_grad()
def round_all(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.copy_(tensor.float())


@torch.no_grad()
def between(case: Case, model: nn.Module) -> None:
    """What changes an unsharded model before the last step."""
    if case.between == "gather":
        for parameter in model.parameters():
            parameter *= 1.01
    elif case.between == "thaw":
        for parameter in model.parameters():
            parameter.requires_grad_(True)


def evaluate(case: Case, model: nn.Module) -> float:
    model.eval()
    with torch.no_grad(), casting(case):
        loss = float(loss_of(case, model, *batch(case, STEPS)))
    model.train()
    return loss


def replay(model: nn.Module, masks: Mapping[str, list[Tensor]]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.replayed = list(masks[name])
