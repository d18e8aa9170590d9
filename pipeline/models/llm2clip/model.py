"""LLM2CLIP (arXiv 2411.04997): a vision encoder trained against a frozen language model's text vectors and an adapter.

A saved folder holds the vision encoder in transformers' format, which transformers loads by itself;
adapter.safetensors and llm2clip.json; and the text encoder in text_encoder/.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from pipeline.data.batch import Encoded
from pipeline.errors import PipelineError
from pipeline.models import released, sentence_transformers
from pipeline.models.chunks import Packed, sent
from pipeline.models.files import Tensors, fetched, read_json, read_tensors, survey
from pipeline.models.flops import StepFlops, image_flops, known, per_row, trains
from pipeline.models.folder import finish, share, write_card
from pipeline.models.loading import config_dict, reading
from pipeline.models.patches import embed_bytes
from pipeline.models.text_encoder.model import FrozenTextEncoder
from pipeline.models.text_encoder.model import step_flops as text_flops
from pipeline.models.two_tower import TwoTower
from pipeline.models.vision import Pixels, VisionEncoder

SETTINGS_FILE, ADAPTER_FILE, TEXT_ENCODER = "llm2clip.json", "adapter.safetensors", "text_encoder"


class TextAdapter(nn.Module):
    """Residual MLP blocks, a norm and a projection (arXiv 2411.04997; eva_clip/model.py of LLM2CLIP's code).

    width: of the text embeddings.  dimension: of the shared space.  blocks: four in the paper.
    """

    def __init__(self, width: int, dimension: int, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AdapterBlock(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, dimension)

    def forward(self, texts: torch.Tensor) -> torch.Tensor:
        """Map (n, width) embeddings, which need not be unit vectors, to (n, dimension) float32 unit rows."""
        x = F.normalize(texts, dim=-1).to(self.projection.weight.dtype)
        for block in self.blocks:
            x = block(x)
        return F.normalize(self.projection(self.norm(x)).float(), dim=-1)


class AdapterBlock(nn.Module):
    """x + MLP(norm(x)); the MLP's hidden layer is twice as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Llm2Clip(TwoTower):
    """A vision encoder, and an adapter on a frozen language model's text embeddings, `width` wide."""

    def __init__(self, vision: VisionEncoder, pixels: Pixels, width: int) -> None:
        super().__init__(pixels, vision.dimension)
        embed_bytes(vision, pixels.mean, pixels.std)
        self.vision, self.adapter, self.width = vision, TextAdapter(width, vision.dimension), width
        self.adapter.to(next(vision.parameters()).dtype)

    @classmethod
    def load(
        cls, path: str, dtype: torch.dtype | Literal["auto"], width: int, seed: int = 0, dimension: int | None = None
    ) -> "Llm2Clip":
        """Load from a vision encoder's folder or hub name, with the adapter of an LLM2CLIP or else a random one.

        dimension: of the shared space. Unless it is an LLM2CLIP, its projection is replaced by a random one.
        Raises PipelineError if the adapter was trained for another width, or is missing or damaged; or if an LLM2CLIP
        has another dimension.
        """
        vision, pixels = VisionEncoder.load(path, dtype), Pixels.load(path)
        if dimension and width_of(path) is None:
            vision.renew_projection(dimension, seed)
        if dimension and vision.dimension != dimension:
            raise PipelineError(
                f"{path} is an LLM2CLIP of {vision.dimension} dimensions: set model.dimension to that, or to null"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(vision, pixels, width)
        if (given := width_of(path)) is not None:
            if given != width:
                raise PipelineError(f"{path} was trained with vectors {given} wide; these are {width} wide")
            _fill(model.adapter, fetched(path) / ADAPTER_FILE)
        return model

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.vision(pixels)

    def texts(self, packed: Packed, features: torch.Tensor | None) -> torch.Tensor:
        if features is None:
            features = packed.text_vectors
        if features is None:  # of texts without vectors, or of a dummy text
            features = torch.zeros(max(packed.tiles_of.count(0), 1), self.width)
        return self.adapter(sent(features, packed.input_ids.device))


def step_flops(model: Llm2Clip, frozen: FrozenTextEncoder | None) -> StepFlops | None:
    """Return what counts a step's FLOPs; None if they are unknown.  frozen: the text encoder that runs in each step."""
    vision, size = model.vision, model.pixels.size
    if not known(vision):
        return None
    patch = next(each for each in vision.modules() if isinstance(each, nn.Conv2d)).stride[0]
    image = image_flops(vision.tower, size, vision.tokens - (size // patch) ** 2)
    adapter = per_row(model.adapter, inputs=trains(model.adapter))
    encoder = text_flops(frozen.model) if frozen else lambda *_: 0.0
    if encoder is None:
        return None

    def flops(items: Sequence[Encoded], logits: int) -> float:
        texts = [item for item in items if not item.images]
        images = image * sum(len(each.tiles) for item in items for each in item.images)
        return images + adapter * len(texts) + encoder(texts, logits)

    return flops


def width_of(path: str) -> int | None:
    """Return the width of an LLM2CLIP's text vectors; None if the folder or hub name is another model."""
    file = fetched(path, weights=False) / SETTINGS_FILE
    if not file.is_file():
        return None
    width = (found := read_json(file)).get("width")
    if found.keys() != {"width"} or isinstance(width, bool) or not isinstance(width, int) or not 0 < width < 2**20:
        raise PipelineError(
            f"{file}: {found} is not the width of the text encoder's vectors: copy the folder again, or was it written "
            "by a later version?"
        )
    return width


def _fill(adapter: TextAdapter, file: Path) -> None:
    """Load an adapter's weights from a file; PipelineError if they are damaged or do not match its shapes."""
    if not file.is_file():
        raise PipelineError(f"{file} is missing: copy the folder again, whole")
    survey(file.parent, [file])
    with reading(file):
        adapter.load_state_dict(read_tensors(file))


def save(model: Llm2Clip, text_encoder: str, folder: Path, base: str | None) -> None:
    """Write the model as a folder.

    text_encoder: folder or hub name of the text encoder.  base: the model that training started from.
    """
    model.vision.save(folder)
    save_beside(model.adapter.state_dict(), model.width, text_encoder, folder, base)


def save_beside(adapter: Tensors, width: int, text_encoder: str, folder: Path, base: str | None) -> None:
    """Write all but the vision encoder, which is in `folder` already.

    adapter: `TextAdapter`'s weights.  width: of the text encoder's vectors.  For the others see `save`.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter.items()}
    save_file(weights, folder / ADAPTER_FILE)
    (folder / SETTINGS_FILE).write_text(json.dumps({"width": width}, indent=2) + "\n")
    _copy(fetched(text_encoder), folder / TEXT_ENCODER)
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    encoder = folder / TEXT_ENCODER
    is_ready = sentence_transformers.describes(encoder, read_json(encoder / "config.json"))
    names = {"architecture": architecture, "sentence_embedder": is_ready}
    write_card(folder, Path(__file__).with_name("card.md.jinja"), base, **names)
    share(folder)


def _copy(source: Path, folder: Path) -> None:
    """Copy a text encoder's files, as hard links where possible; writing into a linked file changes both folders."""

    def copied(file: str, to: str) -> None:
        try:
            os.link(os.path.realpath(file), to)
        except OSError:
            shutil.copyfile(file, to)

    wanted = shutil.ignore_patterns("checkpoints", "*.unfinished", ".*", "*.py")
    shutil.copytree(source, folder, copy_function=copied, ignore=wanted, ignore_dangling_symlinks=True)
    folder.chmod(folder.stat().st_mode | 0o200)  # the source may be read-only
    # Exports of earlier versions lack the fields that `finish` adds, published text encoders their settings.
    finish(folder, released.fields_of(folder, read_json(folder / "config.json")))


def text_encoder_of(path: str) -> str:
    """Return the folder of an LLM2CLIP's text encoder. Raises PipelineError if there is none."""
    folder = str(fetched(path) / TEXT_ENCODER)
    config_dict(folder)
    return folder
