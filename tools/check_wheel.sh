#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Install a wheel into a folder of its own, as on a machine that has neither these sources nor a
# compiler, and use it from there with the Python that is given.
#
#   tools/check_wheel.sh PYTHON WHEEL
set -euo pipefail
python=$(realpath -s "$1")
wheel=$(realpath "$2")
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT

"$python" -m pip install --quiet --no-deps --no-index --target "$site" "$wheel"
cd "$site"

# What systems since 2021 have; a wheel built on a newer one may need more than is promised.
readonly OLDEST=GLIBC_2.34
newest=$(readelf --version-info deepspeed_autotp/*.so | grep -oE 'GLIBC_[0-9.]+' | sort -uV |
    tail -n 1)
if [ "$(printf '%s\n' "$OLDEST" "$newest" | sort -V | tail -n 1)" != "$OLDEST" ]; then
    echo "the wheel needs $newest, expected $OLDEST or earlier: build it on an older system" >&2
    exit 1
fi

if ! readelf --dynamic deepspeed_autotp/_core*.so | grep -q 'NEEDED.*libpcre2' &&
    ! grep -q Redistribution deepspeed_autotp/licenses/PCRE2; then
    echo "the wheel contains PCRE2, but not its licence" >&2
    exit 1
fi

PYTHONPATH=$site PATH=/usr/bin:/bin "$python" - <<'PROGRAM'
import pathlib
import torch
import deepspeed_autotp
from deepspeed_autotp.cli import main
from deepspeed_autotp.cli.page.page import environment
from deepspeed_autotp.native import operators, packing

here = pathlib.Path.cwd()
assert pathlib.Path(deepspeed_autotp.__file__).is_relative_to(here), deepspeed_autotp.__file__
library = operators.find_library()
assert library.reason or pathlib.Path(library.path).is_relative_to(here), library
full = torch.arange(12.0).view(3, 4)
assert packing.pack(full, view=(3, 4, 1), runs=(1, 2), shape=(3, 2)).tolist() == [[1, 2], [5, 6], [9, 10]]
if torch.cuda.is_available():
    shard = packing.pack(full.cuda(), view=(3, 4, 1), runs=(1, 2), shape=(3, 2))
    assert shard.tolist() == [[1, 2], [5, 6], [9, 10]] and not operators.unavailable_reason(0)
assert environment().get_template("page.html.j2")
main.main(["doctor"])
PROGRAM
