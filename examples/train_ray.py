# SPDX-License-Identifier: Apache-2.0
"""The training of ``train_hosts.py`` under Ray Train, on the hosts of a Ray cluster.

    python examples/train_ray.py --workers 16 --tp 8 --gpu

Ray Train numbers the workers host by host, so that TP groups are within hosts where the TP size
divides the workers of each. Every host sees this folder.
"""

import argparse
import json
import sys
from pathlib import Path

from ray import train as ray_train
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

HERE = str(Path(__file__).resolve().parent)


def loop(options: dict) -> None:
    """One rank, whose process group Ray Train has made."""
    sys.path.insert(0, HERE)
    from train_hosts import train

    losses = train(tp=options["tp"], steps=options["steps"])
    ray_train.report({"loss": losses[-1]})
    if options["losses"] and ray_train.get_context().get_world_rank() == 0:
        Path(options["losses"]).write_text(json.dumps(losses))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=4, help="ranks, on all hosts together")
    parser.add_argument("--tp", type=int, default=2, help="TP size")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--losses", help="worker 0 writes the losses here, as JSON")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    options = parser.parse_args()
    TorchTrainer(
        loop,
        train_loop_config=vars(options),
        scaling_config=ScalingConfig(
            num_workers=options.workers, use_gpu=options.gpu, placement_strategy="PACK"
        ),
    ).fit()


if __name__ == "__main__":
    main()
