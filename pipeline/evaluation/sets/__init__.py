"""Load evaluation sets by name, in the layouts that they have on disk or on S3."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial

from pipeline.data.index import INDEX_FILE
from pipeline.errors import PipelineError
from pipeline.evaluation.sets import captions, classification, mmeb, pairs
from pipeline.evaluation.tasks import Collection
from pipeline.storage import objects

NAMES = (*mmeb.GROUPS, *captions.SETS, *classification.SETS)


def load(
    sets: Sequence[str], *, instructed: bool = True, apart: bool = False, number: int = 0, count: int = 1
) -> Collection:
    """Return a collection of the datasets in `sets`: every `count`-th one, beginning with number `number`.

    sets: each is NAME=URL with a name in NAMES, or only a URL: a folder with tasks.json or MMEB's datasets, or shards
        of pairs.
    instructed: see Encoder.
    apart: queries of MMEB's datasets have their instructions apart from their texts; see `evaluation_rows`.

    Raises PipelineError if a set does not exist or lacks a file, and if two sets have the same name.
    """
    collection = Collection()
    adding = [add for each in sets for add in _datasets(each, instructed, apart)]
    for add in adding[number::count]:
        add(collection)
    times = Counter((task.name, task.direction) for task in collection.tasks)
    if twice := sorted({name for (name, _), number in times.items() if number > 1}):
        raise PipelineError(f"two evaluation sets have the name {', '.join(twice)}")
    return collection


def _datasets(given: str, instructed: bool, apart: bool) -> list[Callable[[Collection], None]]:
    name, _, url = given.partition("=")
    if name in mmeb.GROUPS and url:
        return list(mmeb.datasets(url, name, apart=apart).values())
    if (add := (captions.SETS | classification.SETS).get(name)) and url:
        return [partial(add, url=url, instructed=instructed)]
    if name in NAMES:
        raise PipelineError(f"{given}: add the location, such as {name}=/data/folder or {name}=s3://bucket/folder")
    if url and "/" not in name:
        shown = [each for each in NAMES if not each.startswith("mmeb/")] + ["mmeb/GROUP", "mmeb/DATASET"]
        raise PipelineError(f"there is no evaluation set {name!r}; the sets are {', '.join(shown)}")
    if objects.exists(objects.join(given, INDEX_FILE)):
        return [partial(pairs.add, url=given)]
    return list(mmeb.datasets(given, apart=apart).values())
