# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.support.prove``: cases of some seeds, or one; ``make prove``."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable

from tests.support.prove.case import Case
from tests.support.prove.drawing import draw_with, parse, parse_fields
from tests.support.prove.search import Verdict, reason, shrunk, verdict
from tests.support.worker_pool import Pool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--tp", type=int, help="instead of the TP size that is drawn")
    parser.add_argument("--only", default="", help='fields of each case: "autocast=True layers=2"')
    parser.add_argument("--case", help="one case, as it is printed")
    parser.add_argument("--minutes", type=float, default=1e9, help="no case begins after these")
    parser.add_argument("--no-shrink", action="store_true")
    parser.add_argument("-v", action="store_true", help="print each case")
    arguments = parser.parse_args()
    if arguments.case is not None:
        cases = iter([parse(arguments.case)])
    else:
        fixed = parse_fields(arguments.only)
        if arguments.tp is not None:
            fixed["tp"] = arguments.tp
        seeds = range(arguments.seed, arguments.seed + arguments.cases)
        cases = draw_with(seeds, fixed)
    pool = Pool(5)
    try:
        return search(pool, cases, arguments)
    finally:
        pool.close()


def search(pool: Pool, cases: Iterable[Case], arguments: argparse.Namespace) -> int:
    began, kinds, reasons, failures = time.monotonic(), Counter(), Counter(), 0
    shares, warned, last, blind = [], Counter(), None, []
    for case in cases:
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        last, start = case.seed, time.monotonic()
        found = verdict(pool, case)
        kinds[found.kind] += 1
        if arguments.v or arguments.case:
            print(f"{time.monotonic() - start:5.1f} s {found.kind} {found.share:.2f} {case}")
            print(*(f"        {line}" for line in (*found.warnings, found.text) if line), sep="\n")
        if found.kind == "refused":
            reasons[reason(found.text)] += 1
        elif found.kind == "blind":
            blind.append(f"{found.text[:300]}\n  {case}")
        elif found.kind == "same":
            shares.append(found.share * case.tp)
            warned.update({reason(each) for each in found.warnings})
        if found.is_failure:
            failures += 1
            report(pool, case, found, shrink=not (arguments.no_shrink or arguments.case))
        sys.stdout.flush()
    seconds = time.monotonic() - began
    print(f"{sum(kinds.values())} cases to seed {last} in {seconds:.0f} s: {dict(kinds)}")
    if shares:
        print(f"a rank holds {sum(shares) / len(shares):.2f} of its equal share of the parameters")
    for text in blind:
        print(f"too noisy to be compared: {text}")
    for title, counts in (("refused", reasons), ("warned", warned)):
        for text, count in counts.most_common():
            print(f"{title} {count:4}  {text}")
    return int(failures > 0)


def report(pool: Pool, case: Case, found: Verdict, *, shrink: bool) -> None:
    print(f"\nFAILED seed {case.seed}: {found.kind}: {found.text[:3000]}\n  {case}")
    print(f'  make prove CASE="{case}"', flush=True)
    if shrink:
        small, why = shrunk(lambda other: verdict(pool, other), case, found)
        print(f"  smallest: {why.kind}: {why.text[:1200]}")
        print(f'  make prove CASE="{small}"\n', flush=True)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
