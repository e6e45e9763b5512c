# SPDX-License-Identifier: Apache-2.0
"""Three steps of a model in one process, and of the same model sharded; what both have."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR

from tests.support.prove.case import Case
from tests.support.prove.encoders import encoder_inputs, make_encoder
from tests.support.prove.families import make_family
from tests.support.prove.losses import cross_entropy
from tests.support.prove.model import CLASSES, Language, make_language
from tests.support.prove.names import ENCODERS, NAMES, NETWORK_NAMES
from tests.support.prove.norms import Dropout

STEPS = 3
CLIP = 0.3  # of a norm
CLIP_VALUE = 0.02
LORA = 2  # rank

OUTPUTS = {names[3] for names in NAMES.values()} | {n[2] for n in NETWORK_NAMES.values()}

Gradients = dict[str, Tensor]


@dataclass
class Curve:
    """Losses, norms (None where there is none) and gradients of all steps; at the end the weights,
    the loss in evaluation, and what is wrong with replicas."""

    losses: list[float] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    gradients: list[Gradients] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    evaluated: float = 0.0
    replicas: str = "all equal"

    def before(self, rest: "Curve") -> "Curve":
        """These steps, and then those of ``rest`` and its end."""
        losses, norms = self.losses + rest.losses, self.norms + rest.norms
        return replace(rest, losses=losses, norms=norms, gradients=self.gradients + rest.gradients)


def make(case: Case, dtype: torch.dtype, *, drawn: int | None = None) -> nn.Module:
    """The model of a case, with the parameters that its seed gives, or another one."""
    drawn = case.seed if drawn is None else drawn
    torch.manual_seed(drawn)
    model = build(case)
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad(), torch.device("cpu"):
        draw = torch.Generator().manual_seed(drawn)
        for parameter in () if is_meta else model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        if not is_meta:
            make_tiny(case, model)
        for parameter in model.parameters() if case.precision == "bfloat16" else ():
            parameter.copy_(parameter.bfloat16())
    model = model.to(dtype)
    if case.frozen:
        for number, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(number % 3 != case.frozen - 1)
    return model.train()


def build(case: Case) -> nn.Module:
    if not case.family:
        language: nn.Module = make_language(case)
        return language
    return make_encoder(case) if case.family in ENCODERS else make_family(case)


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
    if case.ignored == "some":
        targets[:, :2] = -100
    elif case.ignored == "row" and step == 1:
        targets[0] = -100
    return ids, targets


def loss_of(case: Case, model: Callable[..., Any], ids: Tensor, targets: Tensor) -> Tensor:
    """Of one forward, or of two."""
    loss = one_loss(case, model, ids, targets)
    if case.twice:
        loss = loss + 0.5 * one_loss(case, model, ids.flip(1), targets)
    return loss


def one_loss(case: Case, model: Callable[..., Any], ids: Tensor, targets: Tensor) -> Tensor:
    if case.family in ENCODERS:
        loss: Tensor = model(**encoder_inputs(case, model, ids, targets)).loss
        return loss
    if case.family:
        return family_loss(case, model, ids, targets)
    if case.signature == "loss":
        return model(ids, targets)
    if case.signature == "labels":
        return model(input_ids=ids, labels=targets)["loss"]
    logits = model(ids)
    if case.outputs == "classes":
        return cross_entropy(case, logits[:, -1], targets[:, -1] % CLASSES)
    loss = cross_entropy(case, logits.flatten(0, 1), targets.flatten())
    return loss + (0.1 * logits.logsumexp(-1).square().mean() if case.outputs == "z-loss" else 0.0)


def family_loss(case: Case, model: Callable[..., Any], ids: Tensor, targets: Tensor) -> Tensor:
    """Formed by the loop, or by transformers, which casts logits to float32."""
    if case.signature == "loss":
        logits = model(input_ids=ids).logits
        return cross_entropy(case, logits.flatten(0, 1), targets.flatten())
    labels = torch.where(targets < 0, targets, ids)  # shifted by transformers
    outputs = model(input_ids=ids, labels=labels)
    if case.outputs == "z-loss":
        return outputs.loss + 0.1 * outputs.logits.logsumexp(-1).square().mean()
    return outputs.loss


def casting(case: Case) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16) if case.autocast else nullcontext()


def make_optimizer(case: Case, model: nn.Module) -> torch.optim.Optimizer:
    trained = parameter_groups(case, model)
    if case.optimizer == "adamw":
        # A small gradient in a sum of large ones is rounded; by eps it is not scaled up.
        return torch.optim.AdamW(trained, lr=0.01, eps=1e-3, weight_decay=0.1)
    return torch.optim.SGD(trained, lr=0.02, momentum=0.9, weight_decay=0.01)


def parameter_groups(case: Case, model: nn.Module) -> list[dict[str, Any]]:
    """Those that train, all alike or in two groups."""
    kinds = [p for p in model.parameters() if p.requires_grad or case.between == "thaw"]
    if case.settings == "one":
        return [{"params": kinds}]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    if case.settings == "decay":
        chosen, options = {id(p) for p in kinds if p.dim() < 2}, {"weight_decay": 0.0}
    else:
        chosen, options = tables, {"lr": 0.005}
    groups = [
        {"params": [p for p in kinds if id(p) not in chosen]},
        {"params": [p for p in kinds if id(p) in chosen], **options},
    ]
    return [group for group in groups if group["params"]]


def make_schedule(case: Case, optimizer: torch.optim.Optimizer) -> ExponentialLR | None:
    return ExponentialLR(optimizer, gamma=0.5) if case.schedule else None


def backward(case: Case, loss: Tensor) -> None:
    """Through the graph of a loss, once or twice, with the same sum of gradients."""
    if case.backward == "twice":
        (0.25 * loss).backward(retain_graph=True)
        loss = 0.75 * loss
    loss.backward()


def squares(case: Case, model: nn.Module) -> Tensor:
    """A penalty on the parameters that train."""
    trained = [p.square().sum() for p in model.parameters() if p.requires_grad and case.squares]
    return 0.05 * torch.stack(trained).sum() if trained else torch.zeros(())


def clip_values(case: Case, model: nn.Module) -> None:
    if case.clip == "value":
        torch.nn.utils.clip_grad_value_(model.parameters(), CLIP_VALUE)


def most_norm(case: Case) -> float:
    return CLIP if case.clip == "norm" else float("inf")


def skip(case: Case, model: nn.Module, step: int) -> None:
    """Say what the next forwards do not use."""
    for module in model.modules():
        if isinstance(module, Language):
            module.skips = case.skipped if step == 1 else ""


def chunks(case: Case, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """One for each forward of each replica, whose losses have the same weight."""
    ids, targets = batch(case, step)
    count = case.replicas * case.accumulate
    return zip(ids.chunk(count), targets.chunk(count), strict=True)


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
    in_16_bits = next(model.parameters()).dtype == torch.bfloat16
    copies = Copies(model, optimizer) if in_16_bits else None
    schedule = make_schedule(case, optimizer)
    for step in range(STEPS):
        skip(case, model, step)
        if rounds:
            round_all(list(model.parameters()))
        if masks is not None:
            replay(model, masks[step])
        total = 0.0
        for ids, targets in chunks(case, step):
            parts = case.accumulate * case.replicas
            with casting(case):
                loss = loss_of(case, model, ids, targets) / parts
            backward(case, loss + squares(case, model) / parts)
            total += float(loss.detach())
        curve.losses.append(total)
        if case.way.startswith("zero"):
            fill_gradients(model)
        trained = [p for p in model.parameters() if p.grad is not None]
        if copies is not None:
            trained = copies.take_gradients()
        if rounds:
            round_all([p.grad for p in trained if p.grad is not None])
        curve.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        norm = torch.nn.utils.clip_grad_norm_(trained, most_norm(case))
        curve.norms.append(float(norm))
        clip_values(case, model)
        optimizer.step()
        model.zero_grad()
        if copies is not None:
            copies.give_weights()
        if schedule is not None:
            schedule.step()
        if step == STEPS - 2:
            between(case, model)
    if rounds:
        round_all(list(model.parameters()))
    curve.evaluated = evaluate(case, model)
    curve.weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    return curve


class Copies:
    """Weights in float32 that an optimizer changes, of a model in bfloat16."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.pairs = [(p, p.detach().float()) for p in model.parameters() if p.requires_grad]
        copies = {id(parameter): copy for parameter, copy in self.pairs}
        for group in optimizer.param_groups:
            group["params"] = [copies[id(parameter)] for parameter in group["params"]]

    def take_gradients(self) -> list[Tensor]:
        for parameter, copy in self.pairs:
            copy.grad = None if parameter.grad is None else parameter.grad.float()
        return [copy for _, copy in self.pairs if copy.grad is not None]

    @torch.no_grad()
    def give_weights(self) -> None:
        for parameter, copy in self.pairs:
            parameter.copy_(copy)


def fill_gradients(model: nn.Module) -> None:
    """With zeros, as an engine does where there are none."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


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


def evaluate(case: Case, model: nn.Module, called: Callable[..., Any] | None = None) -> float:
    """The loss, by ``called`` where that is not the model itself."""
    called = called or model
    outer = called if isinstance(called, nn.Module) else model
    outer.eval()
    with torch.no_grad(), casting(case):
        loss = float(loss_of(case, called, *batch(case, STEPS)))
    outer.train()
    return loss


def replay(model: nn.Module, masks: Mapping[str, list[Tensor]]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, Dropout):
            module.replayed = list(masks[name])
