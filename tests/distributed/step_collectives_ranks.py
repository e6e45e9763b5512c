# SPDX-License-Identifier: Apache-2.0
"""The collectives of one training step."""

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist

import deepspeed_autotp
from benchmarks import layers
from benchmarks.step_calls import Recorder
from tests.support.small_models import build, tokens

Counts = Mapping[str, int]


def of_step(family: str, tied: bool) -> tuple[Counts, Counts, Counts]:
    """Kinds of collectives: forward, backward, and backward of a second micro-batch."""
    model = build(family, tied=tied)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    ids = tokens(0)
    for _ in range(2):  # which compare the batches and the last steps of the ranks
        model(input_ids=ids, labels=ids)
    forward, first, second = Recorder(), Recorder(), Recorder()
    with forward:
        loss = model(input_ids=ids, labels=ids).loss
    with first:
        loss.backward()
    loss = model(input_ids=ids, labels=ids).loss
    with second:
        loss.backward()
    return _kinds(forward), _kinds(first), _kinds(second)


def _kinds(recorder: Recorder) -> Counts:
    return Counter(call.kind for call in recorder.calls)


def nodes(bias: bool) -> dict[str, tuple[float, float]]:
    """Autograd nodes of each layer and of ``nn.Linear``."""
    torch.manual_seed(0)
    inner = layers.FEATURES // layers.RANKS
    ours = layers.cases(layers.sharded(bias=bias))
    plain = layers.cases(layers.Layers(bias=bias, inner=inner))
    return {n: (layers.nodes_added(ours[n]), layers.nodes_added(plain[n])) for n in ours}
