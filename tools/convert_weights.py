"""Convert original LLaVE checkpoints to Hugging Face folders, and back.

    python tools/convert_weights.py LLaVE-7B llave-7b              # LlavaQwenForCausalLM -> transformers
    python tools/convert_weights.py llave-7b LLaVE-7B --original   # and back

Training accepts original checkpoints (model.path=...); evaluation and embedding need a converted one. The conversion
needs memory for the largest file of weights.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.jobs.program import command_line
from pipeline.models.llave.weights import convert_original, export_original


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="the folder to read")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--original", action="store_true", help="write the original format, from a Hugging Face folder")
    arguments = parser.parse_args()
    convert = export_original if arguments.original else convert_original
    convert(arguments.source, arguments.out)
    print(f"{arguments.out}: converted from {arguments.source}")


if __name__ == "__main__":
    main()
