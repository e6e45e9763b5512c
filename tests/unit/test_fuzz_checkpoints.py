# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of anybody's are read to the right values, or one ValueError says what is wrong."""

import json
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspeed_autotp.checkpoint.layout import Layout, resharded
from deepspeed_autotp.checkpoint.merge import merge
from deepspeed_autotp.checkpoint.metadata import NAME, read_metadata
from deepspeed_autotp.checkpoint.reshard_files import reshard
from deepspeed_autotp.checkpoint.summary import summarize
from deepspeed_autotp.loading.checkpoint_files import check_index, checkpoint_tensors
from deepspeed_autotp.loading.read_plan import ReadPlan
from deepspeed_autotp.loading.slices import Slice, full_box
from deepspeed_autotp.loading.stored_tensor import FileTensor
from deepspeed_autotp.native.file_reads import OpenFiles
from tests.support.fuzzing import fuzzed
from tests.support.hostile_values import mutated
from tests.support.one_error import check_error
from tests.support.random_bits import bits
from tests.support.saved_states import full_weights, metadata, model_states, write_states

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("deepspeed_imported")]

FIRST = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "global_step3"
    write_states(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    tensors = {
        "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
        "b": torch.arange(6, dtype=torch.int16),
        "empty": torch.empty(0, 5),
        "scalar": torch.tensor(7.5),
    }
    save_file(tensors, file, {"format": "pt"})
    return file


def dumped(value: Any) -> str | None:
    try:
        return json.dumps(value)
    except ValueError:  # an integer of thousands of digits
        return None


@contextmanager
def one_error() -> Iterator[None]:
    """Within it nothing is raised but an error for people."""
    try:
        yield
    except (ValueError, OSError) as error:
        assert isinstance(error, OSError) or check_error(error)


def read_values(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    made = {}
    for name, stored in tensors.items():
        assert isinstance(stored, FileTensor)
        made[name] = torch.empty(stored.shape, dtype=stored.dtype)
    targets = [
        (Slice(stored, full_box(stored.shape), made[name]), made[name])
        for name, stored in tensors.items()
    ]
    with OpenFiles() as files:
        ReadPlan(targets).run(files, lambda _: None)
    return made


def check_like_safetensors(file: Path) -> None:
    """What the library takes is read to its values, or refused."""
    try:
        expected = load_file(file)
    except (safetensors.SafetensorError, ValueError, OverflowError, MemoryError, KeyError):
        expected = None
    try:
        found = read_values(checkpoint_tensors([str(file)], lambda _: {}))
    except ValueError as error:
        check_error(error)
        return
    if expected is None:
        return  # the library wants more than that the header fits the file
    assert found.keys() == expected.keys()
    assert all(torch.equal(bits(found[name]), bits(expected[name])) for name in found)


@fuzzed(80)
@given(st.data())
def test_a_header_is_read_as_the_library_reads_it(weights: Path, data: st.DataObject) -> None:
    raw = weights.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    text = dumped(data.draw(mutated(header)))
    if text is None:
        return
    given_length = len(text.encode()) + data.draw(st.sampled_from((0, 0, 0, 1, -1, 2**40, 2**63)))
    file = weights.with_name("changed.safetensors")
    file.write_bytes(struct.pack("<Q", max(given_length, 0)) + text.encode() + raw[8 + length :])
    check_like_safetensors(file)


@fuzzed(80)
@given(st.data())
def test_bytes_are_read_as_the_library_reads_them(weights: Path, data: st.DataObject) -> None:
    raw = bytearray(weights.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    file = weights.with_name("changed.safetensors")
    file.write_bytes(raw[:cut])
    check_like_safetensors(file)


@fuzzed(50)
@given(
    mutated({"metadata": {"total_size": 4}, "weight_map": {"a": "x.safetensors", "b": "y/z.bin"}})
)
def test_an_index_names_files_in_its_folder_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, content: Any
) -> None:
    text = dumped(content)
    if text is None:
        return
    index = tmp_path_factory.getbasetemp() / "model.safetensors.index.json"
    index.write_text(text)
    with one_error():
        for file in check_index(index).values():
            assert (index.parent / file).resolve().is_relative_to(index.parent.resolve())


def check_layout(layout: Layout) -> None:
    """Shards of the sizes that it says make a full tensor of the size that it says."""
    for parameter in layout.parameters.values():
        if parameter.numel(0) > 10_000 or layout.ranks > 8:
            continue
        shards = [torch.zeros(parameter.local_shape(rank)) for rank in range(layout.ranks)]
        full = type(parameter)(parameter.name, parameter.shape, None, None)
        made = resharded(
            [lambda shard=shard: shard for shard in shards],  # type: ignore[misc]
            old=parameter,
            new=full,
            rank=0,
        )
        assert made.shape == parameter.shape


@fuzzed(80)
@given(st.data())
def test_the_note_of_a_checkpoint_is_a_layout_or_refused(saved: Path, data: st.DataObject) -> None:
    text = dumped(data.draw(mutated(metadata(saved))))
    if text is None:
        return
    folder = saved.parent / "noted"
    folder.mkdir(exist_ok=True)
    (folder / NAME).write_text(text)
    with one_error():
        read = read_metadata(folder)
        assert read is not None
        if read.layout is not None:
            check_layout(read.layout)


def use_all(folder: Path, out: Path) -> None:
    """What the commands do with a checkpoint: each does its work, or raises an error for people."""
    with one_error():
        json.loads(summarize(folder).json())
    for command in ("merge", "reshard"):
        with one_error():
            if command == "merge":
                merge(
                    folder, out, config=None, master=False, max_file_bytes=10**9, jobs=1,
                    progress=silent,
                )  # fmt: skip
            else:
                reshard(folder, out, tp=1, replicas=None, config=None, jobs=1, progress=silent)
        shutil.rmtree(out, ignore_errors=True)


@contextmanager
def silent(total: int, title: str, unit: str) -> Iterator[Any]:
    yield lambda _: None


def changed_copy(saved: Path) -> Path:
    folder = saved.parent / "changed" / saved.name
    if not folder.exists():
        shutil.copytree(saved, folder)
    return folder


@fuzzed(20)
@given(st.data())
def test_the_note_beside_files_is_used_or_refused(saved: Path, data: st.DataObject) -> None:
    text = dumped(data.draw(mutated(metadata(saved))))
    if text is None:
        return
    folder = changed_copy(saved)
    shutil.copy(saved / FIRST, folder / FIRST)
    (folder / NAME).write_text(text)
    use_all(folder, folder.parent / "out")


@fuzzed(20)
@given(st.data())
def test_states_of_anybody_are_used_or_refused(saved: Path, data: st.DataObject) -> None:
    folder = changed_copy(saved)
    shutil.copy(saved / NAME, folder / NAME)
    states = data.draw(mutated(dict(model_states(0))))
    try:
        torch.save(states, folder / FIRST)
    except ValueError:
        return
    use_all(folder, folder.parent / "out")


@fuzzed(12)
@given(st.data())
def test_bytes_of_a_file_of_states_are_used_or_refused(saved: Path, data: st.DataObject) -> None:
    folder = changed_copy(saved)
    shutil.copy(saved / NAME, folder / NAME)
    raw = bytearray((saved / FIRST).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(
            st.one_of(st.integers(0, len(raw) - 1), st.integers(0, 3000), st.integers(1, 3000))
        )
        raw[place % len(raw)] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from((None, None, None, len(raw) // 2, len(raw) - 30)))
    (folder / FIRST).write_bytes(raw[:cut])
    use_all(folder, folder.parent / "out")


def test_the_checkpoint_itself_is_merged_to_its_weights(saved: Path, tmp_path: Path) -> None:
    """What the others change is read as it was written."""
    out = tmp_path / "merged"
    merge(saved, out, config=None, master=False, max_file_bytes=10**9, jobs=1, progress=silent)
    found, expected = load_file(out / "model.safetensors"), full_weights()
    expected.pop("lm_head.weight")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    reshard(saved, tmp_path / "one", tp=1, replicas=None, config=None, jobs=1, progress=silent)
    summary = summarize(tmp_path / "one")
    assert (summary.problem, summary.tp_size, summary.steps) == (None, 1, 3)
