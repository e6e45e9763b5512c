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

readonly TESTS=(tests/unit tests/integration/test_initialize.py tests/integration/test_save.py)

[ $# -gt 0 ] || {
    sed -n 's/^#   //p' "$0" >&2
    exit 2
}
failed=0
for requirement in "$@"; do
    folder="build/versions/$requirement"
    if [ ! -d "$folder" ]; then
        .venv/bin/python -m pip install --quiet --no-deps --target "$folder.part" "$requirement"
        mv "$folder.part" "$folder"
    fi
    if PYTHONPATH="$PWD/$folder" .venv/bin/python -m pytest -q --numprocesses=2 \
        --dist=worksteal "${TESTS[@]}" >"$folder.log" 2>&1; then
        printf '%-28s %s\n' "$requirement" "$(tail -n 1 "$folder.log")"
    else
        failed=$((failed + 1))
        printf '%-28s %s\n' "$requirement" "$(tail -n 1 "$folder.log")"
        sed -n 's/^\(FAILED\|ERROR\) /    /p' "$folder.log"
    fi
done
exit "$failed"
