"""The prompts of Qwen-VL embedders: what stands around an item, and how its images are resized.

    chat      Qwen's chat template with an instruction in the system's turn: Qwen3-VL-Embedding, and this project's
              models. src/models/qwen3_vl_embedding.py of github.com/QwenLM/Qwen3-VL-Embedding, commit 8ce3aab
    gme       the same turns and an end token, other sizes of images: GME-Qwen2-VL (arXiv 2412.16855).
              gme_inference.py and modeling_gme_qwen2vl.py of Alibaba-NLP/gme-Qwen2-VL-2B-Instruct on the hub, the first
              as in src/model/baseline_backbone/gme of github.com/TIGER-AI-Lab/VLM2Vec, commit 6e1e1d4
    vlm2vec   the item alone: VLM2Vec-V2 (arXiv 2507.04590), and VLM2Vec's earlier models of Qwen2-VL.
              src/model/processor.py and src/model/vlm_backbone/qwen2_vl of the same repository and commit

All of them pool the last token's last hidden state, after the final norm, and normalise it to length 1.
"""

import math
from dataclasses import dataclass

from pipeline.models.qwen_vl.patches import MARKS, Patches

PREFIX = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

_FIRST = 4, 16384  # least and most tokens of an image after GME's first resize
_RATIO = 200  # the largest aspect ratio after it
_SMALL = 28  # pixels: VLM2Vec makes an image with a shorter side a square of twice this side


class GmePatches(Patches):
    """Resizes an image to whole tokens near its own size first, as GME's `fetch_image` does."""

    def first(self, height: int, width: int) -> tuple[int, int]:
        token, area, (least, most) = int(self.patch), height * width, _FIRST
        rows, columns = (max(1, round(side / token)) for side in (height, width))
        if rows * columns > most:
            beta = math.sqrt(area / (most * token**2))
            rows, columns = (max(1, math.floor(side / beta / token)) for side in (height, width))
        elif rows * columns < least:
            beta = math.sqrt(least * token**2 / area)
            rows, columns = (math.ceil(side * beta / token) for side in (height, width))
        return min(rows, _RATIO * columns) * token, min(columns, _RATIO * rows) * token


class Vlm2VecPatches(Patches):
    """Resizes an image with a side of less than 28 pixels to 56x56 first, as VLM2Vec's `Qwen2_VL_process_fn` does."""

    def first(self, height: int, width: int) -> tuple[int, int]:
        return (2 * _SMALL, 2 * _SMALL) if min(height, width) < _SMALL else (height, width)

    def tokens(self, height: int, width: int, *, anyres: bool) -> int:
        """Count the tokens of an image of this size, without marks around it."""
        return max(super().tokens(height, width, anyres=anyres) - MARKS, 0)


@dataclass(frozen=True)
class Prompt:
    """What stands around an item.

    prefix, suffix: before and after it; {} in the prefix is the instruction.
    instruction: the default; None: the prompt has no place for one.
    least, most: default limits of an image's tokens.
    marked: images stand between marks, and white space after them is removed.
    axes: positions of images have rows and columns. Otherwise they are those of a text: the code of GME calls the
        language model without positions, and that of VLM2Vec finds an image by the mark before it (`get_rope_index`).
    patches: cuts images.
    """

    prefix: str
    suffix: str
    instruction: str | None
    least: int
    most: int
    marked: bool = True
    axes: bool = True
    patches: type[Patches] = Patches


CHAT = "chat"
PROMPTS = {
    # The last token of this is pooled: a newline, unless the tokenizer adds tokens to each text.
    CHAT: Prompt(PREFIX, SUFFIX, "Represent the user's input.", 4, 1800),
    "gme": Prompt(
        PREFIX, SUFFIX + "<|endoftext|>", "You are a helpful assistant.", 256, 1280, axes=False, patches=GmePatches
    ),
    "vlm2vec": Prompt("", "", None, 4, 1280, marked=False, axes=False, patches=Vlm2VecPatches),
}
