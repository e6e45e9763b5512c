# SPDX-License-Identifier: Apache-2.0
"""A save that is killed at any file operation leaves the old checkpoint or the new one, whole."""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deepspeed_autotp.checkpoint.atomic_folder import (
    AtomicFolder,
    locked,
    replaced,
    write_atomically,
)
from deepspeed_autotp.checkpoint.new_folder import new_folder
from deepspeed_autotp.checkpoint.pretrained_folder import INDEX, SINGLE, Index, commit_weights

# What Python reports before it changes a file, a folder or a name.
EVENTS = ("os.", "shutil.", "open", "tempfile.", "ctypes.call_function")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the wait for the disk: a killed process loses nothing that it has written."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def save(folder: Path, text: str, *, files: int, config: str = "{}") -> None:
    """A checkpoint of which every file holds ``text``."""
    names = (
        [SINGLE]
        if files == 1
        else [f"model-{i:05d}-of-{files:05d}.safetensors" for i in range(files)]
    )
    staged = AtomicFolder(folder)
    try:
        for name in names:
            (staged.staging / name).write_text(text)
        (staged.staging / "config.json").write_text(config)
        commit_weights(staged, Index(1, 1, {name: [f"tensor of {name}"] for name in names}))
    finally:
        staged.close()


def loaded(folder: Path) -> tuple[str, set[str]]:
    """The configuration and the texts of the files that a loader of transformers would read."""
    names = [SINGLE]
    if not (folder / SINGLE).exists():
        names = list(json.loads((folder / INDEX).read_text())["weight_map"].values())
    return (folder / "config.json").read_text(), {(folder / n).read_text() for n in names}


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a process that kills itself at its ``number``-th operation on files; whether
    it came so far."""
    child = os.fork()
    if child == 0:
        try:
            sys.addaudithook(_killer(number))
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _killer(number: int) -> Callable[[str, object], None]:
    left = number

    def count(event: str, _: object) -> None:
        nonlocal left
        if event.startswith(EVENTS):
            left -= 1
            if left == -1:  # the signal is an event, too
                os.kill(os.getpid(), signal.SIGKILL)

    return count


@pytest.mark.parametrize(
    ("old", "new", "config"),
    [(1, 1, "{}"), (2, 2, "{}"), (3, 2, "{}"), (1, 2, "{}"), (2, 1, "{}"), (2, 2, '{"a": 1}')],
    ids=["one file", "two files", "fewer", "more", "one instead of two", "another configuration"],
)
def test_a_killed_save_leaves_one_of_the_two_checkpoints(
    old: int, new: int, config: str, tmp_path: Path
) -> None:
    seen = set()
    number = 0
    while True:
        folder = tmp_path / str(number) / "checkpoint"
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text("mine")
        save(folder, "old", files=old)
        killed = killed_at(number, partial(save, folder, "new", files=new, config=config))
        found = loaded(folder)
        assert found in (("{}", {"old"}), (config, {"new"}))
        seen.add(found[1].pop())
        save(folder, "next", files=new, config=config)
        assert loaded(folder) == (config, {"next"})
        assert (folder / "tokenizer.json").read_text() == "mine"
        assert len(list(folder.iterdir())) == 2 + (new if new == 1 else new + 1)
        assert list(folder.parent.iterdir()) == [folder]
        number += 1
        if not killed:
            break
    assert seen == {"old", "new"}
    assert number > 20


def test_a_file_has_the_old_content_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "file"
    number, seen = 0, set()
    while True:
        file.write_text("old")
        killed = killed_at(number, partial(write_atomically, file, b"new"))
        seen.add(file.read_text())
        number += 1
        if not killed:
            break
    assert seen == {"old", "new"}


def test_a_file_that_is_written_by_others_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    with replaced(file):
        pass  # as on a rank that does not write
    assert file.read_text() == "old"
    with pytest.raises(OSError, match="full"), replaced(file) as written:
        written.write_text("half")
        raise OSError("full")
    (tmp_path / f"{written.name}0").write_text("left by a process that was killed")
    with replaced(file) as written:
        written.write_text("new")
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


def test_two_saves_at_once_are_an_error_of_the_second(tmp_path: Path) -> None:
    staged = AtomicFolder(tmp_path)
    with pytest.raises(BlockingIOError, match="another save is writing into"):
        AtomicFolder(tmp_path)
    staged.close()
    AtomicFolder(tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_folders_that_were_made_for_nothing_are_removed(tmp_path: Path) -> None:
    AtomicFolder(tmp_path / "a" / "b").close()
    assert list(tmp_path.iterdir()) == []


def test_another_configuration_in_a_folder_with_folders_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "old", files=1)
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(
        OSError, match="it has the folder 'checkpoint-1', expected files only; save"
    ):
        save(tmp_path, "new", files=1, config='{"a": 1}')
    assert loaded(tmp_path) == ("{}", {"old"})
    save(tmp_path, "new", files=1, config='{"transformers_version": "6"}')
    assert loaded(tmp_path)[1] == {"new"}


def test_names_are_those_of_transformers_unless_the_old_checkpoint_uses_them(
    tmp_path: Path,
) -> None:
    names = ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    save(tmp_path, "old", files=2)
    assert sorted(path.name for path in tmp_path.glob("model-*")) == names
    save(tmp_path, "new", files=2)
    assert not any((tmp_path / name).exists() for name in names)
    save(tmp_path, "newer", files=2)
    assert sorted(path.name for path in tmp_path.glob("model-*")) == names


def write(folder: Path, text: str) -> None:
    """A folder with another in it, of which every file holds ``text``."""
    with new_folder(folder) as made:
        (made / "one").write_text(text)
        (made / "inner").mkdir()
        (made / "inner" / "two").write_text(text)


def test_a_new_folder_is_there_with_all_of_its_files_or_not_at_all(tmp_path: Path) -> None:
    number, seen = 0, set()
    while True:
        folder = tmp_path / str(number) / "new [1]"
        killed = killed_at(number, partial(write, folder, "a"))
        found = {path.name for path in folder.rglob("*")}
        assert found in (set(), {"one", "inner", "two"})
        seen.add(bool(found))
        if not found:
            write(folder, "b")
        assert {(folder / name).read_text() for name in ("one", "inner/two")} < {"a", "b"}
        if not found:  # what was killed has left nothing
            assert list(folder.parent.iterdir()) == [folder]
        number += 1
        if not killed:
            break
    assert seen == {False, True}


def test_a_new_folder_leaves_that_of_another_process_alone(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as made, new_folder(tmp_path / "out"):
        assert made.is_dir()
        with pytest.raises(ValueError, match="exists, expected a folder that is empty"):
            (tmp_path / "out" / "file").mkdir(parents=True)
            write(tmp_path / "out", "a")
        (tmp_path / "out" / "file").rmdir()


def test_a_new_folder_that_another_process_finished_first_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with (
        pytest.raises(ValueError, match="was written by another process meanwhile, expected"),
        new_folder(folder),
    ):
        write(folder, "first")
    assert (folder / "one").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(ValueError, match="one' is a file, expected a folder; name another place"):
        write(folder / "one" / "below" / "it", "a")


@pytest.mark.parametrize("is_found", [False, True], ids=["gone", "being removed"])
def test_a_new_folder_is_made_again_where_it_was_taken_for_a_leftover(
    is_found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another process does between the making of a folder and its lock."""
    make, made, locks = tempfile.mkdtemp, [], []

    def make_and_lose(**kwargs: Any) -> str:
        made.append(make(**kwargs))
        if len(made) == 1 and is_found:
            locks.append(locked(Path(made[0])))
        elif len(made) == 1:
            Path(made[0]).rmdir()
        return made[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_lose)
    write(tmp_path / "out", "a")
    assert len(made) == 2
    assert (tmp_path / "out" / "one").read_text() == "a"
    for lock in locks:
        os.close(lock)
