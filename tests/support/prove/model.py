# SPDX-License-Identifier: Apache-2.0
"""A language model of a user's own, as a case describes it."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.prove.attention import make_attention
from tests.support.prove.case import Case
from tests.support.prove.contradictions import settle
from tests.support.prove.linear import change_linears
from tests.support.prove.losses import cross_entropy
from tests.support.prove.names import NETWORK_NAMES
from tests.support.prove.networks import Mixture, Network, make_network
from tests.support.prove.norms import Dropout, make_norm

# How embedding, blocks, norm and head are called.
MODEL_NAMES = {
    "layers": ("embed_tokens", "layers", "norm", "lm_head"),
    "blocks": ("embedding", "blocks", "norm", "head"),
    "h": ("wte", "h", "ln_f", "lm_head"),
    "unknown": ("book", "floors", "roof", "voice"),
}
CLASSES = 6


class Residual(nn.Module):
    """What a branch is multiplied with before it is added."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.kind = case.residual
        shapes = {"vector": case.hidden, "scalar": 1, "gate": 1}
        if self.kind in shapes:
            self.scale = nn.Parameter(0.5 + torch.rand(shapes[self.kind]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.kind in ("constant", "small"):
            return x + (0.5 if self.kind == "constant" else 1e-4) * y
        if self.kind == "in place":
            y += x
            return y
        if self.kind == "gate":
            return x + torch.tanh(self.scale) * y
        return x + self.scale * y if self.kind else x + y


class Block(nn.Module):
    """Attention and a network, or one of them."""

    def __init__(self, case: Case, attention: nn.Module | None, network: nn.Module | None) -> None:
        super().__init__()
        self.kind, self.time_first = case.block, case.time_first
        self.attn, self.mlp = attention, network
        # A parameter that nothing uses has no gradient here, and one of zeros under ZeRO.
        first, second = attention is not None, network is not None
        if first or self.kind.startswith("parallel"):
            self.norm1, self.residual1 = make_norm(case), Residual(case)
        if second and self.kind != "parallel":
            self.norm2 = make_norm(case)
        if second and not self.kind.startswith("parallel"):
            self.residual2 = Residual(case)
        if self.kind == "sandwich":
            self.norm3 = make_norm(case) if first else None
            self.norm4 = make_norm(case) if second else None
        self.drop = Dropout(1, case.length) if case.dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind.startswith("parallel"):
            assert self.attn is not None and self.mlp is not None
            first = self.norm1(x)
            second = self.norm2(x) if self.kind == "parallel norms" else first
            both = self.apply_branch(self.attn, first) + self.mlp(second)
            y: Tensor = self.residual1(x, self.drop(both))
            return y
        x = x if self.attn is None else self.branch(x, self.attn, 1)
        return x if self.mlp is None else self.branch(x, self.mlp, 2)

    def apply_branch(self, module: nn.Module, x: Tensor) -> Tensor:
        """Attention wants rows first."""
        if not self.time_first or module is not self.attn:
            y: Tensor = module(x)
            return y
        z: Tensor = module(x.transpose(0, 1)).transpose(0, 1)
        return z

    def branch(self, x: Tensor, module: nn.Module, number: int) -> Tensor:
        norm, residual = (
            (self.norm1, self.residual1) if number == 1 else (self.norm2, self.residual2)
        )
        if self.kind == "post":
            y: Tensor = norm(residual(x, self.drop(self.apply_branch(module, x))))
            return y
        y = self.apply_branch(module, norm(x))
        if self.kind == "sandwich":
            y = (self.norm3 if number == 1 else self.norm4)(y)
        added: Tensor = residual(x, self.drop(y))
        return added


class Language(nn.Module):
    """Embedding, blocks, norm, output heads; ``run`` calls a block, as checkpointing does."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.names = case, MODEL_NAMES[case.model_names]
        embedding, blocks, norm, head = self.names
        narrow = case.embedding == "projected"
        width = 10 if narrow else case.hidden
        self.add_module(embedding, nn.Embedding(case.vocabulary, width))
        if narrow:
            self.project_in = nn.Linear(width, case.hidden, bias=False)
        if case.embedding == "norm":
            self.embedding_norm = nn.LayerNorm(case.hidden)
        if case.positions == "learned":
            self.positions = nn.Embedding(16, case.hidden)
        self.add_module(blocks, nn.ModuleList(make_blocks(case)))
        self.add_module(norm, make_norm(case))
        outputs = CLASSES if case.outputs == "classes" else case.vocabulary
        if case.tied != "functional":
            self.add_module(head, nn.Linear(case.hidden, outputs, bias=case.head_bias))
        elif case.head_bias:
            self.head_bias = nn.Parameter(torch.zeros(outputs))
        if case.outputs == "two heads":
            self.second_head = nn.Linear(case.hidden, case.vocabulary, bias=False)
        elif case.outputs == "value head":
            self.value_head = nn.Linear(case.hidden, 1)
        if case.tied == "weight":
            self.get_submodule(head).weight = self.get_submodule(embedding).weight
        self.run: Callable[[nn.Module, Tensor], Tensor] = call
        self.skips = ""  # in this step

    def hidden(self, tokens: Tensor) -> Tensor:
        case = self.case
        embedding, blocks, norm, _ = self.names
        x = self.get_submodule(embedding)(tokens)
        if case.embedding == "scaled":
            x = x * case.hidden**0.5
        elif case.embedding == "norm":
            x = self.embedding_norm(x)
        elif case.embedding == "projected":
            x = self.project_in(x)
        if case.positions == "learned":
            x = x + self.positions(torch.arange(tokens.shape[1]))
        x = x.transpose(0, 1) if case.time_first else x
        layers = list(self.get_submodule(blocks))
        for number, block in enumerate(layers[:-1] if self.skips == "block" else layers):
            if number == 0 and case.trunk == "no grad":
                with torch.no_grad():
                    x = block(x)
                continue
            x = self.run(block, x) if self.training else block(x)
            x = x.detach() if number == 0 and case.trunk == "detached" else x
        x = x.transpose(0, 1) if case.time_first else x
        y: Tensor = self.get_submodule(norm)(x)
        return y

    def logits(self, hidden: Tensor) -> Tensor:
        y = self.outputs(hidden)
        if self.case.logits == "scaled":
            y = y * 0.25
        elif self.case.logits == "capped":
            y = 5 * torch.tanh(y / 5)
        elif self.case.logits == "in place":
            y *= 0.5
            y[..., 0] = y[..., 0] - 2.0
        return y

    def outputs(self, hidden: Tensor) -> Tensor:
        embedding, _, _, head = self.names
        if self.case.tied != "functional":
            y: Tensor = self.get_submodule(head)(hidden)
            return y
        bias = self.head_bias if self.case.head_bias else None
        return F.linear(hidden, self.get_submodule(embedding).weight, bias)

    def loss(self, hidden: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        kind = self.case.outputs
        if kind == "classes":
            loss = cross_entropy(self.case, logits[:, -1], targets[:, -1] % CLASSES)
            return loss + self.penalties()
        shown, wanted = logits, targets
        if self.case.logits == "shifted":
            shown, wanted = logits[:, :-1].contiguous(), targets[:, 1:]
        loss = cross_entropy(self.case, shown.flatten(0, 1), wanted.flatten())
        return loss + self.extra(kind, hidden, logits, targets) + self.penalties()

    def penalties(self) -> Tensor | float:
        """What the blocks add to the loss."""
        if not self.case.penalty:
            return 0.0
        found = [m.penalty for m in self.modules() if isinstance(m, (Network, Mixture))]
        return 0.1 * sum(each for each in found if each is not None)

    def extra(self, kind: str, hidden: Tensor, logits: Tensor, targets: Tensor) -> Tensor | float:
        if self.skips == "head":
            return 0.0
        if kind == "two heads":
            second = self.second_head(hidden[:, :-1]).flatten(0, 1)
            return 0.5 * cross_entropy(self.case, second, targets[:, 1:].flatten())
        if kind == "value head":
            return self.value_head(hidden).square().mean()
        if kind == "z-loss":
            return 0.1 * logits.logsumexp(-1).square().mean()
        return 0.1 * hidden.square().mean() if kind == "hidden loss" else 0.0


class GivesLoss(Language):
    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden = self.hidden(tokens)
        return self.loss(hidden, self.logits(hidden), targets)


class TakesLabels(Language):
    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = self.hidden(input_ids)
        logits = self.logits(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": self.loss(hidden, logits, labels), "logits": logits}


class GivesLogits(Language):
    """The loss is the loop's."""

    def forward(self, idx: Tensor) -> Tensor:
        return self.logits(self.hidden(idx))


def call(block: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = block(x)
    return y


def checkpointed(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(block: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(block, x, use_reentrant=reentrant)
        return y

    return run


# What differs between blocks that are mixed.
MIXED = (
    "residual", "norm", "head_norm", "before_output", "per_head", "scale", "product", "inner_norm",
    "per_feature", "activation", "projection", "network",
)  # fmt: skip


def case_of_block(case: Case, number: int) -> Case:
    """The case itself, or one with fields of its own for this block."""
    if not case.mixed:
        return case
    source, values = random.Random(1000 * case.seed + number), {}
    for name in MIXED:
        if source.random() < 0.3:
            values[name] = source.choice(Case.__dataclass_fields__[name].metadata["values"])
    return settle(replace(case, **values))


def make_blocks(case: Case) -> list[nn.Module]:
    blocks: list[Block] = []
    for number in range(case.layers):
        own = case_of_block(case, number)
        first = blocks[0] if blocks else None
        if first is not None and case.shared == "block":
            blocks.append(first)
            continue
        attention = network = None
        if own.projection != "none":
            shares = first is not None and case.shared == "attention"
            attention = first.attn if first is not None and shares else make_attention(own)
        if own.network != "none":
            shares = first is not None and case.shared == "network"
            network = first.mlp if first is not None and shares else make_network(own)
        blocks.append(Block(own, attention, network))
        if first is not None and case.shared == "weight":
            up = NETWORK_NAMES[case.network_names][1]
            assert network is not None and first.mlp is not None
            network.get_submodule(up).weight = first.mlp.get_submodule(up).weight
    return list(blocks)


def make_language(case: Case) -> Any:
    kinds = {"loss": GivesLoss, "labels": TakesLabels, "logits": GivesLogits}
    model = kinds[case.signature](case)
    if case.linear in ("scaled", "weight norm"):
        change_linears(model, case.linear)
    if case.checkpointing:
        model.run = checkpointed(case.checkpointing == "reentrant")
    return model
