# SPDX-License-Identifier: Apache-2.0
"""What people do with a model before and after ``parallelize``."""

import copy
import io
import pickle
import re
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import deepspeed_autotp
from deepspeed_autotp.api import torch_loop
from deepspeed_autotp.distributed.model_groups import group_timeout
from deepspeed_autotp.distributed.process_group import TPGroup
from deepspeed_autotp.sharding import conversion
from tests.support.engine_config import Setting, engine_config
from tests.support.handmade_model import PARTITION, build_handmade, example, single_curve
from tests.support.loss_curves import RATE
from tests.support.model_snapshot import refusal
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens
from tests.support.training_loops import apart, loss_of, make, train_sharded, train_unsharded


def sharded(**changes: Any) -> nn.Module:
    model = build("llama", tied=False, **changes)
    return deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())


def generate_with(how: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Tokens of one process and of the sharded model."""
    prompt = tokens(0)[:, :5]
    found = []
    for model in (build("llama", tied=False), sharded()):
        torch.manual_seed(1)
        out = model.eval().generate(prompt, max_new_tokens=10, **how)
        found.append(out.tolist())
    return found[0], found[1]


def hooks() -> tuple[list[str], list[str], float]:
    """Which hooks, registered before, fire in one step: unsharded and sharded; and how far the
    gradient is apart that a hook on a parameter sees."""
    fired: list[list[str]] = []
    seen: list[Tensor] = []
    for is_sharded in (False, True):
        model = make(num_key_value_heads=1)
        names: list[str] = []
        layer = model.model.layers[1]

        def note(word: str, names: list[str] = names) -> Callable[..., None]:
            return lambda *_: names.append(word)

        for key in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "input_layernorm"):
            module = layer.get_submodule(key)
            module.register_forward_pre_hook(note(f"pre {key}"))
            module.register_forward_hook(note(f"after {key}"))
            module.register_full_backward_hook(note(f"back {key}"))
        model.model.embed_tokens.register_forward_hook(lambda m, a, o: o * 2)
        weight = layer.self_attn.k_proj.weight
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        if is_sharded:
            deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
            names.clear()  # they fire in the self-check, too
            del seen[1:]
        loss_of(model, tokens(0)).backward()
        fired.append(names)
        if is_sharded:
            state = deepspeed_autotp.tensor_parallel(model)
            entry = state.entry(weight)
            assert entry is not None
            seen[1] = state.gather(seen[1], entry=entry)
    return fired[0], fired[1], float((seen[0] - seen[1]).abs().max() / seen[0].abs().max())


def states() -> dict[str, str | bool]:
    """Going out and coming in of the weights of one rank."""
    model, other = sharded(), sharded(seed=1)
    own = copy.deepcopy(model.state_dict())
    other.load_state_dict(own)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    read = torch.load(stream, weights_only=True)
    ids = tokens(0)
    with torch.no_grad():
        same = torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits)
    return {
        "keys": list(own) == list(build("llama", tied=False).state_dict()),
        "loaded": same,
        "saved": all(torch.equal(read[name], tensor) for name, tensor in own.items()),
        "full": raised_error(
            lambda: model.load_state_dict(build("llama", tied=False).state_dict())
        ),
        "pickle": raised_error(lambda: pickle.dumps(model)),
        "save": raised_error(lambda: torch.save(model, io.BytesIO())),
    }


def copies() -> tuple[dict[str, float], bool]:
    """A deep copy, with shared key/value heads, trains as one process, and apart from its
    original."""
    unsharded, model = make(num_key_value_heads=1), make(num_key_value_heads=1)
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = copy.deepcopy(model)
    found = apart(unsharded, twin, (train_unsharded(unsharded), train_sharded(twin)))
    kept = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return found, kept


def saves_without_a_state() -> tuple[str, bool]:
    """What ``save_pretrained`` of a sharded model raises; and whether it writes a full state."""
    model = sharded()
    with tempfile.TemporaryDirectory() as folder:
        text = raised_error(lambda: model.save_pretrained(folder))  # type: ignore[operator]
        unsharded = deepspeed_autotp.full_state_dict(model)
        copy.deepcopy(model).save_pretrained(folder, state_dict=unsharded)  # type: ignore[operator]
        return text, Path(folder, "model.safetensors").exists()


def other_batches(engine: bool) -> tuple[str, float]:
    """What the first call raises when every rank has its own batch; and the loss of the next
    call, with the same batch, less that of one process."""
    model: Any = build("llama", tied=False) if engine else sharded()
    if engine:
        config = engine_config(Setting(tp=2, zero=0, clip=0.0))
        model, *_ = deepspeed_autotp.initialize(model=model, config=config)
    text = raised_error(lambda: loss_of(model, tokens(dist.get_rank())))
    unsharded = loss_of(build("llama", tied=False), tokens(0))
    return text, float((loss_of(model, tokens(0)) - unsharded).detach().abs())


def handmade_curve(given: bool) -> tuple[list[float], list[float]]:
    """Losses of a model that no library knows, in one process and sharded."""
    expected = single_curve(build_handmade(), rate=RATE)
    model = build_handmade()
    deepspeed_autotp.parallelize(
        model,
        tp_size=dist.get_world_size(),
        config={"partition_config": PARTITION},
        example_inputs=example() if given else None,
    )
    return expected, single_curve(model, rate=RATE)


def refused(name: str) -> str:
    """What a wrong call raises; the model is as it was."""
    model = build_handmade() if name.startswith("handmade") else build("llama", tied=False)
    wrong = copy.deepcopy(PARTITION)
    wrong["layer_specs"][0]["shape"] = [2, -1]
    calls: dict[str, dict[str, Any]] = {
        "nothing": {},
        "zero": {"tp_size": 0},
        "true": {"tp_size": True},
        "text": {"tp_size": "2"},
        "five": {"tp_size": 5},
        "both": {"tp_size": 2, "tp_group": dist.group.WORLD},
        "group": {"tp_group": 3},
        "mesh": {"mesh": 3},
        "config": {"tp_size": 2, "config": [1]},
        "key": {"tp_size": 2, "config": {"preset_modle": "llama"}},
        "device": {"tp_size": 2, "device": "meta"},
        "no device": {"tp_size": 2, "device": "cuad"},
        "degree": {"tp_size": 2, "config": {"autotp_size": 4}},
        "example": {"tp_size": 2, "example_inputs": torch.ones(1)},
        "argument": {"tp_size": 2, "example_inputs": {"x": torch.ones(1)}},
        "handmade": {"tp_size": 2},
        "handmade check": {
            "tp_size": 2,
            "config": {"partition_config": PARTITION, "self_check": True},
        },
        "handmade wrong": {
            "tp_size": 2,
            "config": {"partition_config": wrong},
            "example_inputs": example(),
        },
        "handmade skips": {
            "tp_size": 2,
            "config": {
                "partition_config": {
                    "layer_specs": [{"patterns": [".*"], "partition_type": "skip"}],
                    "use_default_specs": False,
                }
            },
        },
    }
    return refusal(model, lambda: deepspeed_autotp.parallelize(model, **calls[name]))


def _another(name: str) -> torch.device:
    """A device that the weights are not on; of CPUs there is one, under two names."""
    device = torch.empty(0, device=name).device
    return torch.device("cpu", 0) if device.type == "cpu" else device


def on_device(name: str) -> tuple[float, bool]:
    """How far losses are apart from one process, with the shards made on a device; and whether
    all of the model lies there. In float32 on a GPU, whose kernels have no float64."""
    dtype = torch.float64 if name == "cpu" else torch.float32
    unsharded, ours = make().to(dtype), make().to(dtype)
    with (
        mock.patch.object(torch_loop, "_numbered", _another),
        mock.patch.object(conversion, "move_parameters", wraps=conversion.move_parameters) as moved,
    ):
        model = deepspeed_autotp.parallelize(ours, tp_size=dist.get_world_size(), device=name)
    assert moved.call_count == 1
    worst = 0.0
    optimizers = [torch.optim.SGD(m.parameters(), lr=RATE) for m in (unsharded.to(name), model)]
    for step in range(2):
        ids = tokens(step).to(name)
        losses = [each(input_ids=ids, labels=ids).loss for each in (unsharded, model)]
        worst = max(worst, float((losses[0] - losses[1]).detach().abs()))
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    there = (*model.parameters(), *model.buffers())
    return worst, all(tensor.device.type == name for tensor in there)


def timeouts() -> list[float]:
    """Seconds of the groups that are made for a model, and of the one that the user made."""
    assert dist.group.WORLD is not None
    device_only = dist.new_group(backend="cuda:gloo", timeout=timedelta(seconds=7))
    of_world, of_device = (TPGroup(handle) for handle in (dist.group.WORLD, device_only))
    model = deepspeed_autotp.parallelize(make(), tp_size=2)
    made = deepspeed_autotp.tensor_parallel(model).group
    handles = (made.handle, of_device.cpu_handle, of_world.cpu_handle)
    limits = [group_timeout(handle) for handle in handles]
    return [0.0 if limit is None else limit.total_seconds() for limit in limits]


def refused_model(what: object) -> str:
    return raised_error(lambda: deepspeed_autotp.parallelize(what, tp_size=2))  # type: ignore[arg-type]


# A column layer's second factor and a row layer's first one are sharded as the layer is.
LORA = {
    "use_default_specs": False,
    "layer_specs": [
        {
            "patterns": [r".*\.(q|k|v|gate|up)_proj\.(base_layer\.|lora_B\..*)?weight$"],
            "partition_type": "column",
        },
        {
            "patterns": [r".*\.(o|down)_proj\.(base_layer\.|lora_A\..*)?weight$"],
            "partition_type": "row",
        },
    ],
}


# What adapters are put on, and further options of them, by a name of the case.
ADAPTERS: dict[str, dict[str, Any]] = {
    "most": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]},
    "all": {"target_modules": "all-linear"},
    "attention and mlp": {"target_modules": ["q_proj", "down_proj"]},
    "embedding and head": {"target_modules": ["embed_tokens", "v_proj", "lm_head"]},
    "head trained": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(case: str = "most", **changes: Any) -> nn.Module:
    """A llama in float64 with adapters that are not zero."""
    from peft import LoraConfig, get_peft_model

    model = make(**changes)
    torch.manual_seed(3)
    config = LoraConfig(r=5, init_lora_weights=False, task_type="CAUSAL_LM", **ADAPTERS[case])
    found: nn.Module = get_peft_model(model, config)
    return found


def compare_adapted(rules: bool, sequence: bool) -> tuple[dict[str, float], bool]:
    """LoRA with rules of the user or the model's plan; whether only the adapters have trained."""
    unsharded, model = adapted(), adapted()
    config = {"partition_config": LORA} if rules else {}
    config["sequence_parallel"] = sequence
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=config)
    before = deepspeed_autotp.full_state_dict(model)
    found = apart(unsharded, model, (train_unsharded(unsharded), train_sharded(model)))
    after = deepspeed_autotp.full_state_dict(model)
    only = all(torch.equal(t, after[n]) == ("lora_" not in n) for n, t in before.items())
    return found, only


def compare_adapters(case: str) -> tuple[dict[str, float], float]:
    """As above, by the plan of the model, with one key/value head; and the share of a rank."""
    unsharded, model = (adapted(case, num_key_value_heads=1) for _ in range(2))
    held = sum(p.numel() for p in unsharded.parameters())
    deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())
    found = apart(unsharded, model, (train_unsharded(unsharded), train_sharded(model)))
    return found, sum(p.numel() for p in model.parameters()) / held


def sharded_alike(family: str, wrapped: list[str], saved: list[str]) -> dict[str, bool]:
    """Whether each layer with an adapter is sharded as without one, by name; made, not run."""
    from peft import LoraConfig, get_peft_model

    ranks = dist.get_world_size()
    config = {"self_check": False}
    plain = deepspeed_autotp.parallelize(small(family), tp_size=ranks, config=config)
    model = get_peft_model(
        small(family),
        LoraConfig(r=4, target_modules=wrapped, modules_to_save=saved, task_type="CAUSAL_LM"),
    )
    deepspeed_autotp.parallelize(model, tp_size=ranks, config=config)
    expected = {entry.name: entry for entry in deepspeed_autotp.tensor_parallel(plain).plan.entries}
    found = {}
    for entry in deepspeed_autotp.tensor_parallel(model).plan.entries:
        name = re.sub(
            r"base_model\.model\.|\.base_layer|\.original_module|\.modules_to_save\.default",
            "",
            entry.name,
        )
        factor = re.sub(r"\.lora_([AB])\.default", "", name)
        own = expected[factor]
        sharded_factor = {"row": ".lora_A", "column": ".lora_B"}.get(own.kind, "")
        if name == factor:
            found[entry.name] = entry.dim == own.dim and _same_runs(entry, own)
        elif sharded_factor and sharded_factor in entry.name:
            found[entry.name] = _same_runs(entry, own)
        else:
            found[entry.name] = entry.dim < 0
    return found


def _same_runs(entry: Any, other: Any) -> bool:
    ranks = range(dist.get_world_size())
    return other.dim < 0 or all(entry.runs(rank) == other.runs(rank) for rank in ranks)


def small(family: str) -> nn.Module:
    """Uneven heads over three ranks, one key/value head where there can be one."""
    changes = {} if family == "gpt_neox" else {"num_key_value_heads": 1}
    return build(family, tied=False, **changes)


def other_adapters() -> list[str]:
    """The errors of adapters that are not plain LoRA."""
    import peft

    names = ["q_proj", "o_proj"]
    kinds = [
        peft.LoraConfig(target_modules=names, use_dora=True),
        peft.AdaLoraConfig(target_modules=names, total_step=10),
        peft.IA3Config(target_modules=names, feedforward_modules=[]),
    ]
    said = []
    for kind in kinds:
        model = peft.get_peft_model(build("llama", tied=False), kind)
        said.append(refusal(model, lambda m=model: deepspeed_autotp.parallelize(m, tp_size=2)))
    return said


def meshes() -> dict[str, tuple[int, ...] | str]:
    """Over which ranks each way of naming four ranks shards, or what it raises."""
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = groups[dist.get_rank() % 2]
    other = groups[1 - dist.get_rank() % 2]
    ways: dict[str, dict[str, Any]] = {
        "tp_size": {"tp_size": 2},
        "config": {"config": {"autotp_size": 4}},
        "group": {"tp_group": mine},
        "group of others": {"tp_group": other},
        "group and its size": {"tp_group": mine, "config": {"autotp_size": 2}},
        "mesh of one": {"mesh": init_device_mesh("cpu", (4,))},
        "mesh of two": {"mesh": pairs},
        "its other part": {"mesh": pairs["dp"]},
        "no name": {"mesh": init_device_mesh("cpu", (2, 2))},
        "other names": {"mesh": DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("a", "b"))},
        "no mesh": {"mesh": 4},
    }
    found: dict[str, tuple[int, ...] | str] = {}
    for name, arguments in ways.items():
        model = build("llama", tied=False)
        try:
            deepspeed_autotp.parallelize(model, **arguments)
            found[name] = deepspeed_autotp.tensor_parallel(model).group.global_ranks
        except ValueError as error:
            found[name] = str(error)
    return found
