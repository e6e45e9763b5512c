# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are made to read or write elsewhere, to run code, or to fill the memory."""

import json
import struct
import time
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed_autotp.checkpoint.merge import merge
from deepspeed_autotp.checkpoint.metadata import NAME
from deepspeed_autotp.checkpoint.rank_files import CheckpointFiles
from deepspeed_autotp.loading.checkpoint_files import check_index, checkpoint_tensors
from deepspeed_autotp.loading.safetensors_header import stored_tensors
from tests.support.autotp_command import command
from tests.support.hostile_values import nested
from tests.support.one_error import check_error, obeyed
from tests.support.saved_states import metadata, model_states, write_states

pytestmark = pytest.mark.usefixtures("deepspeed_imported")

FIRST = "mp_rank_00_model_states.pt"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / "global_step3"
    write_states(folder)
    (folder.parent / "latest").write_text(folder.name)
    return folder


COMMANDS = ("inspect", "merge", "reshard")


def refusals(path: Path, names: tuple[str, ...] = COMMANDS) -> list[str]:
    """What the commands say, which write nothing."""
    out = path.parent / "out"
    said = []
    for name in names:
        more = {"inspect": ["--json"], "merge": [str(out)], "reshard": [str(out), "--tp", "1"]}
        status, text, errors = command(name, str(path), *more[name])
        assert status in (1, 2), name
        assert not out.exists()
        said.append(errors or json.loads(text)["problem"])
        assert not obeyed(said[-1])
        assert len(said[-1]) < 10_000 and "Traceback" not in said[-1]
    return said


@pytest.mark.parametrize(
    "name", ["../elsewhere", "..", "a/../../x", "/etc", "", ".", "\x1b[2J", "x" * 5000, "a\nb"]
)
def test_the_file_latest_names_a_folder_beside_itself(saved: Path, name: str) -> None:
    (saved.parent / "latest").write_text(name)
    for text in refusals(saved.parent):
        assert "expected the name of a folder beside it" in text


NOTES: dict[str, Callable[[dict[str, Any]], object]] = {
    "nested": lambda note: note.update(recipe={"a": nested(5000)}),
    "a number for text": lambda note: note.update(layout=3),
    "many ranks": lambda note: note.update(ranks=10**9),
    "ranks as text": lambda note: note.update(ranks="2"),
    "a float": lambda note: note.update(ranks=2.0),
    "another version": lambda note: note.update(version=[4]),
    "a negative version": lambda note: note.update(version=-1),
    "no runs": lambda note: note["shardings"][0].update(runs=[[], []]),
    "runs outside": lambda note: note["shardings"][0]["runs"][0].__setitem__(1, 10**6),
    "a hole": lambda note: note["shardings"][0]["runs"][0].__setitem__(0, 1),
    "negative runs": lambda note: note["shardings"][0]["runs"][0].__setitem__(0, -64),
    "large runs": lambda note: note["shardings"][0]["runs"][0].__setitem__(1, 2**70),
    "another view": lambda note: note["shardings"][0].update(view=[1, 2**62, 4]),
    "an empty view": lambda note: note["shardings"][0].update(view=[0, 0, 0]),
    "a far dimension": lambda note: note["shardings"][0].update(dim=7),
    "a negative sharding": lambda note: note["parameters"][0].__setitem__(2, -1),
    "a far sharding": lambda note: note["parameters"][0].__setitem__(2, 99),
    "a large shape": lambda note: note["parameters"][0].__setitem__(1, [2**40, 2**40]),
    "a tie to nobody": lambda note: note["parameters"][-1].__setitem__(3, "nobody"),
    "a tie in a circle": lambda note: note["parameters"][-1].__setitem__(3, "lm_head.weight"),
    "a name twice": lambda note: note["parameters"].append(note["parameters"][0]),
    "a long name": lambda note: note["parameters"][0].__setitem__(0, "x" * 10**6),
    "groups of others": lambda note: note.update(groups=[["nobody"]]),
    "groups of numbers": lambda note: note.update(groups=[[1]]),
}


@pytest.mark.parametrize("what", NOTES)
def test_a_note_that_is_no_layout_is_refused(saved: Path, what: str) -> None:
    note = metadata(saved)
    NOTES[what](note)
    (saved / NAME).write_text(_dumped(note))
    for text in refusals(saved):
        assert "tensor_parallel.json' cannot be read" in text


def _dumped(note: Any) -> str:
    """Also of what the library does not write."""
    try:
        return json.dumps(note)
    except RecursionError:
        return '{"a":' * 5000 + "1" + "}" * 5000


def test_a_shard_of_another_size_than_the_note_says_is_refused(saved: Path) -> None:
    states = model_states(1)
    name = "model.layers.0.mlp.up_proj.weight"
    states["module"][name] = torch.zeros(256, 64)  # all of it, where half is expected
    torch.save(states, saved / "mp_rank_01_model_states.pt")
    status, _, errors = command("merge", str(saved), str(saved.parent / "out"))
    assert status == 2
    assert f"'{name}' has a shard of 16384 elements on TP rank 1, expected 8192" in errors
    assert not (saved.parent / "out").exists()


def _laughs() -> Any:
    value: Any = ["ha"] * 2
    for _ in range(40):
        value = [value, value]
    return value


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "without weights": (lambda s: s.pop("module"), "KeyError: 'module'"),
    "a list of weights": (lambda s: s.update(module=[1]), "does not hold what save_checkpoint"),
    "many replicas": (lambda s: s.update(dp_world_size=10**12), "expected an integer of 1 to"),
    "replicas as text": (lambda s: s.update(dp_world_size="1"), "dp_world_size: '1' (str)"),
    "no optimizer": (lambda s: s.update(optimizer=None), "states are not known by parameter"),
    "another optimizer": (lambda s: s.update(optimizer={"state": 3}), "does not hold what"),
    "a tensor larger than the file": (
        lambda s: s["module"].update({"model.norm": torch.ones(1).expand(2**40)}),
        "holds a tensor of shape [1099511627776], which has more",
    ),
    "a tensor without values": (
        lambda s: s["module"].update({"model.norm": torch.ones(4, device="meta")}),
        "expected one with all of its values",
    ),
    "a sparse tensor": (
        lambda s: s["module"].update({"model.norm": torch.eye(4).to_sparse()}),
        "expected one with all of its values",
    ),
    "lists that multiply": (lambda s: s.update(global_steps=_laughs()), "or itself"),
    "names as numbers": (lambda s: s["module"].update({7: torch.ones(1)}), "7"),
    "control characters": (
        lambda s: s["module"].update({"\x1b[2J\u202e": torch.ones(1)}),
        r"\x1b[2J\u202e",
    ),
}


# What does not touch what is wrong needs not see it.
ASKED = {
    "another optimizer": ("inspect", "reshard"),  # merging takes the weights alone
    "no optimizer": ("inspect",),
    "lists that multiply": ("inspect",),
    "names as numbers": ("merge", "reshard"),
    "control characters": ("merge", "reshard"),
}


@pytest.mark.parametrize("what", STATES)
def test_a_file_that_holds_something_else_is_refused(saved: Path, what: str) -> None:
    change, words = STATES[what]
    for rank in range(2):
        states = model_states(rank)
        change(states)
        torch.save(states, saved / f"mp_rank_{rank:02d}_model_states.pt")
    start = time.process_time()
    for text in refusals(saved, ASKED.get(what, COMMANDS)):
        assert words in text
    assert time.process_time() - start < 30


def _compressed(file: Path) -> None:
    """The same records, one of them of 10 MB more in some kilobytes."""
    with zipfile.ZipFile(file) as opened:
        records = {name: opened.read(name) for name in opened.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, data in records.items():
            opened.writestr(name, data + b"\0" * (10**7 if name.endswith("data.pkl") else 0))


def test_an_archive_that_would_be_unpacked_is_refused(saved: Path, tmp_path: Path) -> None:
    _compressed(saved / FIRST)
    assert (saved / FIRST).stat().st_size < 10**6
    for text in refusals(saved):
        assert "expected a file of torch.save, which is not compressed" in text
    weights = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1000)}, weights)
    _compressed(weights)
    with pytest.raises(ValueError, match="which is not compressed"):
        checkpoint_tensors([str(weights)], lambda _: pytest.fail("it was loaded"))


def test_what_is_no_mapping_of_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x\.bin holds list, expected tensors by their names"):
        checkpoint_tensors(["x.bin"], lambda _: [1])  # type: ignore[arg-type, return-value]
    assert checkpoint_tensors(["x.bin"], lambda _: {3: torch.ones(1)}) == {}  # type: ignore[dict-item]


def test_merging_writes_no_file_that_a_checkpoint_names(saved: Path, tmp_path: Path) -> None:
    """Files of merged weights are named by their number, whatever the weights are called."""
    note = metadata(saved)
    name = "../../outside"
    note["parameters"][-2][0] = name
    note["groups"] = None
    for rank in range(2):
        states = model_states(rank)
        module = states["module"]
        module[name] = module.pop("model.layers.0.mlp.down_proj.weight")
        torch.save(states, saved / f"mp_rank_{rank:02d}_model_states.pt")
    (saved / NAME).write_text(json.dumps(note))
    before = set(tmp_path.rglob("*"))
    merge(
        saved, tmp_path / "merged", config=None, master=False, max_file_bytes=1, jobs=1,
        progress=_silent,
    )  # fmt: skip
    made = set(tmp_path.rglob("*")) - before
    assert all(path.parent == tmp_path / "merged" for path in made - {tmp_path / "merged"})
    assert all(path.name.startswith(("model", "config")) for path in made - {tmp_path / "merged"})


def _silent(total: int, title: str, unit: str) -> AbstractContextManager[Any]:
    @contextmanager
    def nothing() -> Any:
        yield lambda _: None

    return nothing()


@pytest.mark.parametrize("file", ["../x.bin", "/etc/passwd", "a/../../b", "", ".", "a\0b"])
def test_an_index_names_files_in_its_folder(tmp_path: Path, file: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": file}}))
    with pytest.raises(ValueError, match="expected one in its own folder") as caught:
        check_index(index)
    check_error(caught.value)


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "[" * 10**5, '{"weight_map": []}', '{"weight_map": {"a": {}}, "metadata": {}}',
     '{"weight_map": {"a": "b", "a": "c"}, "metadata": {}}', '{"weight_map": {"a": "\\ud800"}}'],
)  # fmt: skip
def test_what_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ValueError, match="is no index of a checkpoint: ") as caught:
        check_index(index)
    check_error(caught.value)


def _file_of(header: str, *, length: int | None = None, data: bytes = b"") -> bytes:
    size = len(header.encode()) if length is None else length
    return struct.pack("<Q", size) + header.encode() + data


def _entry(shape: list[int], offsets: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HEADERS: dict[str, tuple[bytes, str]] = {
    "a length of 1 GB": (_file_of("{}", length=2**30), "its header would have 1073741824 bytes"),
    "a length of 16 EB": (_file_of("{}", length=2**64 - 1), "its header would have"),
    "nested": (_file_of("[" * 10**5), "nested more than 100 deep"),
    "a name twice": (_file_of('{"a": 1, "a": 2}'), "keys given more than once: 'a'"),
    "half a character": (_file_of('{"\\ud800": 1}'), "lone surrogate"),
    "a long name": (_file_of(json.dumps({"x" * 10**6: 1})), "a name in its header has 1000000"),
    "overlapping": (
        _file_of(json.dumps({"a": _entry([2], [0, 8]), "b": _entry([2], [4, 12])}), data=b"x" * 12),
        "b begins at byte",
    ),
    "outside": (
        _file_of(json.dumps({"a": _entry([2], [8, 16])}), data=b"x" * 8),
        "a begins at byte",
    ),
    "far outside": (
        _file_of(json.dumps({"a": _entry([2], [2**64, 2**64 + 8])}), data=b"x" * 8),
        "a begins at byte",
    ),
    "the wrong way": (
        _file_of(json.dumps({"a": _entry([2], [8, 0])}), data=b"x" * 8),
        "a of shape [2] in F32 has 8 bytes",
    ),
    "a negative size": (_file_of(json.dumps({"a": _entry([-1, -2], [0, 8])})), "does not say"),
    "a product of 0": (
        _file_of(json.dumps({"a": _entry([2**62, 2**62, 0], [0, 0])})),
        "a shape of more elements than there can be",
    ),
    "a product beyond 64 bits": (
        _file_of(json.dumps({"a": _entry([2**32, 2**32], [0, 0])})),
        "a shape of more elements than there can be",
    ),
    "many dimensions": (
        _file_of(json.dumps({"a": _entry([1] * 10**5, [0, 4])}), data=b"x" * 4),
        "a shape of more elements than there can be",
    ),
    "a size that is true": (
        _file_of('{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}'),
        "does not say the shape",
    ),
    "an unknown type": (
        _file_of(json.dumps({"a": _entry([1], [0, 4], "\x1b[2J")}), data=b"x" * 4),
        r"the data type '\x1b[2J', which is not known",
    ),
    "control characters": (_file_of(json.dumps({"\x1b[2J": 1})), r"the place of \x1b[2J"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path: Path, what: str) -> None:
    data, words = HEADERS[what]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    start = time.process_time()
    with pytest.raises(ValueError, match="is no whole safetensors file") as caught:
        stored_tensors(file)
    assert words in check_error(caught.value)
    assert time.process_time() - start < 1


def test_files_are_looked_for_in_the_folder_alone(saved: Path) -> None:
    """Their names are made of numbers; nothing in a file names another one."""
    files = CheckpointFiles(saved)
    names = [files.model_name(rank, replica) for rank in (0, 7) for replica in (0, 3)]
    names += [files.optimizer_name(rank, replica) for rank in (0, 7) for replica in (0, 3)]
    assert all(Path(name).name == name for name in names)
