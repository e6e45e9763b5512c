# SPDX-License-Identifier: Apache-2.0
"""Options of TRL that would be wrong, or hang, under tensor parallelism are refused at start."""

from dataclasses import dataclass

import pytest

from deepspeed_autotp.interop.trl_options import refuse_options


@dataclass
class TrainingArguments:
    """As those of transformers, which TRL's are made of."""

    use_vllm: bool = False


@dataclass
class GRPOConfig(TrainingArguments):
    use_transformers_continuous_batching: bool = False
    use_transformers_paged: bool = False


class OnlineDPOConfig(TrainingArguments):
    pass


class AsyncGRPOConfig(TrainingArguments):
    pass


class MyAsyncConfig(AsyncGRPOConfig):
    pass


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            GRPOConfig(use_transformers_continuous_batching=True),
            "use_transformers_continuous_batching: got True, expected False with "
            "tensor_parallel.autotp_size 4",
        ),
        (GRPOConfig(use_transformers_paged=True), "use_transformers_paged: got True"),
        (OnlineDPOConfig(use_vllm=True), "OnlineDPOConfig: use_vllm: got True, expected False"),
        (AsyncGRPOConfig(), "got tensor_parallel.autotp_size 4, expected 1.*train with GRPOT"),
        (MyAsyncConfig(), "MyAsyncConfig: got tensor_parallel.autotp_size 4"),
    ],
)
def test_what_would_be_wrong_is_refused(arguments: TrainingArguments, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        refuse_options(arguments, tp_size=4)


@pytest.mark.parametrize("arguments", [GRPOConfig(use_vllm=True), OnlineDPOConfig()])
def test_what_is_right_is_taken(arguments: TrainingArguments) -> None:
    refuse_options(arguments, tp_size=4)
