# SPDX-License-Identifier: Apache-2.0
"""TRL's trainers with options and second models, to be run on ranks."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from tests.support.small_models import build
from tests.support.trainer_script import Script, deepspeed_config
from tests.support.trl_loops import WORDS, low_words, tokenizer, training_data

_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}w1 {{ m['content'] }} w2 {% else %}"
    "{% generation %}{{ m['content'] }} <eos>{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}w3 {% endif %}"
)
# Name of the trainer's classes, what it takes beside a model, and options; those that are not here
# are in trl itself.
_GROUPS: dict[str, Any] = {"max_completion_length": 6, "num_generations": 4}
_TEACHER: dict[str, Any] = {"max_completion_length": 6}
_PAIR: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0}
_TRAINERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any]]] = {
    "sft": ("SFT", (), {}),
    "dpo": ("DPO", (), {}),
    "kto": ("KTO", (), {}),
    "reward": ("Reward", (), {}),
    "grpo": ("GRPO", ("rewards",), _GROUPS),
    "rloo": ("RLOO", ("rewards",), _GROUPS),
    "distillation": ("Distillation", ("teacher_model",), _TEACHER),
    "online_dpo": ("OnlineDPO", ("rewards",), _PAIR),
    "cpo": ("CPO", (), {}),
    "orpo": ("ORPO", (), {}),
    "tpo": ("TPO", (), {}),
    "gkd": ("GKD", ("teacher_model",), {"max_new_tokens": 6}),
    "iw_opd": ("IWOPD", ("teacher_model",), {**_TEACHER, "max_length": 40}),
    "gmpo": ("GMPO", ("rewards",), _GROUPS),
    "a2po": ("A2PO", ("rewards",), {"max_completion_length": 6, "num_value_samples": 4}),
    "sdft": ("SDFT", (), {**_GROUPS, "distillation_topk": 20}),
    "sdpo": ("SDPO", ("rewards",), {**_GROUPS, "success_reward_threshold": 0.2}),
}
_IN_TRL = ("sft", "dpo", "kto", "reward", "grpo", "rloo", "distillation")
_CHATS = ("gkd", "iw_opd", "sft chat")

Rewards = Callable[..., list[float]]


def save_models(folder: str) -> None:
    """The policy, another model, and a reward model."""
    from transformers import LlamaForSequenceClassification

    for name, seed in (("policy", 0), ("other", 7)):
        model: Any = build("llama", tied=False, vocab_size=WORDS + 2, seed=seed)
        model.save_pretrained(f"{folder}/{name}")
        tokenizer().save_pretrained(f"{folder}/{name}")
    model.config.num_labels, model.config.pad_token_id = 1, 0
    torch.manual_seed(3)
    LlamaForSequenceClassification(model.config).save_pretrained(f"{folder}/reward")


def _data(kind: str) -> Any:
    if kind in _CHATS:
        pairs = list(training_data("dpo", 40))
        turns = [
            [
                {"role": "user", "content": row["prompt"].strip()},
                {"role": "assistant", "content": row["chosen"]},
            ]
            for row in pairs
        ]
        return importlib.import_module("datasets").Dataset.from_dict({"messages": turns})
    if kind == "tpo":
        pairs = training_data("dpo", 40)
        best = [" ".join(reversed(text.split())) for text in pairs["chosen"]]
        return pairs.add_column("reference", best)
    if kind in ("sdft", "sdpo"):
        return training_data("grpo", 40).add_column("privileged_context", ["w5 w6 w7"] * 40)
    takes = _TRAINERS[kind][1]
    return training_data("grpo" if takes else kind, 40)


def _scored_by(model: Any) -> Rewards:
    """Rewards by a model that TRL does not know."""

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        texts = [a + b for a, b in zip(prompts, completions, strict=True)]
        given = tokenizer()(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits
        scores: list[float] = logits[:, 0].tolist()
        return scores

    return reward


def _rewards(kind: str, folder: str, tp: int, answers: list[str]) -> dict[str, Any]:
    """``kind`` says where a reward model is: sharded as the policy, on each rank in full, or
    sharded over half as many ranks; without, a function counts."""
    import deepspeed_autotp

    def counted(completions: list[str], **more: Any) -> list[float]:
        answers.extend(completions)
        return low_words(completions, **more)

    if not kind:
        return {"reward_funcs": counted}
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(f"{folder}/reward").eval()
    if kind == "sharded":
        return {
            "reward_funcs": [counted, model],
            "reward_processing_classes": [None, tokenizer()],
        }
    if kind == "other size" and tp > 1:
        deepspeed_autotp.parallelize(model, tp_size=tp // 2)
    return {"reward_funcs": [counted, _scored_by(model)]}


def run_options(
    kind: str, script: Script, rewards: str
) -> tuple[list[dict[str, float]], list[str]]:
    """Train a few steps; what the trainer logged, and the answers that this rank has rewarded."""
    import deepspeed
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    import deepspeed_autotp

    deepspeed.init_distributed(dist_backend="gloo")
    deepspeed_autotp.install()
    folder, answers = str(script.pretrained), list[str]()
    name, takes, options = _TRAINERS[kind.split()[0]]
    module = importlib.import_module(
        "trl" if kind.split()[0] in _IN_TRL else f"trl.experimental.{kind}"
    )
    more = dict(script.more)
    second: dict[str, Any] = {}
    for key in (*(each for each in takes if each != "rewards"), *more.pop("second", ())):
        second[key] = f"{folder}/other"
    arguments = getattr(module, f"{name}Config")(
        output_dir=script.out,
        max_steps=script.steps,
        logging_steps=1,
        bf16=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        deepspeed=deepspeed_config(script),
        **{
            "learning_rate": 3e-3,
            "per_device_train_batch_size": 4,
            "gradient_checkpointing": False,
            **options,
            **more,
        },
    )
    loader: Any = AutoModelForSequenceClassification if kind == "reward" else AutoModelForCausalLM
    words = tokenizer()
    if kind in _CHATS:
        words.chat_template = _CHAT
    trainer = getattr(module, f"{name}Trainer")(
        model=loader.from_pretrained(f"{folder}/{'reward' if kind == 'reward' else 'policy'}"),
        args=arguments,
        train_dataset=_data(kind),
        processing_class=words,
        **{key: AutoModelForCausalLM.from_pretrained(path) for key, path in second.items()},
        **(_rewards(rewards, folder, script.tp, answers) if "rewards" in takes else {}),
    )
    trainer.train()
    deepspeed_autotp.uninstall()
    return trainer.state.log_history, answers


def reward_curve(script: Script) -> tuple[list[float], list[str]]:
    """The mean reward of each step of GRPO, and the answers that this rank has rewarded."""
    history, answers = run_options("grpo", script, "")
    return [row["reward"] for row in history if "reward" in row], answers


def other_tp_size(first: int, second: int) -> str:
    """What a second engine says that asks for another TP size than the first."""
    import deepspeed_autotp

    def engine(size: int) -> None:
        deepspeed_autotp.initialize(
            model=build("llama", tied=False),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "tensor_parallel": {"autotp_size": size},
            },
        )

    engine(first)
    try:
        engine(second)
    except ValueError as error:
        return str(error)
    return ""
