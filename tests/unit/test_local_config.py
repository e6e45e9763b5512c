# SPDX-License-Identifier: Apache-2.0
"""The configuration that a sharded module sees."""

import copy
import pickle
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

from deepspeed_autotp.sharding.local_config import with_local_integer


class Plain:
    """A configuration of a user's own."""

    def __init__(self) -> None:
        self.heads = 4
        self.width = 8


def llama() -> tuple[LlamaConfig, Any]:
    full = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=4)
    local = with_local_integer(full, "num_attention_heads", 2)
    return full, with_local_integer(local, "num_key_value_heads", 1)


def test_a_module_reads_its_own_ranks_integers_and_the_model_all() -> None:
    full, local = llama()
    assert (local.num_attention_heads, local.num_key_value_heads) == (2, 1)
    assert (full.num_attention_heads, full.num_key_value_heads) == (4, 4)
    assert isinstance(local, LlamaConfig) and local.__class__ is LlamaConfig


def test_an_alias_of_an_integer_reads_as_the_local_one() -> None:
    local = with_local_integer(GPT2Config(n_head=4), "n_head", 2)
    assert (local.n_head, local.num_attention_heads) == (2, 2)


def test_what_is_written_is_the_full_configuration() -> None:
    full, local = llama()
    assert local.to_dict() == full.to_dict()
    assert local.to_diff_dict() == full.to_diff_dict()
    assert local.to_json_string() == full.to_json_string()


def test_what_is_assigned_holds_for_model_and_module() -> None:
    full, local = llama()
    local.use_cache = False
    full.bos_token_id = 7
    assert (full.use_cache, local.bos_token_id) == (False, 7)


def test_an_integer_that_is_assigned_holds_for_the_module() -> None:
    full, local = llama()
    local.num_attention_heads = 3
    assert (local.num_attention_heads, full.num_attention_heads) == (3, 4)


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))]
)
def test_a_copy_keeps_the_integers_and_shares_nothing(copied: Any) -> None:
    full, local = llama()
    other = copied(local)
    other.use_cache = False
    other.num_attention_heads = 1
    assert (other.num_key_value_heads, other.hidden_size) == (1, 64)
    assert (full.use_cache, local.num_attention_heads) == (True, 2)
    assert other.to_dict()["num_attention_heads"] == 4


def test_copies_of_a_model_share_one_configuration_as_the_original_does() -> None:
    full, local = copy.deepcopy(llama())
    local.use_cache = False
    assert full.use_cache is False


def test_a_configuration_of_a_users_own_class_can_be_pickled() -> None:
    local = pickle.loads(pickle.dumps(with_local_integer(Plain(), "heads", 2)))
    assert (local.heads, local.width, type(local).__name__) == (2, 8, "Plain")
