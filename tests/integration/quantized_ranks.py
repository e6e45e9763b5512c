# SPDX-License-Identifier: Apache-2.0
"""LoRA on weights in 4 bits of bitsandbytes (QLoRA), sharded and in one process."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import deepspeed_autotp
from tests.support.engine_config import Setting, engine_config
from tests.support.raised_error import raised_error
from tests.support.small_models import build, tokens

STEPS = 5
# An epsilon beside which the rounding of gradients that are next to zero is small.
ADAMW = {"lr": 2e-3, "eps": 1e-4}
_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model, how it is quantised, and the ``tensor_parallel`` section."""

    family: str = "llama"
    sizes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    section: dict[str, Any] = field(default_factory=dict)


CASES = {
    "nested scales": Case(),
    "other blocks": Case(
        # The key/value head is on both ranks, and one of them has two thirds of the features.
        sizes={
            "num_key_value_heads": 1,
            "intermediate_size": 192,
            "attention_bias": True,
            "mlp_bias": True,
        },
        options={"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False},
        section={"tp_grain_size": 64},
    ),
    "fused layers": Case("phi3"),
}


def write(case: Case, folder: str, **changes: Any) -> str:
    """The model of ``case`` in floating point, written by the first rank."""
    if dist.get_rank() == 0:
        sizes = {**_SIZES, **case.sizes, **changes}
        build(case.family, tied=False, **sizes).save_pretrained(folder)
    dist.barrier()
    return folder


def quantized(folder: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    known: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
    }
    config = BitsAndBytesConfig(**{**known, **options})
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)
    # On some CPUs bitsandbytes evaluates in bfloat16, whatever the data type of the model is.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def lora(model: Any, *, prepared: bool = True) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if prepared:
        model = prepare_model_for_kbit_training(model)
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config)


def sharded(model: nn.Module, **section: Any) -> Any:
    return deepspeed_autotp.parallelize(model, tp_size=dist.get_world_size(), config=section)


def _backward(model: Any, step: int) -> float:
    loss = model(input_ids=tokens(step), labels=tokens(step)).loss
    loss.backward()
    return float(loss.detach())


def train(model: Any) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the full gradients of the first step."""
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), **ADAMW)
    losses: list[float] = []
    gradients: dict[str, Tensor] = {}
    for step in range(STEPS):
        losses.append(_backward(model, step))
        if not step:
            gradients = {name: _full_gradient(model, p) for name, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
    return losses, gradients


def _full_gradient(model: nn.Module, parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    try:
        state = deepspeed_autotp.tensor_parallel(model)
    except ValueError:
        return parameter.grad.clone()
    entry = state.entry(parameter)
    assert entry is not None
    if not entry.is_sharded:
        return parameter.grad.clone()
    return state.gather(parameter.grad, entry=entry)


def _apart(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    assert ours.keys() == plain.keys()
    return max(float((ours[name] - plain[name]).abs().max()) for name in plain)


def _adapters(model: Any) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    return {name: each.clone() for name, each in get_peft_model_state_dict(model).items()}


def _saved_adapters(model: nn.Module, folder: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    deepspeed_autotp.save_pretrained(model, folder)
    dist.barrier()
    return load_file(Path(folder, "adapter_model.safetensors"))


def bytes_of_layers(model: nn.Module) -> int:
    """Of the weights in 4 bits on this rank."""
    return sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8)


def parity(name: str, folder: str) -> tuple[dict[str, float], float]:
    """How far training is apart, and which part of the weights in 4 bits a rank has."""
    case = CASES[name]
    path = write(case, folder)
    plain, ours = (lora(quantized(path, **case.options)) for _ in range(2))
    full = bytes_of_layers(ours)
    sharded(ours, **case.section)
    losses, gradients = train(plain)
    own_losses, own_gradients = train(ours)
    return {
        "losses": max(abs(a - b) for a, b in zip(own_losses, losses, strict=True)),
        "gradients": _apart(own_gradients, gradients),
        "adapters": _apart(_saved_adapters(ours, f"{folder}/adapter"), _adapters(plain)),
    }, bytes_of_layers(ours) / full


def in_16_bits(folder: str) -> tuple[list[float], float]:
    """Losses of the first step with products in bfloat16: ours, and in one process; and the part of
    the weights that a rank has."""
    path = write(Case(), folder)
    plain, ours = (lora(quantized(path, torch.bfloat16)) for _ in range(2))
    full = bytes_of_layers(ours)
    sharded(ours)
    return [_backward(ours, 0), _backward(plain, 0)], bytes_of_layers(ours) / full


def other_weights(folder: str) -> tuple[float, float]:
    """How far the loss of ranks with different weights is from that of rank 0 alone, and that of a
    copy from it."""
    import copy

    own = [write(Case(), f"{folder}/{seed}", seed=seed) for seed in (0, 1)][dist.get_rank()]
    plain, ours = quantized(f"{folder}/0"), sharded(quantized(own))
    with torch.no_grad():
        logits = [each(input_ids=tokens(0)).logits for each in (plain, ours, copy.deepcopy(ours))]
    return tuple(float((logits[0] - each).abs().max()) for each in logits[1:])  # type: ignore[return-value]


WAYS = ("sequence parallelism", "torch.compile", "DDP")


def run_otherwise(way: str, folder: str) -> float:
    """How far losses are from those of one process; with DDP there are two replicas."""
    path = write(Case(), folder)
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model: Any = deepspeed_autotp.parallelize(
        lora(quantized(path), prepared=False),
        mesh=mesh["tp"],
        config={"sequence_parallel": way == "sequence parallelism"},
    )
    if way == "torch.compile":
        model = torch.compile(model, backend="aot_eager")
    elif way == "DDP":
        model = DistributedDataParallel(model, process_group=mesh["dp"].get_group())
    losses, expected = train(model)[0], train(lora(quantized(path), prepared=False))[0]
    return max(abs(a - b) for a, b in zip(losses, expected, strict=True))


def late(folder: str) -> tuple[float, float, dict[str, str]]:
    """An adapter that comes after sharding: how far its training is apart, and what it gives
    once it was loaded; and what is refused."""
    from peft import PeftModel

    path = write(Case(), folder)
    plain, ours = lora(quantized(path), prepared=False), lora(sharded(quantized(path)))
    losses, own_losses = train(plain)[0], train(ours)[0]
    _saved_adapters(ours, f"{folder}/adapter")
    again = PeftModel.from_pretrained(sharded(quantized(path)), f"{folder}/adapter")
    with torch.no_grad():
        logits, loaded = (each(input_ids=tokens(0)).logits for each in (ours.eval(), again.eval()))
    apart = max(abs(a - b) for a, b in zip(own_losses, losses, strict=True))
    calls = _refused_of(ours, folder)
    said = {name: raised_error(call) for name, call in calls.items()}
    assert type(ours.unload()).__name__ == "LlamaForCausalLM"
    return apart, float((logits - loaded).abs().max()), said


def _refused_of(model: Any, folder: str) -> dict[str, Callable[[], Any]]:
    return {
        "merge_and_unload": model.merge_and_unload,
        "merge_adapter": model.merge_adapter,
        "dequantize": model.dequantize,
        "full_state_dict": lambda: deepspeed_autotp.full_state_dict(model),
        "iter_full_parameters": lambda: list(deepspeed_autotp.iter_full_parameters(model)),
        "gather_params": lambda: deepspeed_autotp.gather_params(model).__enter__(),
        "checkpoint_state": lambda: deepspeed_autotp.checkpoint_state(model),
        "save_pretrained": lambda: deepspeed_autotp.save_pretrained(
            sharded(quantized(folder)), f"{folder}/all"
        ),
    }


def refusals(folder: str) -> dict[str, str]:
    """What is said of models that cannot be sharded."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    path = write(Case(), folder)
    odd = write(Case(sizes={"intermediate_size": 192}), f"{folder}/odd")
    eight = BitsAndBytesConfig(load_in_8bit=True)

    def load(**given: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, **given)

    def marked(method: str) -> nn.Module:
        model = build("llama", tied=False)
        model.config.quantization_config = {"quant_method": method, "bits": 4}
        return model

    def as_shards() -> None:
        with deepspeed_autotp.sharded_init(tp_size=2):
            quantized(path)

    storage = {"bnb_4bit_quant_storage": torch.bfloat16}
    said = {
        method: raised_error(lambda method=method: sharded(marked(method)))  # type: ignore[misc]
        for method in ("gptq", "awq", "hqq", "torchao", "quanto", "fp8", "compressed-tensors")
    }
    return said | {
        "8 bits": raised_error(lambda: sharded(load(quantization_config=eight))),
        "split blocks": raised_error(lambda: sharded(quantized(odd))),
        "head": raised_error(lambda: sharded(quantized(path, llm_int8_skip_modules=[]))),
        "storage": raised_error(lambda: sharded(quantized(path, **storage))),
        "integers": raised_error(lambda: sharded(_of_integers(), **_RULE)),
        "as shards": raised_error(as_shards),
    }


_RULE = {
    "partition_config": {
        "use_default_specs": False,
        "layer_specs": [{"patterns": [".*\\.0\\.weight$"], "partition_type": "column"}],
    }
}


def _of_integers() -> nn.Module:
    """A model that keeps a weight in 8 bits by means of its own."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8, bias=False)), nn.Linear(8, 8))
    integers = torch.ones(8, 8, dtype=torch.int8)
    model[0][0].weight = nn.Parameter(integers, requires_grad=False)  # type: ignore[index]
    return model


def make_engine(folder: str, setting: Setting) -> Any:
    adapted = lora(quantized(folder))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, **ADAMW)
    engine, *_ = deepspeed_autotp.initialize(
        model=adapted, optimizer=optimizer, config=engine_config(setting)
    )
    return engine


def _engine_losses(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        loss = engine(input_ids=tokens(step), labels=tokens(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def curve(folder: str) -> list[float]:
    """The losses of one process."""
    return train(lora(quantized(write(Case(), folder))))[0]


def engine_curve(folder: str, zero: int) -> tuple[list[float], list[float], int]:
    """Losses of an engine with a checkpoint in between, and those of another that loads it; and
    how many weights in 4 bits are in what a Trainer saves."""
    setting = Setting(tp=2, zero=zero, clip=0.0)
    engine = make_engine(folder, setting)
    losses = _engine_losses(engine, range(2))
    engine.save_checkpoint(f"{folder}/{zero}", exclude_frozen_parameters=True)
    losses += _engine_losses(engine, range(2, STEPS))
    engine.save_16bit_model(f"{folder}/{zero}", "saved.bin")
    engine.destroy()
    dist.barrier()
    saved = torch.load(f"{folder}/{zero}/saved.bin")
    rows = {tuple(t.shape) for name, t in saved.items() if "lora_B" in name}
    assert rows == {(128, 4), (256, 4)}, rows
    engine = make_engine(folder, setting)
    engine.load_checkpoint(f"{folder}/{zero}", load_module_strict=False)
    again = _engine_losses(engine, range(2, STEPS))
    engine.destroy()
    return losses, again, sum(tensor.dtype == torch.uint8 for tensor in saved.values())


def trainer(folder: str, tp: int, resumes: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a Trainer with ``install()``, which ``resumes`` from a checkpoint, and the adapter
    that it saves."""
    from safetensors.torch import load_file
    from transformers import Trainer, TrainingArguments

    from tests.support.trainer_script import Examples

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 1},
    }
    if tp > 1:
        config["tensor_parallel"] = {"autotp_size": tp}
    out = Path(folder, f"out{tp}")
    deepspeed_autotp.install()
    try:
        arguments = TrainingArguments(
            str(out), max_steps=4, logging_steps=1, save_steps=2, deepspeed=config, use_cpu=True,
            report_to=[], per_device_train_batch_size=4, disable_tqdm=True,
        )  # fmt: skip
        model = lora(quantized(folder))
        made = Trainer(model, arguments, train_dataset=Examples(32, seed=1))
        made.train(resume_from_checkpoint=str(out / "checkpoint-2") if resumes else None)
        made.save_model()
        dist.barrier()
        losses = [row["loss"] for row in made.state.log_history if "loss" in row]
        return losses, load_file(out / "adapter_model.safetensors")
    finally:
        deepspeed_autotp.uninstall()


def load_at_another_size(folder: str, zero: int) -> str:
    engine = make_engine(folder, Setting(tp=1, zero=zero, clip=0.0))
    said = raised_error(
        lambda: engine.load_checkpoint(f"{folder}/{zero}", load_module_strict=False)
    )
    engine.destroy()
    return said
