"""Mined negatives in a run: the items of its batches, their lengths, and what is refused."""

import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from limits import HANG_SECONDS
from small_mining import NAMES, SAMPLES, WIDTH, Texts, mine, pair, references, write_datasets

from pipeline.config import Data, MiningRun, Part
from pipeline.data import plan, reader
from pipeline.data.arrays import array_of
from pipeline.data.batch import Batch, Encoded
from pipeline.data.index import Captions, Index
from pipeline.data.lengths import Lengths
from pipeline.data.mined import MINED_FILE, REFERENCE, MinedIndex, content_of, with_negatives
from pipeline.data.plan import PlannedWindow, Planner
from pipeline.data.reader import ReadSample, _read
from pipeline.data.sample import BadSample, Item, Pair
from pipeline.data.shards import ShardRecords, sample_bytes, write_shards
from pipeline.data.source import Source
from pipeline.data.stored_vectors import CAPTIONS, ITEMS, StoredVectors
from pipeline.data.stream import batches
from pipeline.data.tiles import Tiling
from pipeline.embedding import mining
from pipeline.embedding.dataset import open_datasets
from pipeline.embedding.embed_shards import embed_datasets
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage import s3 as objects_on_s3

LENGTHS = Lengths(Tiling(size=24, patches=3, pinpoints=((24, 24), (24, 48), (48, 24), (48, 48))), 8)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mined")
    write_datasets(folder)
    mine(folder, folder / "all", among="all", clusters=3)
    return folder


def data_of(shards: Path, negatives: str = "all", **changes: object) -> Data:
    parts = [{"name": name} for name in NAMES]
    options = {"lanes": 4, "block_samples": 8, "window_blocks": 2, "workers": 0, "negatives": str(shards / negatives)}
    return Data(**{"url": str(shards), "datasets": parts} | options | changes)


def encode(item: Item) -> Encoded:
    return Encoded(np.frombuffer(item.text.encode(), np.uint8).astype(np.int32))


def text(batch: Batch, content: int) -> str:
    return bytes(batch.items[content].input_ids.astype(np.uint8)).decode()


def read(data: Data, steps: range, rank: int = 0, world: int = 1) -> list[Batch]:
    source = Source.open(data)
    order = source.order(12, 5, LENGTHS)
    return list(batches(source, order, encode, steps, rank=rank, world=world, timeout=HANG_SECONDS))


def expected(shards: Path, folder: str) -> dict[str, list[str]]:
    """The mined targets of each sample, by its dataset, query and target."""
    own = [(name, i) for name in NAMES for i in range(SAMPLES[name])]
    firsts = {}
    for name in NAMES:
        sizes = [shard.samples for shard in Index.load(str(shards / name)).shards]
        firsts[name] = np.cumsum([0, *sizes])
    found = {}
    for name in NAMES:
        names = [each.name for each in MinedIndex.load(str(shards / folder / name)).datasets]
        for (_, i), row in zip(
            [each for each in own if each[0] == name], references(shards / folder, name), strict=True
        ):
            where = [(names[each["dataset"]], each["shard"], each["sample"]) for each in row if each["shard"] >= 0]
            mine = pair(name, i)
            targets = [pair(other, int(firsts[other][shard] + sample)).target.text for other, shard, sample in where]
            found[name, mine.query.text, mine.target.text] = targets
    return found


@pytest.mark.parametrize(("folder", "of"), [("mined", "mixed"), ("all", "mixed"), ("all", "neighbours")])
def test_batches_have_the_mined_negatives_on_any_ranks(shards, folder, of):
    data, steps = data_of(shards, folder, batches=of, neighbours=str(shards / "all")), range(15)
    wanted = expected(shards, folder)
    contents = None
    for world, workers in ((1, 0), (2, 0), (1, 2)):
        ranks = [read(data.model_copy(update={"workers": workers}), steps, rank, world) for rank in range(world)]
        rows = [
            (part.query[i], part.target[i], part.negatives[i], part.valid[i])
            for step in zip(*ranks, strict=True)
            for part in step
            for i in range(len(part.query))
        ]
        assert contents in (None, rows)
        contents = rows
    count = 0
    for part in ranks[0]:
        assert all(part.valid)
        for origin, query, target, negatives in zip(part.origins, part.query, part.target, part.negatives, strict=True):
            assert {*negatives} <= {*part.items}
            mined = [text(part, each) for each in negatives]
            assert mined == wanted[origin.shard.split("/")[-2], text(part, query), text(part, target)]
            count += len(mined)
    assert count > 300


def test_stored_vectors_of_mined_targets_come_along(shards, tmp_path):
    device, captions = torch.device("cpu"), open_datasets([str(shards)], str(tmp_path), CAPTIONS)
    embed_datasets(Texts(), captions, "fp16", device, overwrite=False)
    data = data_of(shards, teacher=str(shards / "vectors"), text_embeddings=str(tmp_path))
    source, texts, count = Source.open(data), Texts(), 0
    for shard, (_, info) in enumerate(source.shards):
        for number, read in _read_shard(source, shard, range(min(info.samples, 9))):
            record = source.records(shard, number, number + 1)[0]
            if not sample_is_readable(read.data[0]):
                with pytest.raises(BadSample, match="the teacher has no vectors"):
                    source.parse(shard, record, *read.data, mined=read.mined)
                continue
            found = source.parse(shard, record, *read.data, mined=read.mined).one_text(lambda n: 0)
            assert found.teacher.shape == (2 + len(found.negatives), WIDTH)
            for item, row in zip(found.items, found.teacher, strict=True):
                np.testing.assert_allclose(row, texts.prepare(item), atol=1e-3)  # stored in fp16
            for item in found.negatives:
                np.testing.assert_allclose(item.vector, texts.prepare(item), atol=1e-3)
                assert item.content_hash == Item(item.text).content_hash
                count += 1
    assert count > 50


def _bytes_of(read: ReadSample) -> int:
    return sum(map(len, read.data)) + sum(len(each) for _, tars in read.mined for each in tars)


def _read_shard(source: Source, shard: int, samples: range) -> list[tuple[int, ReadSample]]:
    known = [tar.records(samples.start, samples.stop) for tar in source.tars(shard)]
    references = source.references(shard, samples.start, samples.stop)
    with ThreadPoolExecutor(2) as pool:
        return list(_read(source, shard, samples.start, known, references, pool).items())


def sample_is_readable(data: bytes) -> bool:
    return b"unreadable" not in data


def test_datasets_outside_the_run_are_found_at_the_same_place(shards):
    """Only the first dataset is trained on, but its mined negatives are of both."""
    first = data_of(shards, datasets=[{"name": "first"}])
    source = Source.open(first)
    assert sorted(map(str, source.mined[0].numbers)) == ["0", "None"]
    wanted = expected(shards, "all")
    second = {pair("second", i).target.text for i in range(SAMPLES["second"])}
    second -= {pair("first", i).target.text for i in range(SAMPLES["first"])}
    found = set()
    for part in read(first, range(5)):
        for query, target, negatives in zip(part.query, part.target, part.negatives, strict=True):
            mined = [text(part, each) for each in negatives]
            assert mined == wanted["first", text(part, query), text(part, target)]
            found |= {*mined}
    assert found & second
    with pytest.raises(PipelineError, match=r"refers to the dataset second, whose stored vectors .* among=own"):
        Source.open(data_of(shards, datasets=[{"name": "first"}], teacher=str(shards / "vectors")))
    itself = Data(url=str(shards / "first"), negatives=str(shards / "mined" / "first"))
    assert Source.open(itself).mined[0].numbers == (0,)  # the folder's name does not matter
    # Without the samples' own negatives, of which they have none here, the mined ones stay.
    with_own, without = (read(data_of(shards, hard_negatives=own), range(1))[0] for own in (True, False))
    assert any(with_own.negatives) and with_own.negatives == without.negatives


def test_fingerprint_has_the_mined_negatives_only_if_they_are_used(shards):
    name = "the mined negatives' fingerprint"
    one, other = (Source.open(data_of(shards, folder)).fingerprints for folder in ("mined", "all"))
    without = Source.open(data_of(shards).model_copy(update={"negatives": None})).fingerprints
    assert len({one[name], other[name]}) == 2 and without[name] is None
    assert one | {name: None} == other | {name: None} == without
    assert Source.open(data_of(shards, "all")).fingerprints == other
    # Without any of these, it is the hash that runs of earlier versions stored.
    plain = "".join(Index.load(str(shards / each)).to_json() for each in NAMES)
    assert without["the data's fingerprint"] == hashlib.sha256(plain.encode()).hexdigest()


def test_memory_counts_the_referred_samples(shards, monkeypatch):
    source = Source.open(data_of(shards))
    order = source.order(12, 5, LENGTHS)
    window = next(each for each in Planner(source, order, range(4), range(2), 1) if isinstance(each, PlannedWindow))
    sizes = 0
    for piece, (shard, start, stop) in enumerate(window.pieces.tolist()):
        read = dict(_read_shard(source, shard, range(start, stop)))
        assert sum(each.size for each in read.values()) == window.bytes_of(piece)
        sizes += sum(len(data[0]) for each in read.values() for _, data in each.mined)
    assert sizes > 0
    total = sum(mined.index.total("referred_bytes") for mined in source.mined)
    with_teacher = Source.open(data_of(shards, teacher=str(shards / "vectors")))
    read = dict(_read_shard(with_teacher, 0, range(20)))
    sizes = np.array([[each.size, _bytes_of(each)] for each in read.values()])
    # 512 bytes are a block of a tar: vectors of a sample take 3 or 4.
    assert (abs(sizes[:, 0] - sizes[:, 1]) <= 3 * 512).all() and sizes[:, 0].mean() > 8 * 512
    monkeypatch.setattr(StoredVectors, "total_bytes", 1 << 30)
    needed = []
    for negatives in (None, str(shards / "all")):
        changes = {"negatives": negatives, "memory_mb": 1}
        opened = Source.open(data_of(shards, teacher=str(shards / "vectors")).model_copy(update=changes))
        with pytest.raises(PipelineError, match=r"take about \d+ MiB") as error:
            opened.check_memory(order, 1)
        needed.append(int(str(error.value).split("about ")[1].split()[0]))
    assert 3.5 * needed[0] < needed[1] < 5 * needed[0]  # of three references a sample
    assert total == sum(
        int(row["length"]) for name in NAMES for row in references(shards / "all", name).ravel() if row["shard"] >= 0
    )


def test_lengths_of_mined_negatives_are_those_of_own_ones():
    image = BytesIO()
    PIL.Image.new("RGB", (40, 24)).save(image, "png")
    picture = Item("<image> a", (image.getvalue(),))
    plain = Pair("a", "d", "", picture, Item("b"), (picture,))
    records = [ShardRecords() for _ in range(2)]
    for each, negatives in zip(records, ((), (picture, Item("some text"))), strict=True):
        for own in (plain, replace(plain, negatives=())):
            written = replace(own, negatives=(*own.negatives, *negatives))
            each.add(written, 0, sample_bytes(written))
    bare, full = (array_of(each.finish("a.tar", 1, "0" * 64)[1]) for each in records)
    mined = np.zeros((2, 3), REFERENCE)
    mined["shard"] = [0, -1, 4]
    mined["text"] = [len(picture.text), 77, len("some text")]
    mined["images"], mined["image_size"] = [1, 1, 0], (40, 24)
    np.testing.assert_array_equal(LENGTHS.of_records(with_negatives(bare, mined)), LENGTHS.of_records(full))


def test_negatives_of_other_shards_or_damaged_ones_are_refused(shards, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    changed = Data(url=str(folder), datasets=[{"name": "first"}], negatives=str(folder / "mined"))
    Source.open(changed)
    file = folder / "mined" / "first" / MinedIndex.load(str(folder / "mined" / "first")).parts[1].file
    content = bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    source = Source.open(changed)
    source.references(0, 0, 4)
    with pytest.raises(PipelineError, match=r"mined.npy is damaged \(records"):
        source.references(1, 0, source.shards[1][1].samples)
    assert len(source.mined[0].index.damaged(str(folder / "mined" / "first"))) == 1
    index = folder / "all" / "first" / MINED_FILE
    index.write_text(index.read_text().replace('"count": 3', '"count": 4'))
    with pytest.raises(PipelineError, match="its checksum differs"):
        Source.open(changed.model_copy(update={"negatives": str(folder / "all")}))
    write_shards((pair("second", i) for i in range(50)), folder / "second", dataset="second")
    other = changed.model_copy(update={"datasets": [Part(name="second")]})
    with pytest.raises(
        PipelineError, match=r"belongs to other shards than those of .*second: mine its negatives again"
    ):
        Source.open(other)
    shutil.copy(shards / "all" / "first" / MINED_FILE, index)
    with pytest.raises(PipelineError, match=r"refers to other shards or captions than those of .*second: mine"):
        Source.open(changed.model_copy(update={"negatives": str(folder / "all")}))


def test_negatives_of_other_captions_are_refused(shards):
    """A dataset in img2dataset's layout can be indexed again with other texts: its tars stay the same."""
    index = Index.load(str(shards / "first"))
    captions = Captions("<image>", ("txt",), "task")
    hashes = {content_of(replace(index, captions=each)) for each in (None, captions, replace(captions, query="of"))}
    hashes.add(content_of(replace(index, captions=replace(captions, columns=("txt", "long")))))
    assert len(hashes) == 4
    assert content_of(replace(index, captions=replace(captions, task="other"))) in hashes
    mined = MinedIndex.load(str(shards / "mined" / "first"))
    with pytest.raises(PipelineError, match=r"mined.json was mined with other captions or another query than first"):
        mined.check("", "first", replace(index, captions=captions))


@pytest.mark.parametrize("of", ["mixed", "neighbours"])
def test_files_of_another_mining_or_shard_are_refused(shards, tmp_path, of):
    """They can have the same size and be intact."""
    shutil.copytree(shards / "all", tmp_path / "all")
    mine(shards, tmp_path / "other", among="all", margin=None)
    parts = MinedIndex.load(str(shards / "all" / "first")).parts
    ours = [tmp_path / "all" / "first" / part.file for part in parts[:2]]
    other = tmp_path / "other" / "first" / parts[0].file
    assert {path.stat().st_size for path in (*ours, other)} == {parts[0].size}
    data = data_of(shards, batches=of, neighbours=str(shards / "all"), negatives=str(tmp_path / "all"))
    kept = Source.open(data).references(0, 0, 4)
    assert kept.dtype == REFERENCE if of == "mixed" else kept.dtype.itemsize == 34  # bytes
    for file in (other, ours[1]):
        shutil.copy(file, ours[0])
        with pytest.raises(PipelineError, match=r"mined.npy is damaged \(records 0-"):
            Source.open(data).references(0, 0, 4)


def test_bad_and_repeated_references(shards):
    """A sample with an unreadable mined negative is bad; one that equals an own item is left out."""
    source = Source.open(data_of(shards))
    ((_, first),) = _read_shard(source, 0, range(1))
    record = source.records(0, 0, 1)[0]
    whole = source.parse(0, record, *first.data, mined=first.mined)
    assert len(whole.negatives) == 3
    (reference, (data,)), *others = first.mined
    assert source.parse(0, record, *first.data, mined=[(reference, (data,)), *first.mined]) == whole
    own = sample_bytes(replace(whole, negatives=whole.negatives[:1]))
    assert source.parse(0, record, own, mined=first.mined) == whole
    with pytest.raises(BadSample, match=r"its mined negative .*tar#\d+: not a tar"):
        source.parse(0, record, *first.data, mined=[(reference, (b"x" * 600,)), *others])


def test_mined_and_read_on_s3(s3, tmp_path):
    """Shards, vectors and references in a bucket; the scratch file is local."""
    url = "s3://pipeline-tests/mined"
    write_datasets(tmp_path)
    for path in tmp_path.glob("*/*"):
        if path.parent.name in NAMES:
            objects.write(f"{url}/{path.relative_to(tmp_path)}", path)
    run = MiningRun(among="all", count=3, depth=20, scratch=str(tmp_path))
    mining.mine_datasets(Texts(), open_datasets([url], None, ITEMS), url, run, torch.device("cpu"))
    mine(tmp_path, tmp_path / "all", among="all")
    for name in NAMES:
        assert objects.read(f"{url}/{name}/{MINED_FILE}") == (tmp_path / "all" / name / MINED_FILE).read_bytes()
    options = {"datasets": [Part(name=name) for name in NAMES], "lanes": 4, "block_samples": 8, "workers": 0}
    remote = read(Data(url=url, negatives="beside", **options), range(3))
    readers = reader._SAMPLE_THREADS + reader._REFERRED_THREADS + plan.THREADS
    assert 12 + 16 <= readers <= objects_on_s3._client().meta.config.max_pool_connections
    local = read(Data(url=str(tmp_path), negatives=str(tmp_path / "all"), **options), range(3))
    assert [each.negatives for each in remote] == [each.negatives for each in local]
    assert any(map(any, (each.negatives for each in remote)))
