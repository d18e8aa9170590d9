"""Does the pipeline learn from real pictures? Retrieval among all of Debian's colour emoji.

    apt-get install fonts-noto-color-emoji
    python benchmarks/emoji.py --work /tmp/emoji [key=value ...]

Renders every emoji that is one character and has a Unicode name, and writes a jsonl of (name, picture) and (picture,
name) pairs. Converts it with tools/make_shards.py, uploads it to a real S3 server, and trains the demo's tiny model
from random weights with the usual command. Prints Precision@1 among all emoji in both directions, before and after
training. Evaluation uses the training emoji: it only shows that real pictures are processed and distinguished.
"""

import argparse
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.errors import PipelineError
from pipeline.jobs.program import command_line
from tools.s3_server import S3Server

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
FONT_SIZE = 109  # the only size of its bitmaps
BLOCKS = [range(0x2300, 0x2400), range(0x2600, 0x27C0), range(0x1F000, 0x1FB00)]
SIDE = 48
DATASETS = ("Emoji-T2I", "Emoji-I2T")


def render(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """Return the emoji on white, SIDE pixels wide, or None if the font does not have it."""
    canvas = Image.new("RGBA", (136, 128), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((0, 0), character, font=font, embedded_color=True)
    if canvas.getchannel("A").getextrema()[1] == 0:
        return None
    white = Image.new("RGBA", canvas.size, "white")
    return Image.alpha_composite(white, canvas).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def write_rows(folder: Path) -> int:
    """Write the pictures and rows.jsonl; return the number of emoji. Emoji that look the same count once."""
    if not FONT.exists():
        raise PipelineError(f"{FONT} is missing: apt-get install fonts-noto-color-emoji")
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    seen, rows = set(), []
    for code in tqdm([code for block in BLOCKS for code in block], desc="rendering", unit=" characters"):
        name = unicodedata.name(chr(code), "").lower()
        picture = render(chr(code), font) if name else None
        if picture is None or picture.tobytes() in seen:
            continue
        seen.add(picture.tobytes())
        file = f"images/{code:x}.png"
        picture.save(folder / file)
        image, text = {"text": "<image>\nFind its name.", "images": [file]}, {"text": f"Find the emoji: {name}"}
        target = {"text": "<image>\nRepresent the emoji.", "images": [file]}
        rows.append({"dataset": DATASETS[0], "task": "retrieval", "query": text, "target": target})
        rows.append({"dataset": DATASETS[1], "task": "retrieval", "query": image, "target": {"text": name}})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(seen)


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder for the pictures and the run")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of pipeline/recipes/demo.yaml")
    arguments = parser.parse_args()
    if arguments.work.exists():
        raise PipelineError(f"{arguments.work} is there already: choose a new folder")
    count = write_rows(arguments.work)
    run, bucket = arguments.work / "run", "s3://pipeline-emoji"
    with S3Server("pipeline-emoji") as server:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        torchrun += ["--nproc-per-node", str(arguments.processes), "-m"]
        sets = [f"{bucket}/{name}" for name in DATASETS]
        overrides = [f"run={run}", f"data.url={bucket}", f"data.datasets=[{','.join(DATASETS)}]"]
        overrides += [f"evaluation.urls=[{','.join(sets)}]", *arguments.overrides]
        evaluation = [str(run / "export"), ",".join(sets), f"against={run}/evaluation/step-00000000.json"]
        for command in (
            [sys.executable, "tools/make_shards.py", "jsonl", str(arguments.work / "rows.jsonl"), bucket],
            [*torchrun, "pipeline.train", "pipeline/recipes/demo.yaml", *overrides],
            [*torchrun, "pipeline.evaluate", *evaluation],
        ):
            subprocess.run(command, check=True, cwd=ROOT, env=os.environ | server.environment())
    print(f"{count} emoji; both ways, among all of them.")


if __name__ == "__main__":
    main()
