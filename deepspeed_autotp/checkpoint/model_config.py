# SPDX-License-Identifier: Apache-2.0
"""The configuration of the model of a checkpoint: beside its files, or where the user says."""

from __future__ import annotations

from pathlib import Path

from deepspeed_autotp.base.printable import printable
from deepspeed_autotp.checkpoint.metadata import CONFIG_FILES
from deepspeed_autotp.config.json_text import parsed_json, read_text

_LARGEST = 16 * 2**20
_CONFIG = CONFIG_FILES[0]


def config_source(folder: Path, config: Path | None) -> Path:
    """The folder, or the file, with the configuration: ``config``, or the ``folder`` of the
    checkpoint. ValueError where ``config`` has none."""
    if config is not None and not (config.is_file() or (config / _CONFIG).is_file()):
        raise ValueError(
            f"--config: {str(config)!r} has no {_CONFIG}, expected a folder with the configuration "
            "of the model, or that file"
        )
    return folder if config is None else config


def config_texts(folder: Path, config: Path | None) -> dict[str, str]:
    """The texts of the configuration by file, of CONFIG_FILES, as far as they are there. ValueError
    for one that is no JSON object."""
    source = config_source(folder, config)
    if source.is_file():
        return {_CONFIG: _json_object(source)}
    files = [source / name for name in CONFIG_FILES if (source / name).is_file()]
    return {file.name: _json_object(file) for file in files}


def _json_object(file: Path) -> str:
    """The text of ``file``."""
    try:
        text = read_text(file, largest=_LARGEST)
        found = parsed_json(text, allow_nan=True)
    except ValueError as error:
        raise _not_json(file, printable(str(error))) from error
    if not isinstance(found, dict):
        raise _not_json(file, f"got {type(found).__name__}")
    return text


def _not_json(file: Path, what: str) -> ValueError:
    return ValueError(
        f"{str(file)!r}: {what}, expected a JSON object, the configuration of the model; name a "
        "folder that has it with --config"
    )
