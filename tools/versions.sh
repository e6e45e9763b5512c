#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Run the fast tests against other versions of what this package looks into.
#
#   tools/versions.sh deepspeed==0.19.7 transformers==5.22.0 ...
#
# Each argument is a requirement of pip. It is installed alone, without its dependencies, into a
# folder of build/versions that comes before .venv, and the tests run once for it. What fails under
# a version is printed; the exit status is the number of versions under which something failed.
set -euo pipefail
cd "$(dirname "$0")/.."

# What looks into the project of a requirement.
tests_of() {
    case $1 in
    trl*) echo tests/integration/test_trl.py tests/distributed/test_{gathered_weight,chunked_head}.py ;;
    peft*) echo tests/integration/test_{trl,peft}.py tests/distributed/test_{parallelize,save_pretrained}.py ;;
    bitsandbytes*) echo tests/unit/test_quantized.py tests/integration/test_quantized.py ;;
    *)
        # The C core looks into nothing, and what an import costs is another question.
        echo tests/unit --ignore=tests/unit/test_core_c.py --ignore=tests/unit/test_import.py
        echo tests/distributed/test_output_head.py
        echo tests/integration/test_{initialize,save,trl}.py
        ;;
    esac
}

readonly COMPILE='
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load()'

[ $# -gt 0 ] || {
    sed -n 's/^#   //p' "$0" >&2
    exit 2
}
failed=0
for requirement in "$@"; do
    folder="build/versions/$requirement"
    if [ ! -d "$folder" ]; then
        rm -rf "$folder.part"
        .venv/bin/python -m pip install --quiet --no-deps --target "$folder.part" "$requirement"
        mv "$folder.part" "$folder"
    fi
    # Another DeepSpeed compiles its operators anew: ahead of the tests, which have a time limit.
    extensions="$PWD/build/torch_extensions"
    if [[ $requirement == deepspeed* ]]; then
        extensions="$PWD/$folder.extensions"
        TORCH_EXTENSIONS_DIR="$extensions" PYTHONPATH="$PWD/$folder" DS_ACCELERATOR=cpu \
            .venv/bin/python -c "$COMPILE" >/dev/null || true  # the tests say more
    fi
    export AUTOTP_TEST_EXTENSIONS="$extensions"
    read -r -d '' -a tests < <(tests_of "$requirement") || true
    if PYTHONPATH="$PWD/$folder" .venv/bin/python -m pytest -q --numprocesses=2 \
        --dist=worksteal "${tests[@]}" >"$folder.log" 2>&1; then
        printf '%-28s %s\n' "$requirement" "$(tail -n 1 "$folder.log")"
    else
        failed=$((failed + 1))
        printf '%-28s %s\n' "$requirement" "$(tail -n 1 "$folder.log")"
        sed -n 's/^\(FAILED\|ERROR\) /    /p' "$folder.log"
    fi
done
exit "$failed"
