# SPDX-License-Identifier: Apache-2.0
"""The only package that uses objects of DeepSpeed, transformers, PEFT, TRL, mpu and meshes.

Every function reads an attribute that another library defines, or writes one that it reads. A new
version of such a library needs changes only here.

Internal: the public names are those of ``deepspeed_autotp`` itself.
"""
