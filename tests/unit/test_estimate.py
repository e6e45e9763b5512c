# SPDX-License-Identifier: Apache-2.0
"""Estimates without ranks: traces of a few blocks, layouts, and the form of the JSON."""

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from deepspeed_autotp.cli.plan_arguments import (
    accumulates,
    bandwidth_of,
    bytes_of,
    left_out,
    lora_of,
)
from deepspeed_autotp.estimate import trace
from deepspeed_autotp.estimate.changes import Changes
from deepspeed_autotp.estimate.estimator import Estimator
from deepspeed_autotp.estimate.subject import Subject
from deepspeed_autotp.estimate.suggest import suggest
from deepspeed_autotp.estimate.trace import trace_step
from deepspeed_autotp.estimate.trace_result import Shape, Trace
from tests.support import estimate_request

_SIZES = (
    "hidden_size=64,intermediate_size=96,num_attention_heads=8,num_key_value_heads=2,vocab_size=101"
)
LLAMA = f"llama:num_hidden_layers=7,{_SIZES}"
GEMMA2 = f"gemma2:num_hidden_layers=8,{_SIZES},head_dim=8,sliding_window=16"
MIXTRAL = f"mixtral:num_hidden_layers=6,{_SIZES},num_local_experts=4"
T5 = "t5:d_model=64,d_ff=96,num_layers=6,num_decoder_layers=7,num_heads=8,d_kv=8,vocab_size=101"
# All cases with AUTOTP_LOOPS=1.
ALL = bool(os.environ.get("AUTOTP_LOOPS"))
BF16 = Changes("bfloat16")
REQUEST = replace(estimate_request.REQUEST, zero={"reduce_bucket": 1000})


def traced(text: str, changes: Changes, tp: int) -> Trace:
    subject = Subject(text, {}, changes)
    return trace_step(
        subject.build,
        lambda found: subject.plan_of(found, tp),
        subject.stacks(),
        rank=0,
        shape=Shape(2, 32),
    )


CASES = [
    (LLAMA, Changes("bfloat16", checkpointing=True), "5 of 7"),
    (T5, BF16, "10 of 13"),
    (LLAMA, BF16, "5 of 7"),
    (LLAMA, Changes("bfloat16", lora={"r": 4}), "5 of 7"),
    (GEMMA2, BF16, "6 of 8"),
    (MIXTRAL, BF16, "5 of 6"),
]


@pytest.mark.parametrize(("text", "changes", "blocks"), CASES if ALL else CASES[:2])
def test_a_few_blocks_stand_for_all(
    monkeypatch: pytest.MonkeyPatch, text: str, changes: Changes, blocks: str
) -> None:
    few = traced(text, changes, 2)
    assert few.blocks == blocks
    monkeypatch.setattr(trace, "_MOST_BLOCKS", 0)
    full = traced(text, changes, 2)
    assert full.blocks == "all"
    assert few.saved == full.saved
    for share in (0.0, 0.5, 1.0):
        assert few.peak(share) == full.peak(share)
    assert set(few.collectives) == set(full.collectives)


def test_an_unsharded_model_sends_nothing_and_checkpointing_keeps_less() -> None:
    plain = traced(LLAMA, BF16, 1)
    assert plain.collectives == ()
    less = traced(LLAMA, Changes("bfloat16", checkpointing=True), 1)
    assert less.saved < plain.saved / 2
    assert plain.logits == 2 * 32 * 101 * 2


class Rounds(nn.Module):
    """Its forward asks for a number of rounds that only values tell."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.up_proj = nn.Linear(8, 16)
        self.down_proj = nn.Linear(16, 8)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for _ in range(int(input_ids.max())):
            x = x + self.down_proj(self.up_proj(x).relu())
        return x


def test_a_step_that_depends_on_values_is_said_and_the_formula_is_used() -> None:
    subject = Subject(f"{__name__}:Rounds", {}, Changes())
    found = Estimator(subject).estimate(1, replace(REQUEST, replicas=1))
    assert found.activations.source == "formula"
    assert "the step cannot be traced" in found.activations.reason
    assert "Korthikanti et al. 2022" in found.activations.reason


def test_the_content_has_kinds_that_sum_to_the_peak() -> None:
    content: dict[str, Any] = Estimator(Subject(LLAMA, {}, BF16)).estimate(2, REQUEST).content()
    assert (content["format"], content["version"]) == ("deepspeed_autotp.estimate", 1)
    assert content["activations"]["source"] == "traced"
    for rank in content["ranks"]:
        sums = [sum(rank[moment].values()) for moment in ("in_step", "in_optimizer")]
        assert rank["peak"] == max(sums)
        assert rank["in_step"]["activations"] > 0
    assert sum(row["bytes"] for row in content["parameters"]) == content["bytes"]
    assert [stack["name"] for stack in content["stacks"]] == ["model.layers"]
    (kind,) = content["stacks"][0]["kinds"]
    assert (kind["name"], kind["first"], kind["count"]) == ("LlamaDecoderLayer", 0, 7)
    patterns = {row["pattern"] for row in content["parameters"]}
    assert set(kind["patterns"]) <= patterns
    assert {each["between"] for each in content["collectives"]} == {"tp", "replicas"}
    assert any("101 as" in warning for warning in content["warnings"])


def test_gradients_of_earlier_micro_batches_are_there_from_the_start() -> None:
    estimator = Estimator(Subject(LLAMA, {}, BF16))
    one = estimator.estimate(2, REQUEST).ranks[0]
    several = estimator.estimate(2, replace(REQUEST, accumulates=True)).ranks[0]
    assert several.in_step["gradients"] == one.after_backward["gradients"]
    assert one.in_step["gradients"] < several.in_step["gradients"]
    assert sum(one.in_step.values()) < sum(several.in_step.values())


def test_what_a_configuration_has_and_is_not_counted_is_said() -> None:
    config = {
        "gradient_accumulation_steps": 2,
        "zero_optimization": {
            "offload_optimizer": {"device": "cpu"},
            "offload_param": {"device": "none"},
        },
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    expected = ("zero_optimization.offload_optimizer", "data_types.grad_accum_dtype")
    assert (accumulates(config), left_out(config)) == (True, expected)
    assert (accumulates({}), left_out({})) == (False, ())
    request = replace(REQUEST, accumulates=True, left_out=expected)
    warnings = Estimator(Subject(LLAMA, {}, BF16)).estimate(2, request).warnings
    assert f"not counted of the configuration: {', '.join(expected)}" in warnings
    assert "collectives are those of one of the micro-batches of a step" in warnings


def test_the_layouts_are_those_of_brute_force() -> None:
    estimator = Estimator(Subject(LLAMA, {}, BF16))
    everything = suggest(estimator, REQUEST, model=LLAMA, gpus=4, memory=2**40, most_ranks=8)
    memory = sorted(layout.peak for layout in everything.layouts)[5]
    found = suggest(estimator, REQUEST, model=LLAMA, gpus=4, memory=memory, most_ranks=8)
    expected = []
    for tp in (1, 2, 4):
        for stage in range(4 if tp < 4 else 2):
            one = estimator.estimate(tp, replace(REQUEST, replicas=4 // tp, stage=stage))
            peak = max(rank.peak for rank in one.ranks)
            seconds = sum(each.seconds or 0.0 for each in one.collectives)
            fits = peak <= memory
            key = (not fits, 0 if fits else peak, round(seconds, 5) * tp / 4, tp, stage)
            expected.append((key, (tp, 4 // tp, stage, peak, fits)))
    got = [(e.tp_size, e.replicas, e.zero_stage, e.peak, e.fits) for e in found.layouts]
    assert got == [layout for _, layout in sorted(expected)]
    assert {layout.fits for layout in found.layouts} == {True, False}


def test_sizes_are_read() -> None:
    assert bytes_of("80GiB", "--gpu-memory") == 80 * 2**30
    assert bytes_of("1.5 GB", "--gpu-memory") == 1_500_000_000
    assert bandwidth_of("450GB/s") == 450e9
    assert lora_of("r=16,target_modules=q_proj+v_proj") == {
        "r": 16,
        "target_modules": ["q_proj", "v_proj"],
    }
    assert lora_of("r=8,target_modules=all-linear") == {"r": 8, "target_modules": "all-linear"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bytes_of("much", "--gpu-memory"), "--gpu-memory: got 'much', expected a size"),
        (lambda: bytes_of("80", "--gpu-memory"), "--gpu-memory: got '80', expected a size such as"),
        (lambda: bytes_of("0GiB", "--gpu-memory"), "expected a size such as 80GiB"),
        (lambda: bandwidth_of("450GB"), "--bandwidth: got '450GB', expected bytes per second"),
        (lambda: bandwidth_of("200Gb/s"), "expected bytes per second"),
        (lambda: lora_of("16"), "--lora: got '16', expected r=16"),
        (lambda: lora_of("target_modules=q_proj"), "without r, expected r=16"),
    ],
)
def test_wrong_sizes_are_said(call: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        call()
