# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapters in a sharded model, put there before or after it was sharded."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.loss_curves import train_engine
from tests.support.raised_error import raised_error
from tests.support.resumed_runs import ADAM
from tests.support.small_models import build, tokens
from tests.support.training_loops import apart, make, train_sharded, train_unsharded


def _llama(**changes: Any) -> nn.Module:
    return make(num_key_value_heads=1, **changes)


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
    "one key/value head": (_llama, {"target_modules": "all-linear"}),
    "embedding and head": (_llama, {"target_modules": ["embed_tokens", "v_proj", "lm_head"]}),
    "trained in full": (
        _llama,
        {"target_modules": ["q_proj", "o_proj"], "modules_to_save": ["lm_head", "down_proj"]},
    ),
    "biases": (
        lambda: _llama(attention_bias=True, mlp_bias=True),
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
    "dropout in the plan": (_llama, {"target_modules": ["q_proj", "down_proj"]}),
}


def lora(model: nn.Module, seed: int = 3, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    known = {"r": 5, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return get_peft_model(model, LoraConfig(**{**known, **options}))  # type: ignore[arg-type]


def sharded(model: nn.Module) -> nn.Module:
    return deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size())


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def _largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert list(one) == list(other)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


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
        found[what] = _largest(full, unsharded.state_dict())
        found[f"{what}, logits"] = float((_logits(unsharded) - _logits(model)).abs().max())
    for each in (unsharded, model):
        each.merge_adapter()
    with unsharded.disable_adapter(), model.disable_adapter():  # PEFT unmerges in the forward
        found["merged, disabled"] = float((_logits(unsharded) - _logits(model)).abs().max())
    full = deepspeed_autotp.full_state_dict(model)
    found["unmerged in a forward"] = _largest(full, unsharded.state_dict())
    unsharded, model = unsharded.merge_and_unload(), model.merge_and_unload()
    found["unload"] = _largest(deepspeed_autotp.full_state_dict(model), unsharded.state_dict())
    deepspeed_autotp.save_pretrained(model, folder)
    read = type(unsharded).from_pretrained(folder, dtype=torch.float64)
    found["saved"] = _largest(read.state_dict(), unsharded.state_dict())
    unsharded, model = (lora(each.train(), seed=4, **options) for each in (unsharded, model))
    again = apart(unsharded, model, (train_unsharded(unsharded), train_sharded(model)))
    return found | {f"{key} afterwards": value for key, value in again.items()}


def several(folder: str) -> tuple[dict[str, float], bool]:
    """Several adapters: added, trained alone and together, and deleted; how far all is from one
    process, and whether the same files are written."""
    from peft import LoraConfig

    options = {"target_modules": ["q_proj", "o_proj", "up_proj"]}
    both = lora(_llama(), **options), lora(sharded(_llama()), **options)
    for model in both:
        torch.manual_seed(4)
        second = LoraConfig(r=3, target_modules=["down_proj"], init_lora_weights=False)
        model.add_adapter("second", second)
        model.set_adapter("second")
    found = _trained("second", *both)
    for model in both:
        model.base_model.set_adapter(["default", "second"])
    found |= _trained("both", *both)
    places = Path(folder, "plain"), Path(folder, "ours")
    if dist.get_rank() == 0:
        both[0].save_pretrained(places[0])
    deepspeed_autotp.save_pretrained(both[1], places[1])
    written = [sorted(str(p.relative_to(at)) for p in at.rglob("*")) for at in places]
    for model in both:
        model.delete_adapter("default")
        model.set_adapter("second")
    return found | _trained("one deleted", *both), dist.get_rank() > 0 or written[0] == written[1]


def blocked(folder: str) -> tuple[str, list[str]]:
    """The error of a save of three adapters, of which the last has a file in its place; and what
    is in the folder afterwards."""
    from peft import LoraConfig

    model = lora(sharded(_llama()), target_modules=["q_proj"])
    for name in ("one", "two"):
        model.add_adapter(name, LoraConfig(r=2, target_modules=["q_proj"]))
    if dist.get_rank() == 0:
        Path(folder, "two").write_text("a file")
    dist.barrier()
    said = raised_error(lambda: deepspeed_autotp.save_pretrained(model, folder))
    dist.barrier()
    return said, sorted(str(each.relative_to(folder)) for each in Path(folder).rglob("*"))


def _trained(what: str, unsharded: nn.Module, model: nn.Module) -> dict[str, float]:
    found = apart(unsharded, model, (train_unsharded(unsharded), train_sharded(model)))
    return {f"{what}: {key}": value for key, value in found.items()}


# A model, where adapters are, and what is trained in full.
COPIES: list[tuple[Callable[[], nn.Module], list[str], list[str]]] = [
    (lambda: _llama(tied=True), ["q_proj"], ["lm_head"]),
    (lambda: _llama(tied=True), ["q_proj"], ["embed_tokens"]),
    (_llama, ["q_proj"], ["lm_head", "norm"]),
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
        found |= _trained(f"{at}", unsharded, model)
        ours, plain = Path(folder, f"ours{at}"), Path(folder, f"plain{at}-{dist.get_rank()}")
        deepspeed_autotp.save_pretrained(model, ours)
        unsharded.save_pretrained(plain)
        files = [load_file(each / "adapter_model.safetensors") for each in (ours, plain)]
        found[f"{at}: saved"] = _largest(*files)
    return found


FILES = {
    "target_modules": ["q_proj", "o_proj", "embed_tokens"],
    "modules_to_save": ["lm_head"],
}


def save(folder: str) -> tuple[list[str], str]:
    """Which files of late adapters differ from those of this process; and the error of PEFT's own
    save. A set in the configuration is written in another order by another process."""
    unsharded, model = lora(_llama(), **FILES), lora(sharded(_llama()), **FILES)
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
        for base in (_llama(), sharded(_llama()))
    )
    found = apart(unsharded, model, (train_unsharded(unsharded), train_sharded(model)))
    expected = PeftModel.from_pretrained(_llama(), place).state_dict()
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
        found |= _trained(way, *both)
    return found


def refusals() -> tuple[dict[str, str], dict[str, float]]:
    """What cannot be put on a sharded model, and how far it trains from one process afterwards."""
    import peft
    from peft import LoraConfig, get_peft_model

    model: Any = sharded(_llama())
    names = [name for name, _ in model.named_modules()]
    where = ["q_proj", "o_proj"]
    kinds: dict[str, Any] = {
        "DoRA": LoraConfig(target_modules=where, use_dora=True),
        "PiSSA": LoraConfig(target_modules=where, init_lora_weights="pissa"),
        "tokens": LoraConfig(target_modules=where, trainable_token_indices=[1]),
        "IA3": peft.IA3Config(target_modules=where, feedforward_modules=[]),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "no such layer": LoraConfig(target_modules=["nope"]),
        "other ranks": LoraConfig(r=3 + dist.get_rank(), target_modules=where),
    }
    said = {}
    for name, kind in kinds.items():
        said[name] = raised_error(lambda kind=kind: get_peft_model(model, kind))  # type: ignore[misc]
        assert [each for each, _ in model.named_modules()] == names, name
    said["load_adapter"] = raised_error(lambda: model.load_adapter("folder"))
    twin = copy.deepcopy(model)
    said["copy"] = raised_error(lambda: lora(twin, target_modules=where))
    found = _trained("refused", _llama(), model)
    model = lora(model, target_modules=where)
    said["combined"] = raised_error(
        lambda: model.add_weighted_adapter(["default"], [1.0], "combined", "svd")
    )
    said["on meta"] = raised_error(
        lambda: model.add_adapter("more", LoraConfig(r=2), low_cpu_mem_usage=True)
    )
    said["safe merge"] = raised_error(lambda: model.merge_adapter(safe_merge=True))
    with deepspeed_autotp.gather_params(model):
        said["merged while gathered"] = raised_error(model.merge_adapter)
    model.eval()
    rows = ["default"] * len(tokens(0))
    said["a batch of adapters"] = raised_error(
        lambda: model(input_ids=tokens(0), adapter_names=rows)
    )
    model.train()
    said["safe unload"] = raised_error(lambda: model.merge_and_unload(safe_merge=True))
    other: Any = sharded(_llama())
    said["of transformers"] = raised_error(lambda: other.add_adapter(kinds["DoRA"]))
    assert not other._hf_peft_config_loaded
    q_proj = other.model.layers[0].self_attn.q_proj
    nn.utils.parametrize.register_parametrization(q_proj, "weight", nn.Identity())
    said["parametrized"] = raised_error(lambda: lora(other, target_modules=where))
    deepspeed_autotp.destroy(other)
    said["destroyed"] = raised_error(lambda: lora(other, target_modules=where))
    return said, found


def one_rank_fails() -> tuple[dict[str, str], dict[str, bool], dict[str, float]]:
    """What PEFT's changes say where rank 1 fails late in them, whether the model, as its adapters
    are noted on it, is then as it was, and how far it trains from one process afterwards."""
    from peft import LoraConfig

    options: dict[str, Any] = {"target_modules": ["q_proj", "o_proj", "embed_tokens"]}
    unsharded, model = lora(_llama(), **options), lora(sharded(_llama()), **options)
    plain: Any = sharded(_llama())
    more = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    said, same = {}, {}
    for what, owner, change in (
        ("merged", model, model.merge_and_unload),
        ("added", model, lambda: model.add_adapter("more", more)),
        ("deleted", model, lambda: model.delete_adapter("default")),
        ("of transformers", plain, lambda: plain.add_adapter(more)),
    ):
        before, noted = deepspeed_autotp.full_state_dict(owner), _noted(owner)
        before = {name: tensor.clone() for name, tensor in before.items()}
        with _failing_last(what):
            said[what] = raised_error(change)
        same[what] = _noted(owner) == noted
        found = _largest(deepspeed_autotp.full_state_dict(owner), before)
        same[what] = same[what] and found < 1e-12
    for each in (unsharded, model):
        torch.manual_seed(4)
        each.add_adapter("more", more)
        each.base_model.set_adapter(["default", "more"])
    return said, same, _trained("retried", unsharded, model)


@contextmanager
def _failing_last(what: str) -> Iterator[None]:
    """On rank 1 what PEFT does at the end of a change fails, after it was done."""
    from peft.tuners.tuners_utils import BaseTuner

    name = {"merged": "_unload_and_optionally_merge", "deleted": "delete_adapter"}
    watched: Any = getattr(BaseTuner, name.get(what, "inject_adapter"))
    cell = next(
        each for each in watched.__closure__ if each.cell_contents is watched.autotp_original
    )
    original = watched.autotp_original

    def failing(*args: Any, **kwargs: Any) -> Any:
        original(*args, **kwargs)
        if dist.get_rank() == 1:
            raise RuntimeError("this rank failed")

    cell.cell_contents = failing
    try:
        yield
    finally:
        cell.cell_contents = original


def _noted(model: nn.Module) -> list[Any]:
    """What PEFT keeps on the modules, beside tensors."""
    names = ("r", "scaling", "lora_alpha", "merged_adapters", "_active_adapter", "peft_config")
    names = (*names, "active_adapter", "_hf_peft_config_loaded", "_disable_adapters", "_keys")
    return [
        (at, type(module), [(key, str(vars(module).get(key))) for key in names])
        for at, module in model.named_modules()
    ]


def user_attributes() -> tuple[float, bool]:
    """The loss by a function that was set after sharding, with late adapters; and whether a
    forward that was put around the sharded one still runs."""
    model: Any = sharded(_llama())
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


def parts(folder: str) -> dict[str, str]:
    """The errors of what is given a module inside of the model that is sharded, and of a parameter
    that was replaced there."""
    early = sharded(lora(_llama(), target_modules=["q_proj"]))
    base: Any = early.get_base_model()
    late = lora(sharded(_llama()), target_modules=["q_proj"])
    inner = late.get_base_model()
    inner.lm_head.weight = nn.Parameter(inner.lm_head.weight.detach().clone())
    calls: dict[str, Callable[[], object]] = {
        "full_state_dict": lambda: deepspeed_autotp.full_state_dict(base),
        "clip_grad_norm_": lambda: deepspeed_autotp.clip_grad_norm_(base.model, 1.0),
        "a wrapper": lambda: deepspeed_autotp.clip_grad_norm_(nn.ModuleList([base.lm_head]), 1.0),
        "checkpoint_state": lambda: deepspeed_autotp.checkpoint_state(base),
        "save_pretrained": lambda: deepspeed_autotp.save_pretrained(base, folder),
        "own save_pretrained": lambda: base.save_pretrained(folder),
        "backbone's save_pretrained": lambda: base.model.save_pretrained(folder),
        "replaced": lambda: deepspeed_autotp.full_state_dict(inner),
    }
    return {name: raised_error(call) for name, call in calls.items()}


def other_kinds() -> dict[str, str]:
    """The errors of adapters that are not plain LoRA, in a model that is to be sharded."""
    import peft

    where = ["q_proj", "down_proj"]
    kinds: dict[str, Any] = {
        "dora": peft.LoraConfig(target_modules=where, use_dora=True),
        "alora": peft.LoraConfig(target_modules=where, alora_invocation_tokens=[1]),
        "tokens": peft.LoraConfig(target_modules=where, trainable_token_indices=[1]),
        "adalora": peft.AdaLoraConfig(target_modules=where, total_step=10),
        "ia3": peft.IA3Config(target_modules=where, feedforward_modules=["down_proj"]),
        "loha": peft.LoHaConfig(target_modules=where),
        "lokr": peft.LoKrConfig(target_modules=where),
        "oft": peft.OFTConfig(target_modules=where),
        "vera": peft.VeraConfig(target_modules=where),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "adaption": peft.AdaptionPromptConfig(
            task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1
        ),
    }
    said = {}
    for name, kind in kinds.items():
        model = peft.get_peft_model(_llama(), kind)  # type: ignore[arg-type]
        said[name] = raised_error(lambda model=model: sharded(model))  # type: ignore[misc]
    return said


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
            both.append(peft.get_peft_model(_llama(), kind))  # type: ignore[arg-type]
        deepspeed_autotp.parallelize(both[1], tp_size=dist.get_world_size(), config=config)
        found |= _trained(name, *both)
    return found


def make_engine(setting: Setting, *, is_late: bool = False, seed: int = 3) -> Any:
    """An engine that trains LoRA on a llama in float32."""
    model = build("llama", tied=False)
    if is_late:
        deepspeed_autotp.parallelize(model, tp_size=setting.tp)
    adapted = lora(model, seed, target_modules="all-linear")
    trained = [p for p in adapted.parameters() if p.requires_grad]
    config = engine_config(setting) | {"optimizer": ADAM}
    engine, *_ = deepspeed_autotp.initialize(model=adapted, model_parameters=trained, config=config)
    return engine


def engine_curve(setting: Setting, is_late: bool) -> tuple[list[float], dict[str, str]]:
    """Losses of an engine, and what of its adapters cannot be changed."""
    from peft import LoraConfig

    engine = make_engine(setting, is_late=is_late)
    losses = train_engine(engine, tp=setting.tp)
    said = {}
    if setting.tp > 1:
        more = LoraConfig(r=2, target_modules=["q_proj"])
        said["added"] = raised_error(lambda: engine.module.add_adapter("more", more))
        if setting.zero == 3:
            said["merged in place"] = raised_error(engine.module.merge_adapter)
        said["merged"] = raised_error(lambda: engine.module.merge_and_unload())
        said["deleted"] = raised_error(lambda: engine.module.delete_adapter("default"))
    model = engine.module
    engine.destroy()
    if is_late and setting.zero == 0:
        deepspeed_autotp.checkpoint_state(model)
        model.add_adapter("more", LoraConfig(r=2, target_modules=["q_proj"]))
    return losses, said


def save_engine(setting: Setting, is_late: bool, folder: str) -> list[float]:
    """The losses after a checkpoint."""
    engine = make_engine(setting, is_late=is_late)
    train_engine(engine, tp=setting.tp, steps=2)
    engine.save_checkpoint(folder)
    losses = train_engine(engine, tp=setting.tp, first=2, steps=2)
    engine.destroy()
    return losses


def load_engine(setting: Setting, folder: str) -> list[float]:
    """The losses of other adapters that load the checkpoint."""
    engine = make_engine(setting, seed=5)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    losses = train_engine(engine, tp=setting.tp, first=2, steps=2)
    engine.destroy()
    return losses
