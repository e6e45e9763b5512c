# SPDX-License-Identifier: Apache-2.0
"""The public loss over a sharded vocabulary, in a model of one's own."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from deepspeed_autotp import vocab_parallel_cross_entropy
from tests.support.column_shards import even_widths, layout_of, own_columns

SIZE = 14


def _drawn() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 5, SIZE, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, SIZE, (2, 5), generator=draw)
    labels[0, 1] = -100
    return logits, labels


def world() -> Any:
    return dist.group.WORLD


def against_one_process(
    widths: list[int] | None, options: dict[str, Any], overwrite: bool
) -> dict[str, Any]:
    """Errors of value and gradient against ``F.cross_entropy`` of all logits."""
    full, labels = _drawn()
    labels = labels.clamp(min=0) if "ignore_index" in options else labels
    exact = full.clone().requires_grad_()
    cap = options.get("soft_cap", 0.0)
    capped = torch.tanh(exact / cap) * cap if cap else exact
    more = {key: value for key, value in options.items() if key != "soft_cap"}
    expected = F.cross_entropy(capped.transpose(1, 2), labels, **more)
    (expected**2).sum().backward()
    layout = layout_of(widths or even_widths(SIZE))
    own = own_columns(full, layout)
    x = own * 1
    before = x.detach().clone()
    got = vocab_parallel_cross_entropy(
        x, labels, world(), widths=widths, overwrite_logits=overwrite, **options
    )
    (got**2).sum().backward()
    assert own.grad is not None and exact.grad is not None
    return {
        "value": float((got.detach() - expected.detach()).abs().max()),
        "gradient": float((own.grad - own_columns(exact.grad, layout, leaf=False)).abs().sum()),
        "shape": got.shape == expected.shape,
        "kept": torch.equal(x.detach(), before),
    }


class Tagger(nn.Module):
    """A model whose head stays sharded, with the public loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(SIZE, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.head = nn.Linear(8, SIZE, bias=False)
        self.group: Any = None

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        logits = self.head(x + self.down(torch.relu(self.up(x))))
        if self.group is None:
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return vocab_parallel_cross_entropy(logits, labels, self.group)


_RULES: dict[str, Any] = {
    "layer_specs": [
        {"patterns": [r"(up|head)\.weight"], "partition_type": "column"},
        {"patterns": [r"down\.weight"], "partition_type": "row"},
    ]
}


def own_model() -> tuple[float, float]:
    """Three steps of such a model; the worst loss, and how far its weights are apart."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Tagger())
    unsharded, model = models
    deepspeed_autotp.parallelize(
        model, tp_size=2, config={"partition_config": _RULES, "self_check": False}
    )
    model.group = deepspeed_autotp.tensor_parallel(model).group
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.5) for one in models]
    ids = torch.randint(0, SIZE, (3, 4), generator=torch.Generator().manual_seed(1))
    worst = 0.0
    for _ in range(3):
        losses = []
        for one, optimizer in zip(models, optimizers, strict=True):
            loss = one(ids, ids.roll(1, 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        worst = max(worst, abs(losses[1] / losses[0] - 1))
    full = deepspeed_autotp.full_state_dict(model)
    apart = max(float((full[n] - p).abs().max()) for n, p in unsharded.state_dict().items())
    return worst, apart


def refused() -> list[str]:
    """The errors of arguments that do not fit."""
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    calls: list[Callable[[], Tensor]] = [
        lambda: vocab_parallel_cross_entropy(x, y[:1], world()),
        lambda: vocab_parallel_cross_entropy(x, y.int(), world()),
        lambda: vocab_parallel_cross_entropy(x.long(), y, world()),
        lambda: vocab_parallel_cross_entropy(x, y, world(), reduction="average"),
        lambda: vocab_parallel_cross_entropy(x, y, world(), widths=[3]),
        lambda: vocab_parallel_cross_entropy(x, y, world(), widths=[2, 2]),
        lambda: vocab_parallel_cross_entropy(x, y + 6, world()),
        lambda: vocab_parallel_cross_entropy(x, y, None),  # type: ignore[arg-type]
    ]
    said = []
    for call in calls:
        try:
            said.append(f"no error, but {call()}")
        except ValueError as error:
            said.append(str(error))
    return said
