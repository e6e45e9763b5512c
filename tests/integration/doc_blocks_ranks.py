# SPDX-License-Identifier: Apache-2.0
"""The Python blocks of docs/, each with what stands before it in a script, to be run on ranks."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import deepspeed_autotp
from tests.support.small_models import VOCABULARY, build, tokens
from tests.support.trainer_script import Examples

TP = 2
Names = dict[str, Any]
# What a block says of sizes and devices that the tests do not have.
REPLACED = {"tp_size=4": "tp_size=2", '"autotp_size": 4': '"autotp_size": 2', '"cuda"': '"cpu"'}


def run(blocks: Mapping[str, str], folder: str) -> list[str]:
    """Run every block in a folder that the ranks share, and look at what it leaves."""
    with contextlib.chdir(folder):
        for place, text in blocks.items():
            prepare, check = BLOCKS[place]
            names: Names = {"torch": torch, "deepspeed_autotp": deepspeed_autotp} | prepare()
            for said, run_with in REPLACED.items():
                text = text.replace(said, run_with)
            exec(compile(text, place, "exec"), names)
            check(names)
            deepspeed_autotp.uninstall()
            dist.barrier()
    return list(blocks)


def llama(**changes: Any) -> Any:
    return build("llama", tied=False, **changes)


def written(**changes: Any) -> str:
    """The folder of a small model, which the first rank writes."""
    if dist.get_rank() == 0:
        llama(**changes).save_pretrained("model")
    dist.barrier()
    return "model"


class Own(nn.Module):
    """A block of attention and a feed-forward network, with names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        y: Tensor = x + self.fc2(F.gelu(self.fc1(x)))
        return y


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Own(), Own()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x)
        return y


def sharded() -> Names:
    return {"model": deepspeed_autotp.parallelize(llama(), tp_size=TP), "folder": "saved"}


def with_optimizer() -> Names:
    model = llama()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def for_accelerate() -> Names:
    import accelerate
    from accelerate import Accelerator, DeepSpeedPlugin

    names = with_optimizer()
    schedule = torch.optim.lr_scheduler.ConstantLR(names["optimizer"])
    loader = torch.utils.data.DataLoader(Examples(8, 1), batch_size=4)
    given = {"accelerate": accelerate, "loader": loader, "scheduler": schedule}
    return names | given | {"Accelerator": Accelerator, "DeepSpeedPlugin": DeepSpeedPlugin}


def for_fully_shard() -> Names:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    given = {"init_device_mesh": init_device_mesh, "fully_shard": fully_shard}
    return given | {"model": llama(), "replicas": 1, "tp_size": TP}


def for_loading() -> Names:
    from transformers import AutoModelForCausalLM

    return {"AutoModelForCausalLM": AutoModelForCausalLM, "path": written()}


def for_adapters() -> Names:
    from peft import LoraConfig, get_peft_model

    return for_loading() | {"LoraConfig": LoraConfig, "get_peft_model": get_peft_model}


def for_four_bits() -> Names:
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    names = for_adapters() | {"BitsAndBytesConfig": BitsAndBytesConfig}
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
    names["path"] = written(**sizes, num_key_value_heads=2)
    return names | {"prepare_model_for_kbit_training": prepare_model_for_kbit_training}


def for_distributed_checkpoint() -> Names:
    import torch.distributed.checkpoint as dcp

    model = deepspeed_autotp.parallelize(llama(), tp_size=TP)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    state: Names = deepspeed_autotp.checkpoint_state(model, optimizer)
    dcp.save(state | {"scheduler": schedule}, checkpoint_id="run/step-100")
    return {"model": model, "optimizer": optimizer, "scheduler": schedule}


def for_rules() -> Names:
    torch.manual_seed(0)
    return {"model": Stack(), "batch": torch.randn(2, 4, 32)}


def for_head() -> Names:
    torch.manual_seed(0)
    rules = [{"patterns": ["head"], "partition_type": "column"}]
    config = {"partition_config": {"layer_specs": rules}, "self_check": False}
    x, labels = torch.randn(3, 16), torch.tensor([1, 2, 3])
    full = Head()
    expected = F.cross_entropy(full(x), labels)
    model = deepspeed_autotp.parallelize(full, tp_size=TP, config=config)
    return {"model": model, "logits": model(x), "labels": labels, "expected": expected}


def is_sharded(names: Names) -> None:
    shards = names.get("engine", names["model"])
    assert deepspeed_autotp.tensor_parallel(shards).group.size == TP


def trains(names: Names) -> None:
    is_sharded(names)
    names["model"](input_ids=tokens(0), labels=tokens(0)).loss.backward()


def has_saved(*files: str) -> Callable[[Names], None]:
    def check(names: Names) -> None:
        assert [file for file in files if not Path(file).exists()] == []

    return check


def is_cross_entropy(names: Names) -> None:
    torch.testing.assert_close(names["loss"], names["expected"])


# What stands before a block, and what it leaves.
BLOCKS: dict[str, tuple[Callable[[], Names], Callable[[Names], None]]] = {
    "docs/quick-start.md: 4. What was sharded": (sharded, is_sharded),
    "docs/quick-start.md: 5. Save": (sharded, has_saved("saved/model.safetensors")),
    "docs/training.md: Data parallelism without DeepSpeed": (for_fully_shard, trains),
    "docs/training.md: Loading shards": (for_loading, trains),
    "docs/training.md: Loading shards 2": (for_loading, is_sharded),
    "docs/adapters.md: Adapters": (
        for_adapters,
        has_saved("adapter/adapter_config.json", "merged/model.safetensors"),
    ),
    "docs/adapters.md: On weights in 4 bits": (for_four_bits, trains),
    "docs/checkpoints.md: torch.distributed.checkpoint": (
        for_distributed_checkpoint,
        has_saved("run/step-200/.metadata"),
    ),
    "docs/custom-models.md: Rules": (for_rules, is_sharded),
    "docs/custom-models.md: Output head and loss": (for_head, is_cross_entropy),
    "docs/training.md: With DeepSpeed": (with_optimizer, is_sharded),
    "docs/trainer.md: Accelerate": (for_accelerate, trains),
}
# Run as whole scripts by test_readme.py.
SCRIPTS = {
    "README.md: Three ways in",
    "README.md: Three ways in 2",
    "README.md: Three ways in 3",
}
