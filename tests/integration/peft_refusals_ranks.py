# SPDX-License-Identifier: Apache-2.0
"""What the ranks of test_peft_refusals.py do: adapters and changes of them that are refused."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import deepspeed_autotp
from tests.support.peft_models import largest, llama, lora, sharded, trained
from tests.support.raised_error import raised_error
from tests.support.small_models import tokens


def refusals() -> tuple[dict[str, str], dict[str, float]]:
    """What cannot be put on a sharded model, and how far it trains from one process afterwards."""
    import peft
    from peft import LoraConfig, get_peft_model

    model: Any = sharded(llama())
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
    found = trained("refused", llama(), model)
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
    other: Any = sharded(llama())
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
    unsharded, model = lora(llama(), **options), lora(sharded(llama()), **options)
    plain: Any = sharded(llama())
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
        found = largest(deepspeed_autotp.full_state_dict(owner), before)
        same[what] = same[what] and found < 1e-12
    for each in (unsharded, model):
        torch.manual_seed(4)
        each.add_adapter("more", more)
        each.base_model.set_adapter(["default", "more"])
    return said, same, trained("retried", unsharded, model)


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


def parts(folder: str) -> dict[str, str]:
    """The errors of what is given a module inside of the model that is sharded, and of a parameter
    that was replaced there."""
    early = sharded(lora(llama(), target_modules=["q_proj"]))
    base: Any = early.get_base_model()
    late = lora(sharded(llama()), target_modules=["q_proj"])
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
        model = peft.get_peft_model(llama(), kind)  # type: ignore[arg-type]
        said[name] = raised_error(lambda model=model: sharded(model))  # type: ignore[misc]
    return said
