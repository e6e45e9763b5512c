# SPDX-License-Identifier: Apache-2.0
"""What each of eight ranks reads of a Llama of 70 billion parameters, from sparse files."""

import json
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepspeed_autotp._core import Plan
from deepspeed_autotp.config.training_config import TPTrainingConfig
from deepspeed_autotp.interop.transformers_loading import load_pickled, traced_loading
from deepspeed_autotp.loading.checkpoint_files import check_index, checkpoint_tensors
from deepspeed_autotp.loading.file_weights import FileWeights, separate_weights
from deepspeed_autotp.loading.read_plan import ReadPlan, Target, are_equal
from deepspeed_autotp.loading.slices import own_slices
from deepspeed_autotp.loading.traced_tensor import traced
from deepspeed_autotp.planning.model_description import describe
from deepspeed_autotp.planning.planner import make_plan

RANKS = 8
FILES = 29
SIZES: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@pytest.fixture(scope="module")
def checkpoint(deepspeed_imported: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that have their sizes, and no bytes on the disk."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(**SIZES, tie_word_embeddings=False, dtype="bfloat16")
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in LlamaForCausalLM(config).state_dict().items()}
    names = list(shapes)
    count = -(-len(names) // FILES)
    where = {}
    for number in range(FILES):
        file = folder / f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        own = {name: shapes[name] for name in names[number * count : (number + 1) * count]}
        where |= dict.fromkeys(own, file.name)
        _write_sparse(file, own)
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _write_sparse(file: Path, shapes: Mapping[str, torch.Size]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(struct.pack("<Q", len(text)) + text)
        opened.truncate(8 + len(text) + end)


def _loaded(folder: Path) -> tuple[nn.Module, FileWeights]:
    from transformers import LlamaForCausalLM

    def tensors(files: Any) -> Mapping[str, Tensor]:
        stored = checkpoint_tensors(files, load_pickled)
        return {name: traced(each) for name, each in stored.items()}

    with traced_loading(tensors, are_equal, check_index):
        model = LlamaForCausalLM.from_pretrained(folder)
    return model, separate_weights(model)


def _targets(
    plan: Plan, parameters: tuple[nn.Parameter, ...], weights: FileWeights, rank: int
) -> Iterator[Target]:
    for parameter, entry in zip(parameters, plan.entries, strict=True):
        origin = weights.origin(parameter)
        assert origin is not None
        shape = entry.local_shape(rank)
        for piece in own_slices(origin, entry, rank, shape, parameter.dtype):
            yield piece, parameter


def test_each_rank_reads_its_share_alone_and_knows_so_in_seconds(checkpoint: Path) -> None:
    model, weights = _loaded(checkpoint)
    description = describe(model)
    plan = make_plan(description, TPTrainingConfig(), ranks=RANKS)
    total = sum(2 * p.numel() for p in description.parameters)
    held = sum(
        2 * p.numel()
        for p, e in zip(description.parameters, plan.entries, strict=True)
        if not e.is_sharded
    )
    assert total > 140e9
    plans, seconds = [], []
    for rank in range(RANKS):
        start = time.process_time()
        plans.append(ReadPlan(_targets(plan, description.parameters, weights, rank)))
        seconds.append(time.process_time() - start)
    assert max(seconds) < 2
    shares = [sum(row.local_bytes[rank] for row in plan.table()) for rank in range(RANKS)]
    assert [each.bytes_to_read for each in plans] == shares
    assert sum(shares) == total + (RANKS - 1) * held
    assert max(shares) <= 1.001 * total / RANKS
    for each in plans:
        places = [(path, begin) for path, begin, _ in each.spans]
        assert places == sorted(places) and len({path for path, _ in places}) == FILES
