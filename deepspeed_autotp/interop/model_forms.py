# SPDX-License-Identifier: Apache-2.0
"""How a user names a model; importing this imports nothing else of the package."""

import re

FORMS = (
    "a folder with config.json, that file, a model type of transformers "
    "(llama:hidden_size=8192,num_hidden_layers=80), or module:factory"
)

# Between the overrides of a model type, and not within a list.
BETWEEN_OVERRIDES = re.compile(r",(?=\w+=)")
