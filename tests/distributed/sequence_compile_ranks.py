# SPDX-License-Identifier: Apache-2.0
"""Models whose tokens are sharded between blocks, under torch.compile."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.handmade_model import PARTITION, Handmade, Mlp, example
from tests.support.loss_curves import RATE, single_losses, train_engine, worst_difference
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens
from tests.support.training_loops import loss_of

# Whose heads and features three ranks hold as many of.
BY_THREE: dict[str, Any] = {
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "hidden_size": 96,
    "intermediate_size": 120,
}


@dataclass
class Found:
    """Differences to one process, and what torch.compile made."""

    apart: dict[str, float] = field(default_factory=dict)
    breaks: int = 0
    graphs: int = 0
    forward: Counter[str] = field(default_factory=Counter)
    backward: Counter[str] = field(default_factory=Counter)


def pair(family: str, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """An unsharded model, and the same one sharded over all ranks with its tokens sharded."""
    tied = changes.pop("tied", False)
    unsharded, sharded = (build(family, tied=tied, **changes).double() for _ in range(2))
    config = {"sequence_parallel": True}
    return unsharded, deepspeed_autotp.parallelize(
        sharded, tp_size=dist.get_world_size(), config=config
    )


def steps(model: nn.Module, called: Callable[..., Any], lengths: Sequence[int]) -> list[float]:
    """Losses of SGD, a step for each length."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step, length in enumerate(lengths):
        loss = loss_of(called, tokens(step, length=length))  # type: ignore[arg-type]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def apart(
    unsharded: nn.Module, sharded: nn.Module, losses: Sequence[float], own: Sequence[float]
) -> dict[str, float]:
    """Largest differences of the losses and of the weights."""
    weights = deepspeed_autotp.full_state_dict(sharded)
    deepspeed_autotp.check_replicas(sharded)
    return {
        "loss": max(abs(a - b) for a, b in zip(own, losses, strict=True)),
        "weights": max(
            float((weights[n] - t).abs().max()) for n, t in unsharded.state_dict().items()
        ),
    }


@contextmanager
def counted(found: Found) -> Iterator[None]:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    try:
        yield
        found.breaks = sum(counters["graph_break"].values())
        found.graphs = counters["stats"]["unique_graphs"]
    finally:
        torch._dynamo.reset()


def micro_pipelined(found: Found) -> Any:
    """A backend that fuses collectives and products as inductor does on a GPU, and counts what
    it finds and fuses; the fused operators are torch's own fallbacks."""
    from unittest.mock import patch

    import torch.distributed._symmetric_memory as symmetric
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import micro_pipeline_tp as fusion
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    def compiler(into: Counter[str]) -> Callable[..., Any]:
        def compile_graph(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            view_to_reshape(graph)
            into["gathers"] = len(fusion.find_all_gather_patterns(graph.graph))
            into["scatters"] = len(fusion.find_reduce_scatter_patterns(graph.graph))
            with (
                symmetric._test_mode(),
                patch("torch.distributed.is_nccl_available", return_value=True),
            ):
                fusion.micro_pipeline_tp_pass(graph.graph)
            graph.recompile()
            for node in graph.graph.nodes:
                target = str(node.target)
                if "_c10d_functional" in target or "symm_mem" in target:
                    into[target.split(".")[1]] += 1
            return graph

        return compile_graph

    def partition(graph: torch.fx.GraphModule, inputs: Any, **more: Any) -> Any:
        joint_graph_passes(graph)
        return min_cut_rematerialization_partition(graph, inputs, **more)

    return aot_autograd(
        fw_compiler=compiler(found.forward),
        bw_compiler=compiler(found.backward),
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )


@contextmanager
def fused_operators_on_cpu() -> Iterator[None]:
    import torch.distributed._symmetric_memory as symmetric

    with torch.library._scoped_library("symm_mem", "IMPL") as library:
        for name in ("fused_all_gather_matmul", "fused_matmul_reduce_scatter"):
            library.impl(name, getattr(symmetric, f"_{name}_fallback"), "CPU")
        yield


def fused(layers: int, lengths: Sequence[int], changes: dict[str, Any]) -> Found:
    """Training of a llama with collectives and products fused."""
    unsharded, sharded = pair("llama", num_hidden_layers=layers, **changes)
    losses = steps(unsharded, unsharded, lengths)
    found = Found()
    with fused_operators_on_cpu(), counted(found):
        called = torch.compile(sharded, backend=micro_pipelined(found), fullgraph=True)
        own = steps(sharded, called, lengths)
    found.apart = apart(unsharded, sharded, losses, own)
    return found


class Looped(Handmade):
    """Whose blocks may be run by checkpoints."""

    is_checkpointing = False

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.is_checkpointing else block(x)
        return (x - target).square().mean()


class Writing(Mlp):
    """Writes to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return super().forward(x)


def batch(rows: int, length: int) -> dict[str, Tensor]:
    return {name: x[:, :length].double() for name, x in example(rows + length, rows=rows).items()}


# Two ranks cannot share the fifteen tokens of the first one evenly.
BATCHES = [(3, 5), (4, 6)]


def handmade_pair(
    change: Callable[[Looped], None] | None = None, *, layers: int
) -> tuple[Looped, Looped]:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Looped(layers=layers).double())
        if change is not None:
            change(models[-1])
    config = {"sequence_parallel": True, "partition_config": PARTITION}
    size = dist.get_world_size()
    deepspeed_autotp.parallelize(models[1], tp_size=size, config=config, example_inputs=batch(4, 6))
    return models[0], models[1]


def curve(model: nn.Module, called: Callable[..., Any]) -> list[float]:
    """Losses of SGD, and last one without gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for rows, length in BATCHES:
        loss = called(**batch(rows, length))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        return [*losses, float(called(**batch(3, 5)))]


def compiled(model: Looped, blocks: Sequence[int]) -> Callable[..., Any]:
    """``model``, or some of its blocks, compiled."""
    if not blocks:
        return torch.compile(model, backend="aot_eager")
    for number in blocks:
        model.blocks[number].compile(backend="aot_eager")
    called: Callable[..., Any] = model
    return called


def handmade(layers: int, blocks: list[int], checkpoints: str) -> Found:
    """A small model of which some blocks are compiled, or without ``blocks`` all; with
    ``checkpoints`` that are "traced", too."""
    import torch._dynamo.config as settings

    unsharded, sharded = handmade_pair(layers=layers)
    sharded.is_checkpointing = bool(checkpoints)
    losses = curve(unsharded, unsharded)
    found = Found()
    key = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    with settings.patch({key: checkpoints == "traced"}), counted(found):
        own = curve(sharded, compiled(sharded, blocks))
    found.apart = apart(unsharded, sharded, losses, own)
    return found


def experts() -> tuple[float, int, int]:
    """The worst loss of a mixture of experts, graphs and breaks."""
    sizes = {"num_local_experts": 4, "num_experts_per_tok": 2}
    expected = single_losses(build("mixtral", tied=False, **sizes), clip=0.0)
    model = build("mixtral", tied=False, **sizes)
    config = {"sequence_parallel": True}
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=config)
    found = Found()
    with counted(found):
        called: Any = torch.compile(model, backend="aot_eager")
        losses = single_losses(called, clip=0.0)
    return worst_difference(losses, expected), found.graphs, found.breaks


def _writes(model: Looped) -> None:
    model.blocks[0].mlp.__class__ = Writing


def refused() -> dict[str, str]:
    """The errors of what cannot be compiled, and one of none where it is not."""
    _, writing = handmade_pair(_writes, layers=1)
    _, outside = handmade_pair(layers=1)
    outside.is_checkpointing = True
    with counted(Found()):
        return {
            "writes, not compiled": raised_error(lambda: writing(**batch(4, 6)).backward()),
            "writes": raised_error(lambda: compiled(writing, [])(**batch(4, 6)).backward()),
            "outside": raised_error(lambda: compiled(outside, [0])(**batch(4, 6)).backward()),
        }


def hidden_states() -> Found:
    """A loss of the hidden states of a compiled model."""
    unsharded, sharded = pair("llama", use_cache=False)
    # Breaks a graph: transformers registers its hooks in the first call that asks.
    with torch.no_grad():
        sharded(input_ids=tokens(0), output_hidden_states=True)
    found = Found()
    losses = []
    with counted(found):
        called = torch.compile(sharded, backend="aot_eager", fullgraph=True)
        for model, forward in ((unsharded, unsharded), (sharded, called)):
            optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
            states = forward(input_ids=tokens(0), output_hidden_states=True).hidden_states
            loss = sum((number + 1) * state.square().mean() for number, state in enumerate(states))
            loss.backward()
            optimizer.step()
            losses.append([float(loss.detach())])
    found.apart = apart(unsharded, sharded, *losses)
    return found


def engine(setting: Setting) -> float:
    """The worst loss of an engine that compiles, to one process."""
    expected = single_losses(build("llama", tied=False), clip=0.0, length=setting.length)
    torch._dynamo.reset()
    made, *_ = deepspeed_autotp.initialize(
        model=(model := build("llama", tied=False)),
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config=engine_config(setting),
    )
    made.compile(backend="aot_eager")
    try:
        losses = train_engine(made, tp=setting.tp, length=setting.length)
        assert made.is_compiled
    finally:
        torch._dynamo.reset()
        made.destroy()
    return worst_difference(losses, expected)
