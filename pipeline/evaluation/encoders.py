"""The models that can be evaluated: this project's, and the CLIP and SigLIP families (clip.py).

To evaluate any other model, write a function (path, options) -> Encoder and name it in the option `encoder`, as
`module:function` or `path/to/file.py:function`; to `pipeline.embed --shards` as --encoder. An example for
sentence-transformers, in texts.py:

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

    python -m pipeline.evaluate models/all-MiniLM-L6-v2 SETS encoder=texts.py:Texts
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pipeline.config import Encoding
from pipeline.data.batch import Encoded
from pipeline.data.sample import Item
from pipeline.errors import PipelineError
from pipeline.evaluation.encoder import Encoder, identity_of, model_folder
from pipeline.models.chunks import Features, chunk_tokens_for, embed_chunks, plan_chunks
from pipeline.models.family import Processor, SavedModelInterface
from pipeline.models.loading import config_dict
from pipeline.models.registry import FAMILIES, family_of

__all__ = ["ModelEncoder", "identity_of", "load_encoder"]

_PEERS = ("clip", "siglip", "siglip2")  # model types in transformers that clip.py opens


def load_encoder(path: str, options: Encoding, device: torch.device | None = None) -> Encoder:
    """Return the encoder for a folder or hub name, by its config's model_type or from the function in options.encoder.

    The weights are read when the first items are embedded.  device: None: the accelerator, or else the CPU.

    Raises PipelineError if there is no such model or function, for an unknown model_type, and if the function returns
    no Encoder.
    """
    if options.encoder:
        return _by_function(options.encoder, path, options)
    family, config = family_of(path), config_dict(path)
    model_type = config.get("model_type")
    device = torch.device(device or torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if model_type in _PEERS and (family is None or family.as_baseline(config)):
        from pipeline.evaluation.clip import ClipEncoder  # here: transformers' models take seconds to import

        return ClipEncoder.load(path, model_type, options, device)
    if family:
        return ModelEncoder.load(path, family, options, device)
    raise PipelineError(
        f"{path} is a {model_type} model; supported are {', '.join(FAMILIES)} and {', '.join(_PEERS)}. For another "
        "model write a function and pass encoder=FILE.py:FUNCTION, or to pipeline.embed --shards --encoder "
        "FILE.py:FUNCTION; pipeline/evaluation/encoders.py has an example"
    )


@dataclass(frozen=True)
class ModelEncoder:
    """An encoder for a model of this project, or for the DeepSpeed engine that trains it, including ZeRO-3.

    dimension: of the vectors.
    model: returns the model or its engine, and the features of a frozen part outside it; first called by `embed`.
    """

    name: str
    identity: str
    dimension: int
    model: Callable[[], tuple[Any, Features | None]]
    processor: Processor
    chunk_tokens: int | None
    device: torch.device
    instructed: bool = True

    @classmethod
    def load(cls, path: str, family: SavedModelInterface, options: Encoding, device: torch.device) -> "ModelEncoder":
        """Load a model from a folder or hub name. Raises the errors of `load_encoder`."""
        dimension, folder = family.dimension(path), model_folder(path)
        return cls(
            name=path,
            identity=identity_of(folder, options.precision, options.max_tokens, *options.video.identity),
            dimension=dimension,
            model=cache(partial(family.open, str(folder), options.precision, device)),
            processor=family.reader(str(folder), options.max_tokens, options.video.frames, options.video.fps),
            chunk_tokens=options.chunk_tokens,
            device=device,
            instructed=family.instructed,
        )

    @property
    def protocols(self) -> tuple[str, ...]:
        """See `Report`."""
        return getattr(self.processor, "protocols", ())

    @property
    def system_turn(self) -> bool:
        """Whether an item's instruction stands in the system's turn of the prompt."""
        return getattr(self.processor, "system_turn", False)

    def prepare(self, item: Item) -> Encoded:
        return self.processor.encode(item)

    def embed(self, prepared: Sequence[Encoded]) -> torch.Tensor:
        """Return (n, D) float32 unit rows. Collective: all ranks call it equally often, some perhaps without items."""
        model, features = self.model()
        pads = getattr(model, "module", model).pads  # an engine's module is the model
        chunk_tokens = self.chunk_tokens or chunk_tokens_for(pads)
        chunks = plan_chunks(prepared, chunk_tokens, self.device, padded=pads)
        if not chunks:  # no rank has items
            return torch.empty(0, self.dimension, device=self.device)
        return embed_chunks(model, chunks, len(prepared), features)


def _by_function(name: str, path: str, options: Encoding) -> Encoder:
    place, _, function = name.rpartition(":")
    if (module := _module(place) if place else None) is None:
        why = f"there is no {'file' if place.endswith('.py') else 'module'} {place}; " if place else ""
        raise PipelineError(f"encoder={name}: {why}write it as module:function or path/to/file.py:function")
    if not callable(make := getattr(module, function, None)):
        raise PipelineError(f"encoder={name}: {place} has no function {function}")
    encoder = make(path, options)
    wanted = ("name", "identity", "dimension", "instructed", "prepare", "embed")
    if missing := [attribute for attribute in wanted if not hasattr(encoder, attribute)]:
        raise PipelineError(
            f"encoder={name} returned a {type(encoder).__name__} without {', '.join(missing)}; "
            "pipeline/evaluation/encoder.py describes an Encoder"
        )
    return encoder


def _module(name: str) -> ModuleType | None:
    """Import a user's module; None if there is none. Errors inside it propagate, because their traceback explains."""
    if name.endswith(".py"):
        if not Path(name).is_file():
            return None
        spec = spec_from_file_location(Path(name).stem, name)
        assert spec and spec.loader  # always set for a .py file
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            return None
        raise  # the module exists, but one of its imports is missing
