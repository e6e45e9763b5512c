# SPDX-License-Identifier: Apache-2.0
"""What is asked of an error about the input of others."""

import unicodedata

LONGEST = 20_000
# Control characters, halves of characters, and ends of lines of other kinds.
_NEVER = {"Cc", "Cs", "Zl", "Zp"}
_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def obeyed(text: str) -> list[str]:
    """The characters of ``text`` that a terminal obeys in the place of showing them."""
    return [
        letter
        for letter in text
        if (unicodedata.category(letter) in _NEVER and letter != "\n")
        or unicodedata.bidirectional(letter) in _DIRECTIONS
    ]


def check_error(error: BaseException) -> str:
    """The text of a ValueError that a terminal may be given."""
    assert isinstance(error, ValueError)
    text = str(error)
    assert 0 < len(text) < LONGEST
    assert not obeyed(text), ascii(text)
    return text
