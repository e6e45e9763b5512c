# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint of sharded models: resumed at other sizes, and read by torch alone.

``make resume`` runs the whole matrix.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

import deepspeed_autotp
from tests.integration.distributed_checkpoint_ranks import (
    CLIP,
    RATE,
    ROWS,
    Case,
    Size,
    Steps,
    load_in_other_groups,
    load_other,
    load_twice,
    load_what_modules_give,
    rate,
    refused,
    run,
    save_before_the_first_step,
    save_the_optimizer_after_evaluating,
    save_with_full_state,
)
from tests.support.loss_curves import worst_difference
from tests.support.same_error import same_error
from tests.support.small_models import tokens
from tests.support.training_loops import loss_of
from tests.support.worker_pool import Pool, PoolError

# In float64. TP size 3 rounds elsewhere; the norm by which all clip is one.
CLOSE = 1e-8
STEPS = 10
HALF = STEPS // 2

CASES = {
    "tied": Case(),
    "fused": Case("phi3", tied=False, changes={"num_key_value_heads": 2}),
    "one key head": Case(tied=False, changes={"num_key_value_heads": 1}),
    "uneven heads": Case(
        tied=False,
        changes={"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 60},
    ),
    "experts": Case(
        "qwen3_moe",
        changes={"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
}
# The run that saves and the one that goes on.
PAIRS = [
    (Size(2), Size(1, 2)),
    (Size(1, 2), Size(2)),
    (Size(2, 2), Size(4)),
    (Size(4), Size(2, 2, "fsdp")),
    (Size(2, 2, "fsdp"), Size(3)),
    (Size(2, 2, "fsdp"), Size(4)),
    (Size(2), Size(1, 3, "fsdp")),
    (Size(1, 4, "fsdp"), Size(2, 2, "fsdp")),
    (Size(2, 2, "hsdp"), Size(1, 4, "hsdp")),
    (Size(1, 4, "hsdp"), Size(2, 2, "hsdp")),
]
QUICK = [
    ("fused", PAIRS[0]),
    ("tied", PAIRS[1]),
    ("one key head", PAIRS[2]),
    ("experts", PAIRS[3]),
    ("uneven heads", PAIRS[4]),
    ("fused", PAIRS[5]),
    ("tied", PAIRS[6]),
    ("fused", PAIRS[7]),
    ("uneven heads", PAIRS[8]),
]
MATRIX = [(name, pair) for name in CASES for pair in PAIRS]


@pytest.fixture(scope="module")
def curves(pool: Pool) -> Any:
    """The losses of ten steps in one process, by the name of the case."""
    known: dict[str, list[float]] = {}

    def curve(name: str) -> list[float]:
        if name not in known:
            known[name] = pool.run(run, CASES[name], Size(), Steps(0, STEPS), ranks=1)[0]
        return known[name]

    return curve


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "pair"), MATRIX if os.environ.get("AUTOTP_RESUME_MATRIX") else QUICK
)
def test_a_run_goes_on_at_another_size_as_in_one_process(
    pool: Pool, curves: Any, name: str, pair: tuple[Size, Size], tmp_path: Path
) -> None:
    folder, (before, after) = str(tmp_path), pair
    first = pool.run(run, CASES[name], before, Steps(0, HALF, save=folder), ranks=before.ranks)
    rest = pool.run(run, CASES[name], after, Steps(HALF, STEPS, load=folder), ranks=after.ranks)
    expected = curves(name)
    for losses in first:
        assert worst_difference(losses, expected[:HALF]) < CLOSE
    for losses in rest:
        assert worst_difference(losses, expected[HALF:]) < CLOSE


@pytest.mark.sample(2)
@pytest.mark.parametrize("size", [Size(2, 2), Size(2, 2, "fsdp")], ids=lambda size: size.way)
def test_torch_alone_reads_the_full_tensors_and_goes_on(
    pool: Pool, curves: Any, size: Size, tmp_path: Path
) -> None:
    """In one process, without a process group, the model as it comes from transformers."""
    folder, case = str(tmp_path / "saved"), CASES["fused"]
    full = pool.run(save_with_full_state, case, size, folder, ranks=size.ranks)[0]
    model = case.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    weights, states = get_state_dict(model, optimizer)
    load_in_one_process({"model": weights, "optimizer": states}, folder)
    assert weights.keys() == full.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], full[name]) for name in full)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    assert optimizer.param_groups[0]["lr"] == rate(2)
    losses = []
    for index in range(2, STEPS):
        optimizer.param_groups[0]["lr"] = rate(index)
        loss = loss_of(model, tokens(index, rows=ROWS))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert worst_difference(losses, curves("fused")[2:]) < CLOSE


def test_one_process_and_one_file_have_the_full_tensors(pool: Pool, tmp_path: Path) -> None:
    folder, case = str(tmp_path / "saved"), CASES["one key head"]
    full = pool.run(save_with_full_state, case, Size(2, 2, "fsdp"), folder, ranks=4)[0]
    model = case.make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    load_in_one_process(deepspeed_autotp.checkpoint_state(model, optimizer), folder)
    assert all(torch.equal(value, full[name]) for name, value in model.state_dict().items())
    assert all(float(state["step"]) == 2 for state in optimizer.state.values())
    dcp_to_torch_save(folder, tmp_path / "full.pt")
    saved = torch.load(tmp_path / "full.pt", weights_only=False)
    assert all(torch.equal(saved["model"][name], full[name]) for name in full)
    assert saved["optimizer"]["param_groups"][0]["params"] == [
        name for name, _ in model.named_parameters()
    ]


def load_in_one_process(state: dict[str, Any], folder: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, checkpoint_id=folder)


@pytest.mark.sample(2)
@pytest.mark.parametrize("size", [Size(2, 2), Size(2, 2, "fsdp")], ids=lambda size: size.way)
def test_what_async_save_writes_is_what_was_there_when_it_was_called(
    pool: Pool, curves: Any, size: Size, tmp_path: Path
) -> None:
    folder, case = str(tmp_path), CASES["one key head"]
    steps = Steps(0, HALF, save=folder, is_async=True)
    first = pool.run(run, case, size, steps, ranks=size.ranks)[0]
    rest = pool.run(run, case, Size(2), Steps(HALF, STEPS, load=folder), ranks=2)[0]
    expected = curves("one key head")
    assert worst_difference(first, expected[: HALF + 1]) < CLOSE
    assert worst_difference(rest, expected[HALF:]) < CLOSE


def test_loading_is_the_same_whether_the_optimizer_was_stepped(pool: Pool, tmp_path: Path) -> None:
    folder, case = str(tmp_path), CASES["fused"]
    pool.run(save_with_full_state, case, Size(2, 2, "fsdp"), folder, ranks=4)
    assert pool.run(load_twice, case, Size(3), folder, ranks=3) == [0] * 3


def test_an_optimizer_is_saved_alone_after_an_evaluation(pool: Pool, tmp_path: Path) -> None:
    case = CASES["fused"]
    expected = len(list(case.make().parameters()))
    args = (case, Size(2, 2, "fsdp"), str(tmp_path))
    assert pool.run(save_the_optimizer_after_evaluating, *args, ranks=4) == [expected] * 4


def test_a_run_saved_before_its_first_step_starts_as_if_it_was_not(
    pool: Pool, curves: Any, tmp_path: Path
) -> None:
    folder, case = str(tmp_path), CASES["tied"]
    first = pool.run(save_before_the_first_step, case, Size(2), folder, ranks=2)[0]
    again = pool.run(run, case, Size(4), Steps(0, 3, load=folder), ranks=4)[0]
    assert worst_difference(first, curves("tied")[:3]) < CLOSE
    assert worst_difference(again, curves("tied")[:3]) < CLOSE


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Case("qwen2", tied=False), "Missing key in checkpoint state_dict: model.model.layers.0."),
        (
            Case(tied=False, changes={"intermediate_size": 96}),
            r"Size mismatch between saved torch.Size\(\[112, 64\]\) and current: "
            r"torch.Size\(\[96, 64\]\) for model.model.layers.0.mlp.gate_proj.weight",
        ),
    ],
    ids=["names", "shapes"],
)
def test_a_checkpoint_of_another_model_is_an_error_on_all_ranks_and_changes_nothing(
    pool: Pool, other: Case, words: str, tmp_path: Path
) -> None:
    case = Case(tied=False)
    pool.run(run, case, Size(2), Steps(0, 1, save=str(tmp_path)), ranks=2)
    with pytest.raises(PoolError, match=words) as raised:
        pool.run(load_other, other, str(tmp_path))
    assert str(raised.value).count("CheckpointException") >= 2


def test_what_a_module_gives_in_place_of_its_tensors_is_loaded(pool: Pool, tmp_path: Path) -> None:
    for number, wrong, error in pool.run(load_what_modules_give, str(tmp_path)):
        assert (number, wrong) == (3, [])
        assert "half: got a tensor that a hook or a module's own state_dict made" in error


def test_parameters_in_other_groups_are_an_error(pool: Pool, tmp_path: Path) -> None:
    text = same_error(pool.run(load_in_other_groups, Case(), str(tmp_path)))
    assert (
        "the optimizer's group 0 has other parameters in the checkpoint, in another order" in text
    )


def test_what_is_not_known_to_be_right_is_refused_by_name(pool: Pool) -> None:
    results = pool.run(refused)
    texts = {key: same_error([each[key] for each in results]) for key in results[0]}
    for key, words in {
        "no model": "model: got 'model' (str), expected a torch.nn.Module",
        "an engine": "call engine.save_checkpoint and engine.load_checkpoint",
        "the module of an engine": "call engine.save_checkpoint and engine.load_checkpoint",
        "no optimizer": "optimizer: got 'adamw' (str), expected a torch.optim.Optimizer",
        "an optimizer of another model": "parameter 0 of group 0, of shape [96, 64], is not a "
        "parameter of LlamaForCausalLM",
        "an optimizer made before fully_shard": "make it after fully_shard, which replaces",
        "Adafactor": "got Adafactor, which forms factors of rows and columns",
        "states of rows": "ScaledRows has for model.embed_tokens.weight: seen a tensor of shape "
        "[48], expected a number, or the shape of the parameter's shard, [48, 64]",
        "tensors of others": "load_state_dict: got a tensor of shape [96, 64] that state_dict did "
        "not give, expected what torch.distributed.checkpoint.load has read in place",
        "a state of no parameter": "SGD has a state of str, expected states of parameters alone",
    }.items():
        assert texts[key].startswith("ValueError: checkpoint_state: "), texts[key]
        assert words in texts[key], texts[key]
