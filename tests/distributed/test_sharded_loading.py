# SPDX-License-Identifier: Apache-2.0
"""Each rank loads its own shards, and the model has the values of ``from_pretrained``."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import sharded_loading_ranks as ranks
from tests.support.large_differences import large_differences
from tests.support.same_error import same_error
from tests.support.worker_pool import Pool

FAMILIES = (
    "llama",
    "llama, tied",
    "qwen3_moe",  # per-expert weights, which are stacked and concatenated
    "phi3",
    "gpt2",
    "bloom",
    "falcon",
    "t5",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "hrm_text",  # weights that are chunked
    "inkling2_text",  # weights that are permuted, and so read in full
    "bert",  # the bias of whose head is given other data while it is tied
    "zaya",  # of which transformers changes an element
)
READ_IN_FULL = ("inkling2_text",)


@pytest.fixture(scope="module")
def folders(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("checkpoints")
    made = {name: str(root / name) for name in FAMILIES}
    pool.run(ranks.write_all, made, ranks=1)
    return made


def write(pool: Pool, name: str, folder: Path, **options: Any) -> None:
    pool.run(ranks.write, name, str(folder), options, ranks=1)


# Three ranks have shards of equal and of other widths.
@pytest.mark.parametrize(
    "tp", [pytest.param(2, marks=pytest.mark.long), 3, pytest.param(4, marks=pytest.mark.long)]
)
def test_gathered_weights_are_bitwise_those_of_transformers(
    pool: Pool, folders: dict[str, str], tp: int
) -> None:
    for found in pool.run(ranks.loads_all, folders, ranks=tp, timeout=100):
        assert {name: differing for name, (differing, _) in found.items() if differing} == {}
        most = {n: read for n, (_, read) in found.items() if n not in READ_IN_FULL}
        assert {name: read for name, read in most.items() if read > 1.1} == {}


def test_training_equals_one_process(pool: Pool, folders: dict[str, str]) -> None:
    for found in pool.run(ranks.trains, folders["llama, tied"]):
        assert large_differences(found) == {}


def test_many_files_and_pickled_ones_are_read(pool: Pool, tmp_path: Path) -> None:
    many, pickled = tmp_path / "many", tmp_path / "pickled"
    write(pool, "qwen3_moe", many, max_shard_size="60KB")
    assert len(list(many.glob("*.safetensors"))) > 2
    write(pool, "llama", pickled)
    pool.run(ranks.pickle_weights, str(pickled), ranks=1)
    for found in pool.run(ranks.loads_all, {"many": str(many), "pickled": str(pickled)}):
        assert {name: differing for name, (differing, _) in found.items() if differing} == {}


@pytest.mark.parametrize("how", ["equal", "different", "under the other name"])
def test_a_tied_pair_of_which_both_or_the_other_are_there(
    pool: Pool, tmp_path: Path, how: str
) -> None:
    from safetensors.torch import load_file, save_file

    write(pool, "llama, tied", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone() + (how == "different")
    if how == "under the other name":
        del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for differing, _ in pool.run(ranks.loads, str(tmp_path)):
        assert differing == []


def test_what_is_missing_is_drawn_alike_on_all_ranks(pool: Pool, tmp_path: Path) -> None:
    write(pool, "llama", tmp_path / "causal")
    found = pool.run(ranks.misses, str(tmp_path / "causal"))
    assert [differing for differing, _ in found] == [[], []]
    assert [len(warnings) for _, warnings in found] == [1, 0]
    write(pool, "llama, base", tmp_path / "base")
    assert pool.run(ranks.base_into_head, str(tmp_path / "base")) == [([], True)] * 2


def test_within_the_context_every_from_pretrained_loads_shards(
    pool: Pool, folders: dict[str, str]
) -> None:
    found = pool.run(ranks.within_context, folders["llama"])
    assert [each[:3] for each in found] == [([], [], True)] * 2
    text = same_error([error for *_, error in found])
    assert text.startswith("ValueError: sharded_init: the TP size is 3, which does not divide")


def _header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def _first(header: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = header["model.norm.weight"]
    return entry


def _config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _truncate(file: Path, by: int = 100) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - by)


def _adapter_of(folder: Path, base: Path) -> None:
    """Leave an adapter of the model, which is moved to ``base``, in ``folder``."""
    if base != folder:
        shutil.copytree(folder, base)
        (folder / "config.json").unlink()
    text = json.dumps({"base_model_name_or_path": str(base)})
    (folder / "adapter_config.json").write_text(text)


WEIGHTS = "model.safetensors"
# What is done to a checkpoint, and what the error says.
DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: _truncate(f / WEIGHTS), "it is truncated"),
    "longer": (lambda f: _truncate(f / WEIGHTS, by=-8), "speaks of"),
    "no header": (lambda f: (f / WEIGHTS).write_bytes(b"\xff" * 64), "its header would have"),
    "empty": (lambda f: (f / WEIGHTS).write_bytes(b""), "its header would have"),
    "no JSON": (
        lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 3) + b"{a}"),
        "its header is not JSON",
    ),
    "shape lies": (
        lambda f: _header(f / WEIGHTS, lambda h: _first(h).update(shape=[63])),
        "model.norm.weight of shape [63] in F32 has 252 bytes, but its header gives it 256",
    ),
    "place lies": (
        lambda f: _header(f / WEIGHTS, lambda h: _first(h).update(data_offsets=[0, 256])),
        "begins at byte",
    ),
    "type lies": (
        lambda f: _header(f / WEIGHTS, lambda h: _first(h).update(dtype="F31")),
        "the data type 'F31', which is not known",
    ),
    "negative": (
        lambda f: _header(f / WEIGHTS, lambda h: _first(h).update(shape=[-1])),
        "does not say the shape and the place",
    ),
    "other sizes": (
        lambda f: _config(f, intermediate_size=128),
        "down_proj.weight has the shape [64, 112]",
    ),
    "another model": (
        lambda f: _header(
            f / WEIGHTS,
            lambda h: [h.update({f"x.{n}": h.pop(n)}) for n in list(h) if n[0] != "_"],
        ),
        "it is the checkpoint of another model",
    ),
    "quantised": (
        lambda f: _config(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config: got 'gptq'",
    ),
    "missing": (lambda f: (f / WEIGHTS).unlink(), "model.safetensors"),
    "adapter": (
        lambda f: _adapter_of(f, f / "base"),
        "has an adapter (adapter_config.json), which is not loaded as shards together with its "
        "model; load the base model",
    ),
    "adapter within": (lambda f: _adapter_of(f, f), "move its files into a folder of their own"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_one_error_on_every_rank(
    pool: Pool, tmp_path: Path, damage: str
) -> None:
    write(pool, "llama, small", tmp_path)
    change, expected = DAMAGED[damage]
    change(tmp_path)
    text = same_error(pool.run(ranks.refuses, str(tmp_path)))
    assert text.startswith("ValueError: ") and expected in text


def test_a_file_or_a_tensor_that_the_index_names_is_missing(pool: Pool, tmp_path: Path) -> None:
    write(pool, "llama", tmp_path, max_shard_size="60KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    kept = tmp_path / "kept"
    shutil.move(first, kept)
    text = same_error(pool.run(ranks.refuses, str(tmp_path)))
    assert text.startswith("ValueError: ") and first.name in text
    shutil.move(kept, first)
    index = next(tmp_path.glob("*.index.json"))
    listed = json.loads(index.read_text())
    listed["weight_map"]["model.norm.other"] = second.name
    index.write_text(json.dumps(listed))
    text = same_error(pool.run(ranks.refuses, str(tmp_path)))
    assert "names 1 tensors that its files do not have (model.norm.other)" in text


def test_ranks_with_other_files_are_told_so(pool: Pool, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(pool, "llama" if name == "a" else "llama, tied", tmp_path / name)
    text = same_error(pool.run(ranks.refuses_own, [str(tmp_path / name) for name in "ab"]))
    assert text.startswith("ValueError: ") and "checkpoint " in text


@pytest.mark.parametrize(
    ("arguments", "more", "expected"),
    [
        ({"device_map": "auto"}, {}, "device_map does not go with"),
        ({}, {"device_map": "auto"}, "device_map does not go with"),
        ({}, {"config": [1]}, "from_pretrained: config: got list, expected a dictionary"),
        ({}, {"numlabels": 3}, "unexpected keyword argument 'numlabels'"),
        ({"state_dict": {}}, {}, "state_dict: got weights in memory"),
        (
            {},
            {"tp_size": 3},
            "from_pretrained: the TP size is 3, which does not divide the 2 ranks",
        ),
        ({}, {"device": "nowhere"}, "from_pretrained: device: got"),
        ({}, {"config": {"self_check": True}}, "asks for a self-check"),
    ],
)
def test_what_does_not_go_together_is_refused(
    pool: Pool,
    folders: dict[str, str],
    arguments: dict[str, Any],
    more: dict[str, Any],
    expected: str,
) -> None:
    text = same_error(pool.run(ranks.refuses, folders["llama"], arguments, more))
    assert text.startswith("ValueError: ") and expected in text
