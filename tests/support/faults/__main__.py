# SPDX-License-Identifier: Apache-2.0
"""``make faults``: runs the cells; prints what a survivor of each is told, when all have ended, and
what is wrong with that."""

import argparse
import sys

from tests.support.faults.cell import TRANSPORTS, Cell, cells
from tests.support.faults.client import FaultServer
from tests.support.faults.expected import judged, values_of


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="cells that begin with these words")
    asked = parser.parse_args()
    bad = 0
    with FaultServer() as server:
        right = {
            way: values_of(server.run(Cell(way, "", "none", TRANSPORTS[0])).ranks[0])
            for way in ("loop", "engine")
        }
        right["exit"] = right["loop"]
        for cell in cells():
            if not str(cell).startswith(asked.only):
                continue
            found = judged(cell, server.run(cell), right[cell.way])
            bad += bool(found.wrong)
            print(f"{cell!s:44} {found.seconds:6.1f} s  {found.error[:110] or 'ends well'}")
            if found.wrong:
                print(f"    WRONG: {found.wrong}")
            sys.stdout.flush()
    sys.exit(f"{bad} cells are wrong" if bad else 0)


if __name__ == "__main__":
    main()
