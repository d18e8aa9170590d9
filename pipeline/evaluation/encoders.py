"""The models that can be evaluated: our own, and peers of the CLIP and SigLIP families.

Any other is evaluated by a function (path, options) -> Encoder of your own, named by the option `encoder`, as
`module:function` or `path/to/file.py:function`. With sentence-transformers, for example, in texts.py:

    from pathlib import Path
    from pipeline.data.sample import BadSample
    from pipeline.evaluation.encoders import identity_of
    from sentence_transformers import SentenceTransformer

    class Texts:
        instructed = False

        def __init__(self, path, options):
            self.model = SentenceTransformer(path)
            self.name, self.identity = path, identity_of(Path(path))
            self.dimension = len(self.model.encode("any text"))

        def prepare(self, item):
            if item.images or item.video:
                raise BadSample("this model embeds texts only")
            return item.text

        def embed(self, texts):
            rows = self.model.encode(list(texts), normalize_embeddings=True, convert_to_tensor=True)
            return rows.float().reshape(len(texts), self.dimension)

    python -m pipeline.evaluate models/all-MiniLM-L6-v2 TASKS encoder=texts.py:Texts
"""

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Siglip2ImageProcessorPil,
    Siglip2Model,
    SiglipImageProcessorPil,
    SiglipModel,
)
from transformers.image_processing_backends import PilBackend
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from pipeline.config import EvaluationRun
from pipeline.data.collate import Encoded
from pipeline.data.sample import IMAGE_MARK, VIDEO_MARK, BadSample, Item
from pipeline.data.tiles import decode_image
from pipeline.data.video import sample_frames
from pipeline.errors import PipelineError
from pipeline.evaluation.encoder import Encoder
from pipeline.models.chunks import Features, chunk_tokens_for, embed_chunks, plan_chunks
from pipeline.models.embedder import load_model
from pipeline.models.llave import DTYPES, Processor, load_config
from pipeline.models.tower import refuse_missing
from pipeline.models.weights import SETTINGS, fetched, fingerprint, weight_files

_VERSION = 1  # to be raised where prompts, tiles, pooling or anything here changes what vectors an encoder gives


def load_encoder(path: str, options: EvaluationRun, device: torch.device | None = None) -> Encoder:
    """The model of a folder or hub name, by its config's model_type, or by the function that options.encoder names.

    Its weights are read when the first items are embedded.  device: None is the accelerator, if there is one.

    Raises PipelineError where there is no such model or function, for a kind of model that is not known here, and for
    what the function gives if it is no Encoder.
    """
    if options.encoder:
        return _by_function(options.encoder, path, options)
    if Path(path).is_dir() and not Path(path, "config.json").is_file():
        raise PipelineError(f"no model at {path!r}: it has no config.json")
    try:
        kind = PreTrainedConfig.get_config_dict(path)[0].get("model_type")
    except (OSError, ValueError) as error:
        raise PipelineError(f"no model at {path!r}: {str(error).splitlines()[0]}") from None
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if kind in PEERS:
        return ClipEncoder.load(path, kind, options, device)
    if kind in ("llava_onevision", "llava_qwen"):  # of the latter `load_config` says that it is to be converted
        return LlaveEncoder.load(path, options, device)
    raise PipelineError(
        f"{path} is a {kind} model; those known here are llava_onevision, {', '.join(PEERS)}. For any other write a "
        "function and name it by encoder=FILE.py:FUNCTION; pipeline/evaluation/encoders.py has an example"
    )


@dataclass(frozen=True)
class LlaveEncoder:
    """Our own model, or the engine that trains it, which may be of ZeRO-3.

    dimension: of its vectors.  model: gives a Llave or an engine of one when the first items are embedded.
    features: of a vision tower that is not part of the engine.
    """

    name: str
    identity: str
    dimension: int
    model: Callable[[], Callable[..., torch.Tensor]]
    processor: Processor
    chunk_tokens: int | None
    device: torch.device
    features: Features | None = None

    instructed: ClassVar[bool] = True

    @classmethod
    def load(cls, path: str, options: EvaluationRun, device: torch.device) -> "LlaveEncoder":
        """From a folder or hub name; errors as of `load_encoder`."""
        config = load_config(path)
        folder = _folder(path)
        return cls(
            name=path,
            identity=identity_of(folder, options.precision, options.max_tokens, options.video.frames),
            dimension=config.text_config.hidden_size,
            model=cache(partial(load_model, str(folder), options.precision, device)),
            processor=Processor.load(str(folder), options.max_tokens, options.video.frames),
            chunk_tokens=options.chunk_tokens,
            device=device,
        )

    def prepare(self, item: Item) -> Encoded:
        return self.processor.encode(item)

    def embed(self, prepared: Sequence[Encoded]) -> torch.Tensor:
        """(n, D) float32 unit rows. Collective: all ranks call it equally often, some perhaps without items."""
        model = self.model()
        pads = getattr(model, "module", model).pads  # an engine has the model as its module
        chunk_tokens = self.chunk_tokens or chunk_tokens_for(pads)
        chunks = plan_chunks(prepared, chunk_tokens, self.device, padded=pads)
        if not chunks:  # no rank has items
            return torch.empty(0, self.dimension, device=self.device)
        return embed_chunks(model, chunks, len(prepared), self.features)


# By the config's model_type.
PEERS: dict[str, tuple[type[PreTrainedModel], type[PilBackend]]] = {
    "clip": (CLIPModel, CLIPImageProcessorPil),
    "siglip": (SiglipModel, SiglipImageProcessorPil),
    "siglip2": (Siglip2Model, Siglip2ImageProcessorPil),
}


@dataclass(frozen=True)
class Prepared:
    """An item for a ClipEncoder.

    ids: (T,) int64 tokens of the text, if there is one.
    pictures: of each image and frame what the model takes by name; pixels are not normalised, uint8.
    """

    ids: torch.Tensor | None
    pictures: tuple[dict[str, torch.Tensor], ...]


@dataclass(frozen=True)
class ClipEncoder:
    """transformers' CLIP (arXiv 2103.00020), SigLIP (2303.15343) and SigLIP 2 (2502.14786).

    A picture is a unit vector; so are several images or the frames of a video: along the mean of theirs; and so is a
    text, cut at the model's context. What has both is the unit vector along the mean of the two, as MMEB's baselines
    fuse them (arXiv 2410.05160). Marks are taken out of texts, instructions stay.

    Each rank embeds its own items; nothing here is collective.
    """

    name: str
    identity: str
    dimension: int
    model: Callable[[], PreTrainedModel]
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    image_processor: PilBackend
    video_frames: int
    chunk_tokens: int
    device: torch.device

    instructed: ClassVar[bool] = False

    @classmethod
    def load(cls, path: str, kind: str, options: EvaluationRun, device: torch.device) -> "ClipEncoder":
        """From a folder or hub name with a model_type of PEERS; errors as of `load_encoder`."""
        model_class, processor_class = PEERS[kind]
        folder = _folder(path)
        named = get_tokenizer_config(folder).get("tokenizer_class")
        if named == "SiglipTokenizer" and not find_spec("sentencepiece"):
            # transformers would take another tokenizer for it, which leaves the punctuation in.
            raise PipelineError(f"{path} has a SentencePiece tokenizer: pip install sentencepiece")
        try:
            config = model_class.config_class.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            image_processor = processor_class.from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            raise PipelineError(f"no {kind} model at {path!r}: {str(error).splitlines()[0]}") from None
        encoder = cls(
            name=path,
            identity=identity_of(folder, options.precision, options.video.frames),
            dimension=config.projection_dim if kind == "clip" else config.text_config.projection_size,
            model=cache(partial(_peer, model_class, str(folder), options.precision, device)),
            config=config,
            tokenizer=tokenizer,
            image_processor=image_processor,
            video_frames=options.video.frames,
            chunk_tokens=options.chunk_tokens or chunk_tokens_for(padded=False),
            device=device,
        )
        encoder._tokenize("")  # sets the tokenizer's truncation, which threads must not do at once
        return encoder

    def prepare(self, item: Item) -> Prepared:
        """Raises BadSample if a picture cannot be decoded, or if the text's marks are not as many as they are."""
        for mark, count in ((IMAGE_MARK, len(item.images)), (VIDEO_MARK, int(item.video is not None))):
            if item.text.count(mark) != count:
                raise BadSample(f"{item.text.count(mark)} {mark} marks in the text, {count} expected")
        pictures = [decode_image(image) for image in item.images]
        if item.video is not None:
            pictures += sample_frames(item.video, self.video_frames)
        text = without_marks(item.text)
        return Prepared(
            ids=None if pictures and not text else self._tokenize(text),
            pictures=tuple(
                {
                    name: torch.from_numpy(np.asarray(value[0]))
                    for name, value in self.image_processor(picture, do_rescale=False, do_normalize=False).items()
                }
                for picture in pictures
            ),
        )

    @torch.no_grad()
    def embed(self, prepared: Sequence[Prepared]) -> torch.Tensor:
        rows = torch.zeros(len(prepared), self.dimension, device=self.device)
        texts = [(row, item.ids) for row, item in enumerate(prepared) if item.ids is not None]
        texts.sort(key=lambda text: -len(text[1]))
        for batch in _batches(texts, self.chunk_tokens // self._context):
            rows[[row for row, _ in batch]] = self._texts([ids for _, ids in batch])
        seen = torch.zeros_like(rows)
        pictures = [(row, picture) for row, item in enumerate(prepared) for picture in item.pictures]
        for batch in _batches(pictures, self.chunk_tokens // self._patches):
            owners = torch.tensor([row for row, _ in batch], device=self.device)
            seen.index_add_(0, owners, self._pictures([picture for _, picture in batch]))
        return F.normalize(rows + F.normalize(seen, dim=-1), dim=-1)

    @property
    def _context(self) -> int:
        return self.config.text_config.max_position_embeddings

    @property
    def _patches(self) -> int:
        vision = self.config.vision_config
        return vision.num_patches if "num_patches" in vision else (vision.image_size // vision.patch_size) ** 2

    def _tokenize(self, text: str) -> torch.Tensor:
        """(T,) int64. SigLIP reads lower case, padded to its context, as it was trained."""
        siglip = self.config.model_type != "clip"
        ids = self.tokenizer(
            text.lower() if siglip else text,
            truncation=True,
            max_length=self._context,
            padding="max_length" if siglip else False,
        )["input_ids"]
        return torch.tensor(ids)

    def _texts(self, texts: Sequence[torch.Tensor]) -> torch.Tensor:
        """(n, D) unit rows."""
        # CLIP pools the first end of text, and its attention is causal: it needs no mask of what is behind it. SigLIP
        # was trained without one.
        ids = pad_sequence(list(texts), batch_first=True)
        features = self.model().get_text_features(input_ids=ids.to(self.device)).pooler_output
        return F.normalize(features.float(), dim=-1)

    def _pictures(self, pictures: Sequence[dict[str, torch.Tensor]]) -> torch.Tensor:
        """(n, D) unit rows."""
        model = self.model()
        inputs = {name: torch.stack([p[name] for p in pictures]).to(self.device) for name in pictures[0]}
        inputs["pixel_values"] = self._normalised(inputs["pixel_values"]).to(model.dtype)
        return F.normalize(model.get_image_features(**inputs).pooler_output.float(), dim=-1)

    def _normalised(self, pixels: torch.Tensor) -> torch.Tensor:
        """As the image processor would have them, whose floats would be four times the bytes until they are needed.

        pixels: (n, 3, height, width); or of SigLIP 2 (n, patches, values) with the colour last in each patch.
        """
        settings = self.image_processor
        pixels = pixels.float()
        if settings.do_rescale:
            pixels *= settings.rescale_factor
        if settings.do_normalize:
            colours = pixels if pixels.ndim == 4 else pixels.unflatten(-1, (-1, 3)).movedim(-1, 1)
            mean, std = (
                torch.tensor(values, device=pixels.device)[:, None, None]
                for values in (settings.image_mean, settings.image_std)
            )
            colours.sub_(mean).div_(std)  # in place, also of a view
        return pixels


def without_marks(text: str) -> str:
    """An item's text without the marks of its images and video, and the white space around them."""
    return re.sub(rf"\s*({IMAGE_MARK}|{VIDEO_MARK})\s*", " ", text).strip()


def _batches(items: list, size: int) -> list[list]:
    size = max(size, 1)
    return [items[start : start + size] for start in range(0, len(items), size)]


def _peer(model_class: type[PreTrainedModel], path: str, precision: str, device: torch.device) -> PreTrainedModel:
    model, loaded = model_class.from_pretrained(path, dtype=DTYPES[precision], output_loading_info=True)
    refuse_missing(path, loaded)
    return model.eval().to(device)


def _folder(path: str) -> Path:
    folder = fetched(path)
    weight_files(folder)  # for its errors
    return folder


def identity_of(folder: Path, *options: object) -> str:
    """16 hexadecimal digits of a model folder and of the options that change its vectors.

    Not in it is what changes no more than their rounding: the device, its attention, the size of chunks.
    """
    digest = hashlib.sha256(json.dumps([_VERSION, fingerprint(str(folder)), *options]).encode())
    for file in sorted([*folder.glob("*.*"), *folder.glob("*/config.json")]):  # of sentence-transformers' modules
        if file.suffix in SETTINGS:
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode() + file.read_bytes())
        elif file.suffix in (".bin", ".pt"):  # of which the fingerprint knows the size alone
            digest.update(f"{file.relative_to(folder)} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _by_function(name: str, path: str, options: EvaluationRun) -> Encoder:
    module, _, function = name.rpartition(":")
    if not module or not function:
        raise PipelineError(f"encoder={name}: write it as module:function or path/to/file.py:function")
    make = getattr(_module(module), function, None)
    if not callable(make):
        raise PipelineError(f"encoder={name}: {module} has no function {function}")
    encoder = make(path, options)
    wanted = ("name", "identity", "dimension", "instructed", "prepare", "embed")
    if missing := [attribute for attribute in wanted if not hasattr(encoder, attribute)]:
        raise PipelineError(
            f"encoder={name} gives a {type(encoder).__name__} without {', '.join(missing)}; "
            "pipeline/evaluation/encoder.py says what an Encoder has"
        )
    return encoder


def _module(name: str) -> ModuleType:
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise PipelineError(f"encoder: there is no file {name}")
        spec = spec_from_file_location(Path(name).stem, name)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise PipelineError(f"encoder: there is no module {name} on Python's path") from None
        raise  # what it imports in turn is not there
