"""Write docs/recipe-fields.md, the list of all fields of a recipe, from their declarations.

python tools/recipe_fields.py
"""

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.config import EvaluationRun, Fixed, MiningRun, Recipe, Section
from pipeline.config.section import sections_of, tag_of

PAGE = ROOT / "docs/recipe-fields.md"

HEAD = """\
# All fields

This page is made from the code by `python tools/recipe_fields.py`. [Recipes](recipes.md) explains how fields are set;
`python -m pipeline.train --help` prints the same list.

"Resume" says whether a field may change when a stopped run is started again. A run also refuses to resume if the
content of its data or of the model that it began with changed.
"""

# What resuming fixes besides whole fields: pipeline/training/conditions.py.
PARTLY_FIXED = {
    "data.url": "yes, to the same data",
    "data.text_embeddings": "yes, to the same vectors",
    "data.teacher": "yes, to the same vectors",
    "data.negatives": "yes, to the same negatives",
    "data.neighbours": "yes, to the same clusters",
    "deepspeed": "yes, but not the ZeRO stage, nor offloading",
    "model.images": "yes, if images are read alike",
    "model.marks": "yes, if marks are read alike",
}
NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}
BOUNDS = {Gt: (">", "gt"), Ge: ("≥", "ge"), Lt: ("<", "lt"), Le: ("≤", "le")}


def page() -> str:
    """Return the page's text."""
    lines = [HEAD, "## The whole run", ""]
    lines += _section(Recipe, "", fixed=False, depth=2)
    for section, program in ((EvaluationRun, "pipeline.evaluate"), (MiningRun, "pipeline.mine")):
        lines += [f"## Options of {program}", "", "They are set in the same way, and are no part of a recipe.", ""]
        lines += _section(section, "", fixed=None, depth=2)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: type[Section], prefix: str, *, fixed: bool | None, depth: int) -> Iterator[str]:
    """Yield the table of a section's fields, then the sections below it.

    prefix: its dotted name with a dot.  fixed: whether all of it must not change; None for options, which have no such
    column.
    """
    rows, below = [], []
    for name, field in section.model_fields.items():
        options = sections_of(section, name)
        whole = fixed or any(isinstance(mark, Fixed) and mark.by is None for mark in field.metadata)
        if name not in section.hidden and (field.description or not options):
            cells = [f"`{prefix}{name}`", _type(field.annotation, field.metadata), _default(field)]
            if fixed is not None:
                rate_may = any(isinstance(mark, Fixed) and mark.by for mark in field.metadata)
                partly = PARTLY_FIXED.get(prefix + name, "yes")
                cells.append("no" if whole else "its rate only" if rate_may else partly)
            rows.append([*cells, (field.description or "").removesuffix("; its fields:")])
        for tag, inner in options.items():
            place = f"{prefix}{name}"
            title = f"{place}, if {place}.{tag_of(section, name)} is {tag}" if tag else place
            if get_origin(field.annotation) is list:
                title = f"each of {place}"
            inside = None if fixed is None else bool(whole)
            below.append((title, inner, "" if title.startswith("each") else f"{place}.", inside))
    heads = ["field", "type", "default", *([] if fixed is None else ["resume"]), "meaning"]
    if rows:
        yield from (_row(cells) for cells in (heads, ["---"] * len(heads), *rows))
        yield ""
    for title, inner, inner_prefix, inside in below:
        yield from (f"{'#' * min(depth, 4)} {title}", "")
        yield from _section(inner, inner_prefix, fixed=inside, depth=depth + 1)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;').replace('<', '&lt;') for cell in cells)} |"


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default()
    if isinstance(value, Section):
        return "see below"
    return "" if value == "" else f"`{json.dumps(value)}`"


def _type(annotation: Any, marks: Any = ()) -> str:
    """Describe a type in words.  marks: what limits its values."""
    arguments, origin = get_args(annotation), get_origin(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*arguments[1:], *marks])
    if origin is Literal:
        return _any_of(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        first, *rest = arguments
        return _any_of([_type(first, marks), *map(_type, rest)])
    if origin is list:
        return f"list of {_plural(_type(arguments[0]))}"
    if origin is tuple:
        return f"[{', '.join(map(_type, arguments))}]"
    if origin is dict:
        return "mapping" if arguments[1] is Any else f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    found = [(*BOUNDS[type(mark)], mark) for mark in marks if type(mark) in BOUNDS]
    bounds = [f"{sign} {getattr(mark, name):,}" for sign, name, mark in found]
    return " ".join([NAMES[annotation], ", ".join(bounds)]).strip()


def _any_of(options: Any) -> str:
    """Join alternatives; `null` comes last."""
    named = sorted(dict.fromkeys(options), key=lambda each: each == "null")
    return " or ".join(named)


def _plural(name: str) -> str:
    return name + "s" if name in ("text", "number", "integer", "section") else name


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
