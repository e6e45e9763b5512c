# SPDX-License-Identifier: Apache-2.0
"""Models of which each rank loads its own shards, against transformers' own ``from_pretrained``."""

import json
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from benchmarks import shrink
from deepspeed_autotp.loading.read_plan import ReadPlan
from tests.support.log_records import logged_warnings
from tests.support.raised_error import raised_error
from tests.support.small_models import build
from tests.support.training_loops import apart, train_sharded, train_unsharded

# Sizes of shrunken models leave no key/value heads to some ranks at TP 4.
DTYPE = torch.bfloat16


def write(name: str, folder: str, options: Mapping[str, Any] | None = None) -> None:
    """A checkpoint in the form in which it is released, of values that all differ."""
    kind, _, how = name.partition(", ")
    if kind == "t5":
        model: Any = _t5()
    elif how:
        model = build(kind, tied=how == "tied")
        model = model.model if how == "base" else model
    else:
        model = shrink.build(kind)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters()]:
            tensor.normal_(0.0, 0.05, generator=draw)
    model.save_pretrained(folder, **(options or {}))


def write_all(folders: Mapping[str, str]) -> None:
    for name, folder in folders.items():
        write(name, folder)


def pickle_weights(folder: str) -> None:
    """The checkpoint as one file of torch.save."""
    model = class_of(folder).from_pretrained(folder)
    torch.save(model.state_dict(), Path(folder, "pytorch_model.bin"))
    Path(folder, "model.safetensors").unlink()


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes: dict[str, Any] = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}
    config = T5Config(vocab_size=96, num_layers=2, num_decoder_layers=2, **sizes)
    return T5ForConditionalGeneration(config)


def class_of(folder: str) -> Any:
    """The class that a checkpoint was saved from."""
    import transformers

    (name,) = json.loads(Path(folder, "config.json").read_text())["architectures"]
    return getattr(transformers, name)


@contextmanager
def counted_bytes() -> Any:
    """The bytes that each plan of reads within it reads."""
    counts: list[int] = []
    run = ReadPlan.run

    def counting(self: ReadPlan, files: Any, advance: Callable[[int], object]) -> None:
        count = [0]

        def add(size: int) -> None:
            count[0] += size
            advance(size)

        run(self, files, add)
        assert count[0] == self.bytes_to_read
        counts.append(count[0])

    ReadPlan.run = counting  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        ReadPlan.run = run  # type: ignore[method-assign]


def differences(sharded: nn.Module, full: nn.Module) -> list[str]:
    """The names of what is not the same in both, bit by bit, once it is gathered."""
    weights = deepspeed_autotp.full_state_dict(sharded)
    expected = full.state_dict()
    found = sorted(weights.keys() ^ expected.keys())
    for name, tensor in expected.items():
        own = weights.get(name)
        if own is None or own.dtype != tensor.dtype or not torch.equal(own, tensor):
            found.append(name)
    buffers = dict(sharded.named_buffers())
    found += [name for name, b in full.named_buffers() if not torch.equal(buffers[name], b)]
    named = [_named(model) for model in (sharded, full)]
    if named[0] != named[1]:
        found.append(f"ties, or what trains: {named[0] ^ named[1]}")
    return found


def _named(model: nn.Module) -> set[tuple[str, bool]]:
    """The names without those of tied weights, and which of them train."""
    return {(name, parameter.requires_grad) for name, parameter in model.named_parameters()}


def loads(
    folder: str, load_arguments: Mapping[str, Any] | None = None, dtype: torch.dtype = DTYPE
) -> tuple[list[str], float]:
    """What differs from ``from_pretrained``, and the bytes that this rank read to those of the
    shard in the file."""
    cls, more = class_of(folder), dict(load_arguments or {})
    torch.manual_seed(7)
    full = cls.from_pretrained(folder, dtype=dtype, **more)
    torch.manual_seed(7)
    with counted_bytes() as counts:
        sharded = deepspeed_autotp.from_pretrained(
            cls, folder, tp_size=dist.get_world_size(), dtype=dtype, load_arguments=more
        )
    held = sum(p.numel() for p in {id(p): p for p in sharded.parameters()}.values())
    found = differences(sharded, full)
    deepspeed_autotp.destroy(sharded)
    return found, counts[-1] / (4 * held)


def loads_all(folders: Mapping[str, str]) -> dict[str, tuple[list[str], float]]:
    return {name: loads(folder) for name, folder in folders.items()}


def trains(folder: str) -> dict[str, float]:
    """A loop in float64 against one process."""
    from transformers import LlamaForCausalLM

    alone = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).train()
    sharded = deepspeed_autotp.from_pretrained(
        LlamaForCausalLM, folder, tp_size=dist.get_world_size(), dtype=torch.float64
    ).train()
    curves = (train_unsharded(alone), train_sharded(sharded))
    return apart(alone, sharded, curves)


def refuses(
    folder: str,
    load_arguments: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> str:
    from transformers import LlamaForCausalLM

    def load() -> None:
        deepspeed_autotp.from_pretrained(
            LlamaForCausalLM,
            folder,
            **{"tp_size": dist.get_world_size(), "load_arguments": load_arguments, **(more or {})},
        )

    return raised_error(load)


def refuses_own(folders: list[str]) -> str:
    """Each rank has a folder of its own, as on storage that is not shared."""
    return refuses(folders[dist.get_rank()])


def misses(folder: str) -> tuple[list[str], list[str]]:
    """A head of three labels that the checkpoint does not have: what differs from one process with
    the RNG state of TP rank 0, though this rank has another, and which weights were drawn."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(7)
    asked: dict[str, Any] = {"output_loading_info": True, "num_labels": 3}
    full, expected = LlamaForSequenceClassification.from_pretrained(folder, **asked)
    for size in (1, dist.get_world_size()):
        torch.manual_seed(7 + dist.get_rank())
        with logged_warnings() as texts:
            loaded: Any = deepspeed_autotp.from_pretrained(
                LlamaForSequenceClassification, folder, tp_size=size, **asked
            )
        sharded, info = loaded
        assert info == expected and info["missing_keys"] == {"score.weight"}
    return differences(sharded, full), [text for text in texts if "different weights" in text]


def base_into_head(folder: str) -> tuple[list[str], bool]:
    """The checkpoint of a base model, whose names lack the prefix, loaded into one with a head:
    what differs, and whether the head is sharded."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(7)
    full = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(7)
    sharded = deepspeed_autotp.from_pretrained(
        LlamaForCausalLM, folder, tp_size=dist.get_world_size()
    )
    head = sharded.get_submodule("lm_head").get_parameter("weight")
    return differences(sharded, full), head.shape != full.lm_head.weight.shape


def within_context(folder: str) -> tuple[list[str], list[str], bool, str]:
    """``from_pretrained`` of an AutoModel class in the context, and after it; its error for a TP
    size that does not fit."""
    from transformers import AutoModelForCausalLM

    def load_over(tp_size: int) -> Any:
        with deepspeed_autotp.sharded_init(tp_size=tp_size):
            return AutoModelForCausalLM.from_pretrained(folder)

    full = AutoModelForCausalLM.from_pretrained(folder)
    sharded = load_over(dist.get_world_size())
    after = AutoModelForCausalLM.from_pretrained(folder)
    same = all(torch.equal(t, after.state_dict()[n]) for n, t in full.state_dict().items())
    is_plain = "tensor_parallel" not in vars(after)
    differing, error = differences(sharded, full), raised_error(lambda: load_over(3))
    return differing, [] if same else ["after"], is_plain and not full.training, error
