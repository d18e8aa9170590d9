"""Training of multimodal embedding models with DeepSpeed.

The names in `__all__` are the public API; docs/api.md shows each. They are imported when they are first used, because
torch takes seconds to import.
"""

import gc
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.config import load_recipe as load_recipe
    from pipeline.data.order import Order as Order
    from pipeline.data.sample import Item as Item
    from pipeline.data.sample import Pair as Pair
    from pipeline.data.shards import write_shards as write_shards
    from pipeline.data.source import open_dataset as open_dataset
    from pipeline.embedding.embedder import Embedder as Embedder
    from pipeline.objectives.contrastive.loss import Distill as Distill
    from pipeline.objectives.contrastive.loss import Positives as Positives
    from pipeline.objectives.contrastive.loss import Teacher as Teacher
    from pipeline.objectives.contrastive.loss import hardness_weighted_loss as hardness_weighted_loss

_MODULES = {
    "Distill": "pipeline.objectives.contrastive.loss",
    "Embedder": "pipeline.embedding.embedder",
    "Item": "pipeline.data.sample",
    "Order": "pipeline.data.order",
    "Pair": "pipeline.data.sample",
    "Positives": "pipeline.objectives.contrastive.loss",
    "Teacher": "pipeline.objectives.contrastive.loss",
    "hardness_weighted_loss": "pipeline.objectives.contrastive.loss",
    "load_recipe": "pipeline.config",
    "open_dataset": "pipeline.data.source",
    "write_shards": "pipeline.data.shards",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _is_program() -> bool:
    """Whether this process runs one of the project's programs, and not somebody's own that imports the package.

    Programs start as `python -m pipeline.NAME`, as `pipeline-NAME`, or as `python tools/NAME.py`.
    """
    _, module, name = " ".join(sys.orig_argv).partition(" -m ")
    if module:
        return name.startswith("pipeline.")
    given = "".join(sys.argv[:1])
    if given not in sys.orig_argv:
        return False  # a worker that multiprocessing spawned has its parent's sys.argv, and never runs `command_line`
    script = Path(given)
    return (
        script.name.startswith("pipeline-") or script.resolve().parent == Path(__file__).resolve().parents[1] / "tools"
    )


if _is_program():  # the imports that follow take seconds, and look at the environment at once
    from pipeline import home, interrupt

    gc.disable()  # it would visit all imported objects again and again; `command_line` enables it
    interrupt.exit_while_importing()
    home.replace_if_unwritable()
