# SPDX-License-Identifier: Apache-2.0
"""A stand-in for vLLM, which records the weights that TRL sends, to be run on ranks."""

import hashlib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import Tensor

import deepspeed_autotp
from tests.support.engine_config import accelerate_config
from tests.support.recorded_collectives import recorded_collectives
from tests.support.small_models import build
from tests.support.trainer_script import Script, deepspeed_config
from tests.support.trl_loops import run_loop

Weights = dict[str, Tensor]


def _answers(prompts: list[list[int]], count: int, salt: str) -> list[list[int]]:
    """Tokens that follow from the prompt, and the number of the answer to it."""
    digests = [
        hashlib.blake2b(f"{ids} {answer} {salt}".encode(), digest_size=5).digest()
        for ids in prompts
        for answer in range(count)
    ]
    return [[2 + byte % 90 for byte in digest] for digest in digests]


class Server:
    """In the place of TRL's client of a vLLM server."""

    received: list[Weights]

    def __init__(self, **_: Any) -> None:
        Server.received = []

    def init_communicator(self, device: Any) -> None:
        pass

    def update_named_params(
        self, metadata: list[tuple[str, str, list[int]]], tensors: Iterable[tuple[str, Tensor]]
    ) -> None:
        got = {name: tensor.clone() for name, tensor in tensors}
        assert {name: list(tensor.shape) for name, tensor in got.items()} == {
            name: shape for name, _, shape in metadata
        }
        Server.received.append(got)

    def get_server_info(self) -> dict[str, Any]:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def reset_prefix_cache(self) -> None:
        pass

    def generate(self, prompts: list[list[int]], n: int, **_: Any) -> dict[str, Any]:
        answers = _answers(prompts, n, "")
        return {
            "prompt_ids": prompts,
            "completion_ids": answers,
            "logprobs": [[[-1.0]] * len(each) for each in answers],
        }


def server_loop(script: Script, lora: bool) -> tuple[list[dict[str, float]], list[Weights]]:
    """GRPO with a vLLM server: what was logged, and what the server has received."""
    from trl.generation import vllm_generation

    Server.received = []
    before = vllm_generation.is_vllm_available, vllm_generation.VLLMClient
    vllm_generation.is_vllm_available = lambda *_, **__: True
    vllm_generation.VLLMClient = Server
    try:
        history, _ = run_loop("grpo", script, lora)
    finally:
        vllm_generation.is_vllm_available, vllm_generation.VLLMClient = before
    return history, Server.received


class _Engine:
    """In the place of vLLM in this process: each draws answers of its own."""

    def generate(self, prompts: list[dict[str, list[int]]], **_: Any) -> list[Any]:
        asked = [each["prompt_token_ids"] for each in prompts]
        answers = _answers(asked, 1, str(dist.get_rank()))
        return [
            SimpleNamespace(prompt_token_ids=ids, outputs=[SimpleNamespace(token_ids=answer)])
            for ids, answer in zip(asked, answers, strict=True)
        ]


# What TRL's class keeps of its arguments.
_ASKED = {
    "enable_sleep_mode": False,
    "generation_kwargs": {},
    "logprobs": 0,
    "max_completion_length": 6,
    "min_p": None,
    "mode": "colocate",
    "repetition_penalty": 1.0,
    "structured_outputs_regex": None,
    "temperature": 1.0,
    "tensor_parallel_size": 1,
    "top_k": 0,
    "top_p": 1.0,
}


def colocated() -> tuple[float, list[list[int]]]:
    """With an engine in each process: how far the weights that this one is given are from the full
    ones, and the answers that this rank works with."""
    import deepspeed
    from accelerate import Accelerator, DeepSpeedPlugin, PartialState
    from transformers import TrainingArguments
    from trl import GRPOConfig  # noqa: F401  as where a GRPOTrainer is made
    from trl.generation import vllm_generation

    deepspeed.init_distributed(dist_backend="gloo")
    deepspeed_autotp.install()
    PartialState(cpu=True)
    TrainingArguments(use_cpu=True, deepspeed=deepspeed_config(Script("", tp=2)))
    plugin = DeepSpeedPlugin(hf_ds_config=accelerate_config(2, zero=1))
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = deepspeed_autotp.parallelize(build("llama", tied=True), tp_size=2)
    made: Any = vllm_generation.VLLMGeneration.__new__(vllm_generation.VLLMGeneration)
    vars(made).update(_ASKED, model=model, accelerator=accelerator)
    made._dist, made.llm = None, _Engine()
    given = {name: tensor.clone() for name, tensor in made._iter_named_params()}
    full = deepspeed_autotp.full_state_dict(model)
    assert given.keys() == full.keys() - {"lm_head.weight"}  # which is tied
    before = vllm_generation.extract_logprobs, vars(vllm_generation).get("SamplingParams")
    vllm_generation.extract_logprobs = lambda _: (None, None)
    vllm_generation.SamplingParams = SimpleNamespace
    try:
        _, answers, *_ = made.generate([[5, 6], [7]], None, 1)
    finally:
        vllm_generation.extract_logprobs, vllm_generation.SamplingParams = before
    deepspeed_autotp.uninstall()
    return max(float((given[name] - full[name]).abs().max()) for name in given), answers


def buckets() -> tuple[list[list[str]], list[float], list[int]]:
    """Of the full parameters in large and small buckets: their names, how far they are from those
    of the unsharded model, and the gathers."""
    names, apart, gathers = [], [], []
    for most in (1 << 30, 20_000, 1):
        plain = build("qwen3_moe", tied=False)
        model = deepspeed_autotp.parallelize(build("qwen3_moe", tied=False), tp_size=2)
        with recorded_collectives() as calls:
            found = dict(deepspeed_autotp.iter_full_parameters(model, bucket_bytes=most))
        full = {name: parameter.detach() for name, parameter in plain.named_parameters()}
        names.append([name for name in found if name not in full or len(found) != len(full)])
        apart.append(max(float((found[name] - full[name]).abs().max()) for name in full))
        gathers.append(len(calls))
    return names, apart, gathers
