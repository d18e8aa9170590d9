"""Convert published checkpoints to folders of this project: LLaVE (and back), LLM2CLIP's vision encoders, and VLM2Vec.

    python tools/convert_weights.py LLaVE-7B llave-7b              # LlavaQwenForCausalLM -> transformers
    python tools/convert_weights.py llave-7b LLaVE-7B --original   # and back
    python tools/convert_weights.py LLM2CLIP-EVA02-L-14-336.pt llm2clip-eva02 --text-encoder TEXT_ENCODER
    python tools/convert_weights.py microsoft/LLM2CLIP-Openai-L-14-336 llm2clip-openai --text-encoder TEXT_ENCODER
    python tools/convert_weights.py VLM2Vec/VLM2Vec-V2.0 vlm2vec-v2 --adapters     # merged into their Qwen2-VL

All programs open original LLaVE checkpoints, of which they keep converted copies; this tool writes a folder to keep.
The conversion needs memory for the largest file of weights, or for all weights of an LLM2CLIP or a VLM2Vec.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.jobs.program import command_line
from pipeline.models.llave.weights import convert_original, export_original
from pipeline.models.llm2clip.weights import convert_released
from pipeline.models.qwen_vl.adapters import merge_vlm2vec


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", help="the folder to read; for LLM2CLIP also a .pt file or hub name")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--original", action="store_true", help="write the original format, from a Hugging Face folder")
    kinds.add_argument(
        "--text-encoder",
        metavar="FOLDER",
        help="SOURCE is a vision encoder of LLM2CLIP; this text encoder's vectors were its training data",
    )
    kinds.add_argument("--adapters", action="store_true", help="SOURCE holds adapters of VLM2Vec")
    parser.add_argument("--base", metavar="FOLDER", help="the adapters' Qwen2-VL (default: the one that they name)")
    arguments = parser.parse_args()
    if arguments.base and not arguments.adapters:
        parser.error("--base goes with --adapters")
    if arguments.adapters:
        merge_vlm2vec(arguments.source, arguments.out, arguments.base)
    elif arguments.text_encoder:
        convert_released(arguments.source, arguments.text_encoder, arguments.out)
    elif arguments.source.endswith(".pt"):
        parser.error("for a vision encoder of LLM2CLIP, name its --text-encoder")
    else:
        convert = export_original if arguments.original else convert_original
        convert(Path(arguments.source), arguments.out)
    print(f"{arguments.out}: converted from {arguments.source}")


if __name__ == "__main__":
    main()
