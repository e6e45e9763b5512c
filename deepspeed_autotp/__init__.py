# SPDX-License-Identifier: Apache-2.0
"""Automatic tensor parallelism for training, beside DeepSpeed.

initialize(...)            in place of deepspeed.initialize(...)
install()                  before a Hugging Face Trainer, Accelerate or TRL script
parallelize(model, ...)    in a torchrun loop without DeepSpeed
"""

import lazy_loader

__version__ = "0.1.0"

# What a name needs is imported when it is first used; __init__.pyi says where it is.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
