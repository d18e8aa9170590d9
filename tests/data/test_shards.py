import hashlib
import json
import os
import subprocess
import tarfile
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pipeline.data.index import Captions, Index, load_sidecar, read_records, read_samples
from pipeline.data.sample import BadSample, Item, Pair, Single
from pipeline.data.shards import parse_sample, sample_bytes, tar_bytes, write_shards
from pipeline.data.tiles import image_format
from pipeline.data.video import video_format
from pipeline.errors import PipelineError
from pipeline.storage import objects
from pipeline.storage.objects import ObjectError

DEEP = b"[" * 200_000 + b"]" * 200_000  # JSON that is nested too deeply for any parser


def picture(number: int, format: str = "PNG") -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (10 + number, 20 + number), (number, 0, 0)).save(buffer, format)
    return buffer.getvalue()


def make_pairs(count: int = 23) -> list[Pair]:
    formats = ("PNG", "JPEG", "WEBP", "GIF")
    pairs = []
    for number in range(count):
        images = tuple(picture(number + i, formats[(number + i) % 4]) for i in range(number % 13))
        negatives = tuple(Item(f"<image> no {i}", (picture(50 + i),)) for i in range(number % 3))
        query = Item("<image>" * len(images) + f"Frage {number} ü 图", images)
        target = Item(f"answer {number}", video=b"film" if number == 4 else None)
        alternatives = tuple(f"{'ü' * i} answer {number}" for i in range(number % 4))
        pairs.append(Pair(f"{number:06d}", "Mixed", "vqa", query, target, negatives, alternatives))
    return pairs


@pytest.fixture(params=["file", "s3"])
def dataset(request, tmp_path):
    """Return the URL and the pairs of a dataset of several shards."""
    pairs = make_pairs()
    index = write_shards(iter(pairs), tmp_path / "data", dataset="Mixed", shard_bytes=60_000)
    assert len(index.shards) > 2
    if request.param == "file":
        return str(tmp_path / "data"), pairs
    request.getfixturevalue("s3")
    url = f"s3://pipeline-tests/shards/{tmp_path.name}"
    for path in (tmp_path / "data").iterdir():
        objects.write(objects.join(url, path.name), path)
    return url, pairs


def test_shards_round_trip(dataset):
    url, pairs = dataset
    index = Index.load(url)
    assert (index.dataset, index.samples) == ("Mixed", len(pairs))
    read = []
    for shard in index.shards:
        sidecar = load_sidecar(url, shard)
        assert objects.size(objects.join(url, shard.file)) == shard.size
        assert hash(shard) == hash(replace(shard))  # caches use shards as keys
        read += map(parse_sample, read_samples(url, shard, sidecar))
        assert read_samples(url, shard, sidecar[1:1]) == []
        for start in range(shard.samples):
            records = read_records(url, shard, start, start + 1)
            assert records == sidecar[start : start + 1]
            (one,) = read_samples(url, shard, records)
            assert parse_sample(one) == read[start - shard.samples]
    assert read == pairs


def test_sidecar_describes_samples(dataset):
    url, pairs = dataset
    records = [record for shard in Index.load(url).shards for record in load_sidecar(url, shard)]
    for pair, record in zip(pairs, records, strict=True):
        assert record["query_hash"] == pair.query.content_hash
        assert record["target_hash"] == pair.target.content_hash
        assert record["query_text"] == len(pair.query.text.encode())
        assert record["target_text"] == max(len(text.encode()) for text in (pair.target.text, *pair.alternatives))
        assert record["negative_text"] == sum(len(item.text.encode()) for item in pair.negatives)
        assert (record["query_images"], record["target_images"]) == (len(pair.query.images), 0)
        assert record["negative_images"] == record["negatives"] == len(pair.negatives)
        assert record["videos"] == (pair.target.video is not None)
        sizes = [image_format(image)[1:] for item in pair.items for image in item.images]
        assert record["image_sizes"][: len(sizes)].tolist() == [list(size) for size in sizes]
        assert not record["image_sizes"][len(sizes) :].any()


def test_samples_are_read_in_one_ranged_read(dataset, monkeypatch):
    url, _ = dataset
    shard = Index.load(url).shards[0]
    sidecar = load_sidecar(url, shard)
    asked = []
    original = objects.read
    monkeypatch.setattr(objects, "read", lambda *arguments: asked.append(arguments) or original(*arguments))
    read_samples(url, shard, sidecar[1:4])
    begin, end = int(sidecar["offset"][1]), int(sidecar["offset"][4])
    assert asked == [(objects.join(url, shard.file), begin, end - begin)]


def test_webdataset_reads_our_shards(tmp_path):
    pairs = make_pairs()
    index = write_shards(pairs, tmp_path, dataset="Mixed", shard_bytes=60_000)
    urls = [str(tmp_path / shard.file) for shard in index.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [pair.key for pair in pairs]
    for sample, pair in zip(samples, pairs, strict=True):
        assert json.loads(sample["json"])["query"]["text"] == pair.query.text
        for number, image in enumerate(pair.query.images):
            assert sample[f"query.{number}.{image_format(image)[0]}"] == image
    decoded = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").slice(1, 2)))
    assert decoded["query.0.jpg"].shape == (21, 11, 3)


def test_same_samples_give_same_bytes(tmp_path):
    for name in "ab":
        write_shards(make_pairs(), tmp_path / name, dataset="Mixed", shard_bytes=60_000)
    first, second = (sorted((tmp_path / name).iterdir()) for name in "ab")
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_sample_without_images_round_trips(tmp_path):
    pair = Pair("a", "Texts", "", Item("q"), Item("t"))
    (shard,) = write_shards([pair], tmp_path, dataset="Texts").shards
    sidecar = load_sidecar(str(tmp_path), shard)
    assert sidecar["image_sizes"].shape == (1, 0, 2)
    assert parse_sample(read_samples(str(tmp_path), shard, sidecar)[0]) == pair


def judged_pairs() -> list[Pair]:
    """Return pairs with positives that have weights, with scores, and with both."""
    positives = (Item("also <image>", (picture(7),)), Item("<video> too", video=b"film"))
    negatives = (Item("<image> no", (picture(9, "JPEG"),)),)
    one = Pair("a", "Judged", "", Item("q"), Item("t"), negatives, ("u",), positives=positives, weights=(1.0, 0.5, 2.0))
    return [
        one,
        replace(one, key="b", weights=(), scores=(3.5, -1.0, 0.0, 1e-3)),
        replace(one, key="c", scores=(3.5, 2.0, 0.25, -7.0)),
        replace(one, key="d", positives=(), weights=(0.25,), scores=(1.0, 0.0)),
    ]


def test_positives_weights_and_scores_round_trip(tmp_path):
    pairs = judged_pairs()
    (shard,) = write_shards(pairs, tmp_path, dataset="Judged").shards
    records = load_sidecar(str(tmp_path), shard)
    read = list(map(parse_sample, read_samples(str(tmp_path), shard, records)))
    assert read == pairs
    assert [(pair.weights, pair.scores) for pair in read] == [(pair.weights, pair.scores) for pair in pairs]
    assert read[1].weights == (1.0, 1.0, 1.0)
    assert [item.text for item in read[0].items] == ["q", "t", "also <image>", "<video> too", "<image> no"]
    others = [(*pair.positives, *pair.negatives) for pair in pairs]
    assert records["negatives"].tolist() == list(map(len, others)) == [3, 3, 3, 1]
    assert records["negative_images"].tolist() == [2, 2, 2, 1]
    assert records["negative_text"].tolist() == [sum(len(item.text.encode()) for item in each) for each in others]
    assert records["videos"].tolist() == [1, 1, 1, 0]
    assert records["image_sizes"][:, :2].tolist() == [[[17, 27], [19, 29]]] * 3 + [[[19, 29], [0, 0]]]
    (sample, *_) = webdataset.WebDataset(str(tmp_path / shard.file), shardshuffle=False)
    assert (sample["positive.0.0.png"], sample[f"positive.1.{video_format(b'film')}"]) == (picture(7), b"film")


def test_bytes_of_pairs_without_positives_and_scores_are_pinned():
    """Shards of earlier versions can be made again, byte for byte."""
    image = b"\x89PNG not an image"
    negatives = (Item("<image> n", (image,)), Item("m"))
    pair = Pair("k", "D", "vqa", Item("<image> q ü", (image,)), Item("t"), negatives, ("u", "v"))
    assert hashlib.sha256(sample_bytes(pair)).hexdigest() == (
        "c46cd2b04d002258388af23303e122f3fe563d6e657deae7a28c98e70dd7b04a"
    )


@pytest.mark.parametrize(
    ("target", "others", "reason"),
    [
        ({"weight": 0}, {}, "weight 0 is less than 1e-06"),
        ({}, {"positives": [{"text": "p", "images": 0, "weight": "1"}]}, "weight '1' is not a finite number"),
        ({"score": True}, {}, "score True is not a finite number"),
        ({"score": float("nan")}, {}, "score nan is not a finite number"),
        ({"score": 1e39}, {}, r"score 1e\+39 is larger than 1e\+06"),
        ({"score": 1}, {"negatives": [{"text": "n", "images": 0}]}, "only some of its target, positives and negatives"),
        ({}, {"positives": [{"text": "p", "images": 0, "score": 1}]}, "only some of its target, positives and neg"),
        ({}, {"positives": [{"text": "<image>", "images": 1}]}, "'positive.0.0' is missing"),
        ({}, {"positives": {"text": "p"}}, "its json is malformed"),
    ],
)
def test_malformed_positives_weights_and_scores_raise_bad_sample(target, others, reason):
    item = {"text": "t", "images": 0, "video": 0}
    described = {"dataset": "X", "task": "", "query": item, "target": item | target, "negatives": []} | others
    with pytest.raises(BadSample, match=reason):
        parse_sample(tar_bytes("a", {"json": json.dumps(described).encode()}))


def test_a_pair_has_a_weight_for_each_right_answer():
    with pytest.raises(ValueError, match="1 weights for a target and 2 further positives"):
        replace(judged_pairs()[0], weights=(1.0,))


def test_unreadable_image_has_no_size(tmp_path):
    pair = Pair("a", "Broken", "", Item("<image>", (b"no image",)), Item("t"))
    (shard,) = write_shards([pair], tmp_path, dataset="Broken").shards
    sidecar = load_sidecar(str(tmp_path), shard)
    assert sidecar["image_sizes"].tolist() == [[[0, 0]]]
    assert parse_sample(read_samples(str(tmp_path), shard, sidecar)[0]) == pair


def test_index_totals_match_sidecars(dataset):
    url, _ = dataset
    for shard in Index.load(url).shards:
        records = load_sidecar(url, shard)
        sizes = sorted((w * h, (w, h)) for w, h in records["image_sizes"].reshape(-1, 2).tolist() if w)
        assert shard.images == len(sizes)
        assert shard.text_bytes == sum(int(records[f"{role}_text"].sum()) for role in ("query", "target", "negative"))
        assert shard.videos == records["videos"].sum()
        assert shard.max_images == records["image_sizes"].shape[1]
        assert shard.image_sizes == tuple(sizes[(2 * i + 1) * len(sizes) // 32][1] for i in range(16))


def test_shard_counts_samples_by_task(tmp_path):
    tasks = ["vqa", "", "vqa", "retrieval"]
    pairs = [Pair(str(number), "X", task, Item("q"), Item("a")) for number, task in enumerate(tasks)]
    write_shards(pairs, tmp_path, dataset="X")
    (shard,) = Index.load(str(tmp_path)).shards
    assert shard.tasks == {"vqa": 2, "": 1, "retrieval": 1}


def test_single_items_round_trip(tmp_path):
    samples = [Single("a", "X", "vqa", Item("<image> q", (picture(1),))), Single("b", "X", "vqa", Item("t"))]
    (shard,) = write_shards(samples, tmp_path, dataset="X").shards
    records = load_sidecar(str(tmp_path), shard)
    assert [parse_sample(data) for data in read_samples(str(tmp_path), shard, records)] == samples
    assert records["query_hash"].tolist() == [sample.item.content_hash for sample in samples]
    assert records["target_hash"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        ([], "no samples"),
        ([Pair("a.b", "X", "", Item("q"), Item("t"))], "'a.b'"),
        ([Pair("a", "X", "", Item("q"), Item("t"))] * 2, "two samples in a row"),
        ([Pair("a", "X", "", Item("q", (b"",) * 256), Item("t"))], "256 images of the query"),
    ],
)
def test_invalid_samples_are_refused(tmp_path, pairs, reason):
    with pytest.raises(PipelineError, match=reason):
        write_shards(pairs, tmp_path, dataset="X")
    assert not (tmp_path / "index.json").exists()


def test_damaged_shard_error_names_object_and_range(dataset):
    url, _ = dataset
    shard = Index.load(url).shards[1]
    sidecar = load_sidecar(url, shard)
    name = objects.join(url, shard.file)
    data = bytearray(objects.read(name))
    begin, end = int(sidecar["offset"][2]), int(sidecar["offset"][2] + sidecar["length"][2])
    data[end - 700] ^= 1
    objects.write(name, bytes(data))
    assert len(read_samples(url, shard, sidecar[:2])) == 2
    with pytest.raises(ObjectError) as caught:
        read_samples(url, shard, sidecar[:4])
    text = str(caught.value)
    assert f"{name} is damaged: bytes {begin}-{end - 1}" in text
    assert "delete and upload it again" in text

    objects.write(name, bytes(data[: begin + 10]))
    with pytest.raises(ObjectError, match="out of bounds"):
        read_samples(url, shard, sidecar[:4])


def test_corrupt_reads_are_retried(dataset, monkeypatch):
    url, pairs = dataset
    original, calls = objects.read, []

    def flipping(*arguments: object) -> bytes:
        data = bytearray(original(*arguments))
        calls.append(arguments)
        if len(calls) % 3:
            data[len(data) // 2] ^= 1
        return bytes(data)

    monkeypatch.setattr(objects, "read", flipping)
    shard = Index.load(url).shards[0]
    records = read_records(url, shard, 0, shard.samples)
    assert parse_sample(read_samples(url, shard, records)[0]) == pairs[0]
    assert (load_sidecar(url, shard) == records).all()
    assert len(calls) == 12


def test_damaged_sidecar_is_refused(dataset):
    url, _ = dataset
    shard = Index.load(url).shards[0]
    name = objects.join(url, shard.sidecar)
    data = bytearray(objects.read(name))
    data[-1] ^= 1
    objects.write(name, bytes(data))
    with pytest.raises(ObjectError, match=f"{name} is damaged"):
        load_sidecar(url, shard)
    assert len(read_records(url, shard, 0, shard.samples - 1)) == shard.samples - 1
    with pytest.raises(ObjectError, match=f"{name} is damaged"):
        read_records(url, shard, 0, shard.samples)


def signed(content: dict) -> dict:
    content.pop("checksum")
    return content | {"checksum": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: index | {"format": 1}, "has format 1, this version reads format 2"),
        (lambda index: [], "has format None"),
        (lambda index: index | {"samples": 9}, "its checksum differs"),
        (lambda index: signed(index | {"shards": [{"file": "0.tar"}]}), "not a valid index"),
        (lambda index: signed(index | {"shards": [index["shards"][0] | {"file": "../0.tar"}]}), "not a valid name"),
        (lambda index: signed({k: v for k, v in index.items() if k != "dataset"}), "'dataset'"),
    ],
)
def test_malformed_index_is_refused(tmp_path, change, reason):
    write_shards(make_pairs(1), tmp_path, dataset="X")
    path = tmp_path / "index.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ObjectError, match=reason) as caught:
        Index.load(str(tmp_path))
    assert str(path) in str(caught.value)


def test_non_json_or_missing_index_is_refused(tmp_path):
    for content in (b"{", DEEP):
        (tmp_path / "index.json").write_bytes(content)
        with pytest.raises(ObjectError, match="it is not JSON"):
            Index.load(str(tmp_path))
    with pytest.raises(ObjectError, match="there is no such file"):
        Index.load(str(tmp_path / "none"))


def tar_of(members: dict[str, bytes], path: Path, key: str = "a") -> bytes:
    with webdataset.TarWriter(str(path), encoder=False) as writer:
        writer.write({"__key__": key} | members)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"query.0.png": b"x"}, "'json' is missing"),
        ({"json": b"{"}, "its json is malformed"),
        ({"json": DEEP}, "its json is malformed"),
        ({"json": b"[]"}, "its json is malformed"),
        ({"json": b'{"dataset": "X", "task": "", "query": {"text": 1}}'}, "1 is not a text"),
        (
            {"json": b'{"dataset": "X", "task": "", "query": {"text": "<image>", "images": 1}}'},
            "'query.0' is missing",
        ),
    ],
)
def test_malformed_sample_raises_bad_sample(tmp_path, members, reason):
    with pytest.raises(BadSample, match=reason):
        parse_sample(tar_of(members, tmp_path / "bad.tar"))


def test_non_sample_bytes_raise_bad_sample():
    one = sample_bytes(make_pairs(3)[2])
    other = sample_bytes(make_pairs(3)[1])
    for data, reason in (
        (b"", "not a tar"),
        (np.random.default_rng(0).bytes(2048), "not a tar"),
        (one + other, "2 samples"),
    ):
        with pytest.raises(BadSample, match=reason):
            parse_sample(data)
    for cut in range(0, len(one), 100):
        with pytest.raises(BadSample):
            parse_sample(one[:cut])


CAPTIONS = Captions("<image>\nWhat is this?", ("txt", "long"), "retrieval")


def test_img2dataset_sample_is_parsed(tmp_path):
    members = {
        "jpg": picture(1, "JPEG"),
        "txt": "kurz ü".encode(),
        "json": b'{"long": ["lang", "laenger", "lang", ""]}',
    }
    pair = parse_sample(tar_of(members, tmp_path / "a.tar", "folder/000000012"), CAPTIONS)
    assert (pair.key, pair.task) == ("folder/000000012", "retrieval")
    assert pair.query == Item(CAPTIONS.query, (members["jpg"],))
    assert pair.texts == ("kurz ü", "lang", "laenger")
    assert pair.drawn(2).target.text == "laenger"
    assert not pair.drawn(2).alternatives
    members["JPG"] = members.pop("jpg")
    del members["json"]
    assert parse_sample(tar_of(members, tmp_path / "a.tar"), CAPTIONS).texts == ("kurz ü",)


@pytest.mark.parametrize(
    "column", ["NaN", "null", '""', '" "', "[]", "[null]", "[NaN, 3]", "7", "-Infinity", "{}", "true", None]
)
def test_one_usable_caption_is_enough(tmp_path, column):
    described = {} if column is None else {"json": b'{"long": %s}' % column.encode()}
    members = {"jpg": picture(1, "JPEG"), "txt": b"short"} | described
    assert parse_sample(tar_of(members, tmp_path / "a.tar"), CAPTIONS).texts == ("short",)
    good = {"jpg": members["jpg"], "json": b'{"long": ["a", null, NaN, "", "b"]}'}
    assert parse_sample(tar_of(good, tmp_path / "a.tar"), CAPTIONS).texts == ("a", "b")
    with pytest.raises(BadSample, match="no caption in txt, long"):
        parse_sample(tar_of({"jpg": members["jpg"]} | described, tmp_path / "a.tar"), CAPTIONS)


def test_unrequested_malformed_json_is_ignored(tmp_path):
    members = {"jpg": picture(1, "JPEG"), "txt": b"short", "json": b"{"}
    captions = replace(CAPTIONS, columns=("txt",))
    assert parse_sample(tar_of(members, tmp_path / "a.tar"), captions).texts == ("short",)


def test_captions_lose_byte_order_marks_but_no_white_space(tmp_path):
    jpg = picture(1, "JPEG")

    def texts(**members: bytes) -> tuple[str, ...]:
        return parse_sample(tar_of({"jpg": jpg} | members, tmp_path / "a.tar"), CAPTIONS).texts

    long = json.dumps({"long": ["\ufeffshort\n", "\ufeff", " \ufeff a\ufeff", "b"]}, ensure_ascii=False)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):  # JSON may use any of these
        assert texts(txt="\ufeff short\r\n".encode(), json=long.encode(encoding)) == (" short\r\n", "  a", "b")
    with pytest.raises(BadSample, match="no caption in txt, long"):
        texts(txt="\ufeff \ufeff".encode())
    for encoding in ("utf-16", "utf-16-be"):
        with pytest.raises(BadSample, match="UTF-16: convert it to UTF-8"):
            texts(txt=("\ufeff" * (encoding != "utf-16") + "short").encode(encoding))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"jpg": None}, "no image"),
        ({"txt": b" "}, "no caption in txt, long"),
        ({"txt": b"\xff"}, "not UTF-8"),
        ({"txt": b"", "json": b'{"long": 7}'}, r"no caption in txt, long \(7 is not a text"),
        ({"txt": b"a\0b"}, "NUL character"),
        ({"txt": b"", "json": b'{"long": "\\ud800"}'}, "not UTF-8"),
        ({"txt": b"", "json": b"{"}, "malformed"),
        ({"txt": b"", "json": DEEP}, "malformed"),
        ({"png": b""}, "several images"),
    ],
)
def test_invalid_img2dataset_sample_raises_bad_sample(tmp_path, change, reason):
    members = {"jpg": picture(1, "JPEG"), "txt": b"short"} | change
    members = {name: content for name, content in members.items() if content is not None}
    with pytest.raises(BadSample, match=reason):
        parse_sample(tar_of(members, tmp_path / "a.tar"), CAPTIONS)


def test_sparse_file_raises_bad_sample(tmp_path):
    (tmp_path / "huge.jpg").touch()
    os.truncate(tmp_path / "huge.jpg", 1 << 40)
    subprocess.run(["tar", "--sparse", "-cf", "bomb.tar", "huge.jpg"], cwd=tmp_path, check=True)
    with pytest.raises(BadSample, match="sparse file"):
        parse_sample((tmp_path / "bomb.tar").read_bytes(), CAPTIONS)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("folder", ["", "f" * 60 + "/" + "g" * 60 + "/", "ü/"])
@pytest.mark.parametrize("time", [0, 1795284872.5])  # a fractional time needs a header of its own
def test_all_tar_formats_are_parsed(format, folder, time):
    contents = {"json": b"{}", "txt": b"a caption", "jpg": picture(1, "JPEG"), "empty": b"", "block": bytes(512)}
    buffer = BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"{folder}000001.{name}")
            member.size, member.mtime = len(content), time
            tar.addfile(member, BytesIO(content))
    whole = buffer.getvalue()
    for data in (whole, whole[: tar.offset - 2 * tarfile.BLOCKSIZE]):
        pair = parse_sample(data, CAPTIONS)
        assert pair.key == f"{folder}000001"
        assert (pair.query.images, pair.target.text) == ((contents["jpg"],), "a caption")
