# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters in a sharded model, put there before or after it was sharded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.peft_models import largest, llama, lora, sharded, trained
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens
from tests.support.training_loops import apart, train_sharded, train_unsharded


def _gpt2(tied: bool = True) -> nn.Module:
    """A model without a tp_plan, of transposed layers with a fused q|k|v."""
    sizes: dict[str, Any] = {"n_embd": 48, "n_layer": 2, "n_head": 6, "n_positions": 64}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return build("gpt2", tied=tied, **sizes, **dropouts).double()


_PERSIMMON: dict[str, Any] = {
    "num_key_value_heads": 8,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}
CONV1D = {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]}
# A model, and the options of LoRA on it, by the name of a case.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "one key/value head": (llama, {"target_modules": "all-linear"}),
    "embedding and head": (llama, {"target_modules": ["embed_tokens", "v_proj", "lm_head"]}),
    "trained in full": (
        llama,
        {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head", "down_proj"]},
    ),
    "biases": (
        lambda: llama(attention_bias=True, mlp_bias=True),
        {"target_modules": "all-linear", "lora_bias": True},
    ),
    "transposed layers": (_gpt2, {**CONV1D, "use_rslora": True, "lora_alpha": 3}),
    "tied head and embedding": (_gpt2, {"target_modules": ["wte", "lm_head"]}),
    "head and embedding without a plan": (
        lambda: _gpt2(tied=False),
        {"target_modules": ["wte", "lm_head", "c_attn"], "fan_in_fan_out": True},
    ),
    "head without a plan, trained in full": (
        lambda: _gpt2(tied=False),
        {"target_modules": ["c_fc"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True},
    ),
    "fused layers": (
        lambda: build("phi3", tied=False).double(),
        {
            "target_modules": "all-linear",
            "rank_pattern": {"qkv_proj": 3},
            "alpha_pattern": {"o_proj": 2},
        },
    ),
    "norms trained in full": (
        lambda: build("persimmon", tied=False, **_PERSIMMON).double(),
        {"target_modules": "all-linear", "modules_to_save": ["q_layernorm", "k_layernorm"]},
    ),
    "dropout in the plan": (llama, {"target_modules": ["q_proj", "down_proj"]}),
}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=tokens(0)).logits
    return logits


def late(case: str) -> tuple[bool, bool, dict[str, float]]:
    """Adapters on a sharded model: whether they begin as in one process, and are planned as those
    that were there before; and how far training is apart."""
    made, options = CASES[case]
    if case == "dropout in the plan":
        options = {**options, "lora_dropout": 0.4}
    unsharded, model = lora(made(), **options), lora(sharded(made()), **options)
    early = sharded(lora(made(), **options))
    begins = all(
        _equal(deepspeed_autotp.full_state_dict(ours), plain.state_dict())
        for ours, plain in (
            (model, unsharded),
            (model.base_model.model, unsharded.base_model.model),
        )
    )
    plans = {deepspeed_autotp.tensor_parallel(each).plan.hash for each in (model, early)}
    if case == "dropout in the plan":
        return begins, len(plans) == 1, {}
    found = apart(unsharded, model, (train_unsharded(unsharded), train_sharded(model)))
    return begins, len(plans) == 1, found


def merged(case: str, is_late: bool, folder: str) -> dict[str, float]:
    """How far merged, unmerged and unloaded weights are from those of one process, and training
    afterwards, with new adapters."""
    made, options = CASES[case]
    unsharded = lora(made(), **options).eval()
    model = (
        lora(sharded(made()), **options) if is_late else sharded(lora(made(), **options))
    ).eval()
    found = {}
    with unsharded.disable_adapter(), model.disable_adapter():
        found["disabled"] = float((_logits(unsharded) - _logits(model)).abs().max())
    for what in ("merge_adapter", "unmerge_adapter"):
        for each in (unsharded, model):
            getattr(each, what)()
        full = deepspeed_autotp.full_state_dict(model)
        found[what] = largest(full, unsharded.state_dict())
        found[f"{what}, logits"] = float((_logits(unsharded) - _logits(model)).abs().max())
    for each in (unsharded, model):
        each.merge_adapter()
    with unsharded.disable_adapter(), model.disable_adapter():  # PEFT unmerges in the forward
        found["merged, disabled"] = float((_logits(unsharded) - _logits(model)).abs().max())
    full = deepspeed_autotp.full_state_dict(model)
    found["unmerged in a forward"] = largest(full, unsharded.state_dict())
    unsharded, model = unsharded.merge_and_unload(), model.merge_and_unload()
    found["unload"] = largest(deepspeed_autotp.full_state_dict(model), unsharded.state_dict())
    deepspeed_autotp.save_pretrained(model, folder)
    read = type(unsharded).from_pretrained(folder, dtype=torch.float64)
    found["saved"] = largest(read.state_dict(), unsharded.state_dict())
    unsharded, model = (lora(each.train(), seed=4, **options) for each in (unsharded, model))
    again = apart(unsharded, model, (train_unsharded(unsharded), train_sharded(model)))
    return found | {f"{key} afterwards": value for key, value in again.items()}


def several(folder: str) -> tuple[dict[str, float], bool]:
    """Several adapters: added, trained alone and together, and deleted; how far all is from one
    process, and whether the same files are written."""
    from peft import LoraConfig

    options = {"target_modules": ["q_proj", "o_proj", "up_proj"]}
    both = lora(llama(), **options), lora(sharded(llama()), **options)
    for model in both:
        torch.manual_seed(4)
        second = LoraConfig(r=3, target_modules=["down_proj"], init_lora_weights=False)
        model.add_adapter("second", second)
        model.set_adapter("second")
    found = trained("second", *both)
    for model in both:
        model.base_model.set_adapter(["default", "second"])
    found |= trained("both", *both)
    places = Path(folder, "plain"), Path(folder, "ours")
    if dist.get_rank() == 0:
        both[0].save_pretrained(places[0])
    deepspeed_autotp.save_pretrained(both[1], places[1])
    written = [sorted(str(p.relative_to(at)) for p in at.rglob("*")) for at in places]
    for model in both:
        model.delete_adapter("default")
        model.set_adapter("second")
    return found | trained("one deleted", *both), dist.get_rank() > 0 or written[0] == written[1]


def blocked(folder: str) -> tuple[str, list[str]]:
    """The error of a save of three adapters, of which the last has a file in its place; and what
    is in the folder afterwards."""
    from peft import LoraConfig

    model = lora(sharded(llama()), target_modules=["q_proj"])
    for name in ("one", "two"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
    if dist.get_rank() == 0:
        Path(folder, "two").write_text("a file")
    dist.barrier()
    said = raised_error(lambda: deepspeed_autotp.save_pretrained(model, folder))
    dist.barrier()
    return said, sorted(str(each.relative_to(folder)) for each in Path(folder).rglob("*"))


# A model, where adapters are, and what is trained in full.
COPIES: list[tuple[Callable[[], nn.Module], list[str], list[str]]] = [
    (lambda: llama(tied=True), ["q_proj"], ["lm_head"]),
    (lambda: llama(tied=True), ["q_proj"], ["embed_tokens"]),
    (llama, ["q_proj"], ["lm_head", "norm"]),
    (_gpt2, ["c_attn"], ["lm_head"]),
    (_gpt2, ["c_attn"], ["wte", "c_fc", "ln_1"]),
]


def trained_in_full(is_late: bool, folder: str) -> dict[str, float]:
    """How far training, and the adapters that are saved of it, are from one process, with copies
    of heads and embeddings."""
    from safetensors.torch import load_file

    found: dict[str, float] = {}
    for at, (made, where, copied) in enumerate(COPIES):
        options = {"target_modules": where, "modules_to_save": copied}
        unsharded = lora(made(), **options)
        model = lora(sharded(made()), **options) if is_late else sharded(lora(made(), **options))
        found |= trained(f"{at}", unsharded, model)
        ours, plain = Path(folder, f"ours{at}"), Path(folder, f"plain{at}-{dist.get_rank()}")
        deepspeed_autotp.save_pretrained(model, ours)
        unsharded.save_pretrained(plain)
        files = [load_file(each / "adapter_model.safetensors") for each in (ours, plain)]
        found[f"{at}: saved"] = largest(*files)
    return found


FILES = {
    "target_modules": ["q_proj", "o_proj", "embed_tokens"],
    "modules_to_save": ["lm_head"],
}


def save(folder: str) -> tuple[list[str], str]:
    """Which files of late adapters differ from those of this process; and the error of PEFT's own
    save. A set in the configuration is written in another order by another process."""
    unsharded, model = lora(llama(), **FILES), lora(sharded(llama()), **FILES)
    ours, plain = Path(folder, "ours"), Path(folder, f"plain{dist.get_rank()}")
    deepspeed_autotp.save_pretrained(model, ours)
    unsharded.save_pretrained(plain)
    names = {file.name for at in (ours, plain) for file in at.iterdir() if dist.get_rank() == 0}
    differ = [name for name in names if (ours / name).read_bytes() != (plain / name).read_bytes()]
    return differ, raised_error(lambda: model.save_pretrained(plain))


def load(folder: str) -> tuple[bool, bool, dict[str, float]]:
    """Whether the files above come into a sharded model as they are, twice; and how far training
    is apart from one process with them."""
    from peft import PeftModel

    place = Path(folder, "ours")
    unsharded, model = (
        PeftModel.from_pretrained(base, place, is_trainable=True)
        for base in (llama(), sharded(llama()))
    )
    found = apart(unsharded, model, (train_unsharded(unsharded), train_sharded(model)))
    expected = PeftModel.from_pretrained(llama(), place).state_dict()
    model.load_adapter(place, "again")
    model.load_adapter(place, "default")
    full = deepspeed_autotp.full_state_dict(model)
    again = {name: full[name.replace(".default", ".again")] for name in expected}
    return _equal({name: full[name] for name in expected}, expected), _equal(again, expected), found


def shards_first(folder: str) -> dict[str, float]:
    """Adapters on a model that was never full on any rank, by PEFT and by transformers."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    found: dict[str, float] = {}
    if dist.get_rank() == 0:
        build("llama", tied=False).double().save_pretrained(folder)  # type: ignore[operator]
    dist.barrier()
    for way in ("peft", "transformers"):
        model = deepspeed_autotp.from_pretrained(
            AutoModelForCausalLM, folder, tp_size=dist.get_world_size(), dtype=torch.float64
        ).train()
        both = [build("llama", tied=False).double(), model]
        for at, each in enumerate(both):
            torch.manual_seed(3)
            if way == "peft":
                both[at] = lora(each, target_modules="all-linear")
            else:
                added: Any = each
                added.add_adapter(LoraConfig(target_modules=["o_proj"], init_lora_weights=False))
        found |= trained(way, *both)
    return found


def user_attributes() -> tuple[float, bool]:
    """The loss by a function that was set after sharding, with late adapters; and whether a
    forward that was put around the sharded one still runs."""
    model: Any = sharded(llama())
    calls = []
    model.loss_function = lambda logits, labels, **_: logits.sum() * 0 + 7
    inner = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = forward
    adapted = lora(model, target_modules=["q_proj"])
    loss = adapted(input_ids=tokens(0), labels=tokens(0)).loss
    return loss.item(), len(calls) == 1


def on_replicated_layers() -> dict[str, float]:
    """Kinds that only touch what stays replicated: norms, and DoRA beside the sharded layers."""
    import peft

    mlp = [("column", r".*(gate|up)_proj\.weight"), ("row", r".*down_proj\.weight")]
    specs = [{"patterns": [name], "partition_type": kind} for kind, name in mlp]
    rules = {"partition_config": {"use_default_specs": False, "layer_specs": specs}}
    found: dict[str, float] = {}
    for name, config, kind in (
        ("norms", {}, peft.LNTuningConfig(target_modules=["input_layernorm"])),
        ("DoRA", rules, peft.LoraConfig(target_modules=["q_proj"], use_dora=True)),
    ):
        both = []
        for _ in range(2):
            torch.manual_seed(3)
            both.append(peft.get_peft_model(llama(), kind))  # type: ignore[arg-type]
        deepspeed_autotp.parallelize(both[1], tp_size=dist.get_world_size(), config=config)
        found |= trained(name, *both)
    return found
