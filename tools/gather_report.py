"""One report of several, each of other datasets of the same model.

    python tools/gather_report.py out/part-*.json --out out/report.json

The parts are what `python -m pipeline.evaluate ... part=i/N out=FILE` wrote, as the array job slurm/eval_mmeb.sh does.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.errors import command_line
from pipeline.evaluation.report import Report


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", metavar="REPORT", nargs="+", type=Path)
    parser.add_argument("--out", metavar="FILE", required=True, type=Path, help="the report to write, JSON")
    arguments = parser.parse_args()
    report = Report.merged([Report.read(part) for part in arguments.parts])
    report.write(arguments.out)
    report.print()


if __name__ == "__main__":
    main()
