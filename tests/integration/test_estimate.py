# SPDX-License-Identifier: Apache-2.0
"""What ``autotp plan`` estimates beside what ranks hold, keep alive and send.

``AUTOTP_LOOPS=1`` compares all models; else two of them, which differ in all that is counted.
"""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from deepspeed_autotp.estimate.changes import Changes
from deepspeed_autotp.estimate.estimator import Estimator, Request
from deepspeed_autotp.estimate.subject import Subject
from deepspeed_autotp.estimate.trace import trace_step
from deepspeed_autotp.estimate.trace_result import Shape, Trace
from deepspeed_autotp.planning.model_description import dtype_name
from tests.integration.estimate_ranks import DTYPES, held, recorded, resident, sent_to_replicas
from tests.support.worker_pool import Pool

ALL = bool(os.environ.get("AUTOTP_LOOPS"))

_SIZES = (
    "hidden_size=64,intermediate_size=96,num_hidden_layers=3,num_attention_heads=8,"
    "num_key_value_heads=2,vocab_size=101"
)
_HEADS = "hidden_size=64,num_hidden_layers=3,num_attention_heads=8,vocab_size=101"
MODELS = {
    "llama": f"llama:{_SIZES}",
    "gpt2": "gpt2:n_embd=64,n_layer=3,n_head=8,vocab_size=101,attn_pdrop=0.0",
    "llama, tied": f"llama:{_SIZES},tie_word_embeddings=true",
    "qwen2": f"qwen2:{_SIZES}",
    "phi3": f"phi3:{_SIZES},pad_token_id=0",
    "gemma2": f"gemma2:{_SIZES},head_dim=8,sliding_window=16",
    "bloom": "bloom:hidden_size=64,n_layer=3,n_head=8,vocab_size=101",
    "falcon": f"falcon:{_HEADS}",
    "gpt_neox": f"gpt_neox:{_HEADS},intermediate_size=96",
    "opt": f"opt:{_HEADS},ffn_dim=96,word_embed_proj_dim=64",
    "mixtral": f"mixtral:{_SIZES},num_local_experts=4",
    "qwen3_moe": f"qwen3_moe:{_SIZES},num_experts=4,moe_intermediate_size=32,num_experts_per_tok=2",
    "llama4": f"llama4_text:{_SIZES},num_local_experts=4,"
    "intermediate_size_mlp=96,head_dim=8,pad_token_id=0",
    "t5": "t5:d_model=64,d_ff=96,num_layers=3,num_decoder_layers=3,num_heads=8,d_kv=8,"
    "vocab_size=101",
}
CHEAP = ("llama", "gpt2")
# Models of one call of the pool.
GROUPS = [(name,) for name in MODELS] if ALL else [CHEAP]
# (stage of ZeRO, data type)
CASES = (
    [(stage, dtype) for dtype in DTYPES for stage in range(4)]
    if ALL
    else [(0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "bf16")]
)
# The sizes of estimate_ranks.ZERO, as the core names them.
ZERO = {"reduce_bucket": 5000, "persistence": 200, "max_live": 0}
TP, REPLICAS = 2, 2
# As the ranks are given it.
SECTION = {"self_check": False}
WHOLE = SECTION | {"expert_partition": "experts"}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("names", GROUPS, ids=", ".join)
def test_bytes_are_those_that_initialize_allocates(pool: Pool, names: Sequence[str]) -> None:
    texts = [MODELS[name] for name in names]
    found = pool.run(held, texts, TP, CASES, ranks=TP * REPLICAS, timeout=120.0 * len(texts))
    for at, name in enumerate(names):
        for case, (stage, dtype) in enumerate(CASES):
            plan = Subject(MODELS[name], SECTION, Changes(dtype_name(DTYPES[dtype]))).plan(TP)
            assert plan is not None
            for rank in range(TP):
                memory = plan.rank_memory(rank, stage=stage, replicas=REPLICAS, states=2, **ZERO)
                # Of the data-parallel ranks that with most, kind by kind.
                replicas = [found[rank + TP * replica][at][case] for replica in range(REPLICAS)]
                most = {kind: max(each[kind] for each in replicas) for kind in replicas[0]}
                assert most == {k: memory[k] for k in most}, (name, stage, dtype, rank)


def traced(text: str, dtype: str, rank: int, shape: Shape, section: dict[str, Any]) -> Trace:
    subject = Subject(text, section, Changes(dtype_name(DTYPES[dtype])))
    return trace_step(
        subject.build,
        lambda description: subject.plan_of(description, TP),
        subject.stacks(),
        rank=rank,
        shape=shape,
        on_gpu=False,
    )


@pytest.mark.parametrize(
    ("names", "section"),
    [(names, SECTION) for names in GROUPS]
    + [(("llama",), {"sequence_parallel": True}), (("llama4",), WHOLE)],
)
def test_activations_and_collectives_are_those_of_a_real_step(
    pool: Pool, names: Sequence[str], section: dict[str, Any]
) -> None:
    texts, shape = [MODELS[name] for name in names], Shape(2, 48)
    arguments = (texts, "bf16", shape.sequences, shape.tokens, section)
    found = pool.run(recorded, *arguments, ranks=TP, timeout=30.0 * len(texts))
    for rank in range(TP):
        for name, ((peak, _), saved, calls) in zip(names, found[rank], strict=True):
            trace = traced(MODELS[name], "bf16", rank, shape, section)
            assert trace.peak(0.0)[0] == pytest.approx(peak, rel=0.02), (name, rank)
            assert trace.saved == pytest.approx(saved, rel=0.02), (name, rank)
            assert collectives_of(trace) == calls, (name, rank)


def collectives_of(trace: Trace) -> dict[tuple[str, int], int]:
    counted: Counter[tuple[str, int]] = Counter()
    for each in trace.collectives:
        counted[each.kind, each.size] += each.count
    return dict(counted)


def test_whole_experts_are_traced_as_if_all_were_named_equally_often(pool: Pool) -> None:
    text, shape = MODELS["qwen3_moe"], Shape(2, 48)
    arguments = ([text], "bf16", shape.sequences, shape.tokens, WHOLE)
    found = [each[0] for each in pool.run(recorded, *arguments, ranks=TP)]
    traces = [traced(text, "bf16", rank, shape, WHOLE) for rank in range(TP)]
    for trace, (_, _, calls) in zip(traces, found, strict=True):
        assert collectives_of(trace) == calls
    # What one rank has more of the pairs of token and expert, the other has less.
    for of_trace, of_run in (
        ([trace.saved for trace in traces], [saved for _, saved, _ in found]),
        ([trace.peak(0.0)[0] for trace in traces], [peak for (peak, _), _, _ in found]),
    ):
        assert sum(of_trace) == pytest.approx(sum(of_run), rel=0.002)
    request = Request(1, 0, "adamw", shape, None, False, None, {})
    estimator = Estimator(Subject(text, WHOLE, Changes(dtype_name(DTYPES["bf16"]))))
    activations = estimator.estimate(TP, request).activations
    assert activations.source == "traced" and "equally often" in activations.reason


@pytest.mark.parametrize("stage", range(4) if ALL else [2])
def test_replicas_send_what_the_estimate_says(pool: Pool, stage: int) -> None:
    text = MODELS["llama, tied"]
    sent = pool.run(sent_to_replicas, text, TP, stage, ranks=TP * REPLICAS)[0]
    plan = Subject(text, SECTION, Changes(dtype_name(DTYPES["bf16"]))).plan(TP)
    assert plan is not None
    memory = plan.rank_memory(0, stage=stage, replicas=REPLICAS, states=2, **ZERO)
    expected: Counter[str] = Counter()
    for kind, size, _ in memory["traffic"]:
        expected[kind] += size
    # Norms and flags of a few bytes are sent besides.
    assert {k: size for k, size in sent.items() if size > 100} == {
        k: pytest.approx(size, abs=100) for k, size in expected.items()
    }


@pytest.mark.skipif(not ALL, reason="half a gigabyte on each rank; AUTOTP_LOOPS=1 runs it")
def test_the_peak_is_that_of_the_resident_memory(pool: Pool) -> None:
    text = (
        "llama:hidden_size=512,intermediate_size=1408,num_hidden_layers=6,num_attention_heads=8,"
        "num_key_value_heads=8,vocab_size=4000"
    )
    shape = Shape(2, 384)
    found = pool.run(resident, text, TP, shape.sequences, shape.tokens, ranks=TP, timeout=300.0)
    estimator = Estimator(Subject(text, SECTION, Changes(dtype_name(DTYPES["fp32"]))))
    request = Request(1, 0, "adamw", shape, None, False, None, {})
    for rank in estimator.estimate(TP, request).ranks:
        assert sum(rank.in_step.values()) == pytest.approx(found[rank.rank], rel=0.1)
