"""Mine hard negatives: `python -m pipeline.mine MODEL SHARDS [key=value ...]`, on all processes of the launcher.

    python -m pipeline.mine runs/llave_7b/export s3://bucket/mmeb-train count=8
    torchrun --nproc-per-node 8 -m pipeline.mine llave-7b data/mmeb-train among=all out=s3://bucket/mined

MODEL is a folder or hub name. SHARDS is a dataset, or a folder (or s3:// prefix) with several. The model embeds all
items once; their vectors are kept as by `pipeline.embed --shards --items`, beside each dataset's index or in teacher=.
Every query is compared with all targets of its dataset, or with among=all of all datasets. What is likely right is
dropped, and of the nearest others `count` are kept: mined.json beside each index, or in out= (in out=/NAME for several
datasets), and beside it the references. A recipe uses them with data.negatives. With clusters=SIZE, samples that are
near each other are also composed to clusters of this size, for data.batches=neighbours.

If the program is killed and started again, it continues. The result does not depend on the number of processes.
"""

import argparse
import os

from pipeline.config import MiningRun, parse_options
from pipeline.distributed import end_distributed
from pipeline.embedding.mining import mine
from pipeline.errors import printable
from pipeline.jobs.program import command_line
from pipeline.storage import objects


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="key=value options:\n" + MiningRun.describe(),
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("shards", metavar="SHARDS")
    parser.add_argument("options", nargs="*", metavar="key=value", help="see below")
    arguments = parser.parse_args()
    options = parse_options(MiningRun, arguments.options)
    objects.configure(**options.store())
    mine(arguments.model, arguments.shards, options)
    if int(os.environ.get("RANK", 0)) == 0:
        place = f"in {options.out}" if options.out else f"beside the shards in {arguments.shards}"
        print(printable(f"the negatives are {place}: train with data.negatives={options.out or 'beside'}"))
    end_distributed()


if __name__ == "__main__":
    main()
