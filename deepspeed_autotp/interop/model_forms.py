# SPDX-License-Identifier: Apache-2.0
"""How a user names a model; importing this imports nothing else of the package."""

from __future__ import annotations

import os
import re
from pathlib import Path

FORMS = (
    "a folder with config.json, that file, a model type of transformers "
    "(llama:hidden_size=8192,num_hidden_layers=80), or module:factory"
)

# Between the overrides of a model type, and not within a list.
BETWEEN_OVERRIDES = re.compile(r",(?=\w+=)")


def config_file(text: str) -> Path | None:
    """The file that describes the model, where ``text`` names a folder or a file."""
    for file in (os.path.join(text, "config.json"), text):
        if os.path.isfile(file):
            return Path(file)
    return None
