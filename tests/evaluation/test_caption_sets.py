"""Each layout, with a few files; the content of an image or video is its own path."""

import json

import numpy as np
import pytest

from pipeline.data.sample import Item
from pipeline.errors import PipelineError
from pipeline.evaluation.sets import captions as module
from pipeline.evaluation.sets.captions import SETS
from pipeline.evaluation.tasks import Collection, Retrieval
from pipeline.storage import objects


def lay_out(root: str, files: dict[str, object]) -> str:
    """Write files: lists as lines of JSON, other objects as JSON, texts unchanged, None as the file's path."""
    for path, content in files.items():
        if isinstance(content, list):
            content = "\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n"
        elif content is None:
            content = path
        objects.write(objects.join(root, path), (content if isinstance(content, str) else json.dumps(content)).encode())
    return root


def added(name: str, url: str, instructed: bool = False) -> Collection:
    collection = Collection()
    SETS[name](collection, url, instructed)
    return collection


def pairs(collection: Collection, task: Retrieval) -> list[tuple[Item, list[Item]]]:
    """Return each query's item with the items of its right candidates."""
    return [
        (collection.items[query](), [collection.items[row]() for row in task.candidates[right]])
        for query, right in zip(task.queries, task.right, strict=True)
    ]


def karpathy(*images: tuple[str, str, str, list[str]]) -> dict:
    keys = ("filepath", "filename", "split")
    return {
        "images": [
            {key: part for key, part in zip(keys, image, strict=False) if part}
            | {"sentences": [{"raw": text} for text in image[3]]}
            for image in images
        ]
    }


# A JSON list in one file, which lay_out would write as lines.
def listing(*entries: dict) -> str:
    return json.dumps(entries, ensure_ascii=False)


def said(image: str, text: str) -> dict:
    return {"image": image, "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": text}]}


FIVE = ["one", "two ", "three", "four", "five"]
HEAD = "# a comment\n\n"
# {set: (its files, {language: {path of an image or video: its captions}})}
LAYOUTS = {
    "text-video": (
        {"captions.json": {"clips/1.mp4": ["a man"], "2": "a dog"}, "clips/1.mp4": None, "clips/2.webm": None},
        {"en": {"clips/1.mp4": ["a man"], "clips/2.webm": ["a dog"]}},
    ),
    "text-image": (
        {"captions.json": {"1.jpg": "a man"}, "1.jpg": None},
        {"en": {"1.jpg": ["a man"]}},
    ),
    "msrvtt": (
        {
            "MSRVTT_JSFUSION_test.csv": 'key,vid_key,video_id,sentence\nr0,m1,video8,a man\nr1,m2,video3,"one, two"\n',
            "all/video3.mp4": None,
            "all/video8.MP4": None,
            "all/video9.mp4": None,
        },
        {"en": {"all/video8.MP4": ["a man"], "all/video3.mp4": ["one, two"]}},
    ),
    "msrvtt json": (
        {
            "msrvtt_test_1k.json": listing({"video_id": "video8", "video": "video8.mp4", "caption": "a man"}),
            "video8.mp4": None,
        },
        {"en": {"video8.mp4": ["a man"]}},
    ),
    "msvd": (
        {
            "msvd_test.json": listing(
                {"video_id": "-x_1_2", "video": "-x_1_2.avi", "caption": ["a cat", "a cat"]},
                {"video_id": "y_3_4", "video": "y_3_4.avi", "caption": ["a cat", "a dog"]},
            ),
            "YouTubeClips/-x_1_2.avi": None,
            "YouTubeClips/y_3_4.avi": None,
        },
        {"en": {"YouTubeClips/-x_1_2.avi": ["a cat", "a cat"], "YouTubeClips/y_3_4.avi": ["a cat", "a dog"]}},
    ),
    "msvd text": (
        {
            "test_list.txt": "y_3_4\n-x_1_2\n",
            "AllVideoDescriptions.txt": f"{HEAD}-x_1_2 a cat\nz_1_2 a cow\r\ny_3_4 a dog\r\n-x_1_2 cats meow\n",
            "-x_1_2.avi": None,
            "y_3_4.avi": None,
        },
        {"en": {"y_3_4.avi": ["a dog"], "-x_1_2.avi": ["a cat", "cats meow"]}},
    ),
    "flickr30k": (
        {
            "dataset_flickr30k.json": karpathy(
                ("", "7.jpg", "test", FIVE), ("", "8.jpg", "train", FIVE), ("", "9.jpg", "test", FIVE)
            ),
            "flickr30k-images/7.jpg": None,
            "flickr30k-images/._7.jpg": None,
            "flickr30k-images/9.jpg": None,
            "flickr30k-images/9.txt": None,
        },
        {"en": {f"flickr30k-images/{number}.jpg": FIVE for number in (7, 9)}},
    ),
    "coco": (
        {
            "annotations/dataset_coco.json": karpathy(
                ("val2014", "7.jpg", "test", [*FIVE, "six"]), ("val2014", "8.jpg", "restval", FIVE)
            ),
            "images/val2014/7.jpg": None,
            "images/train2014/7.jpg": None,
        },
        {"en": {"images/val2014/7.jpg": FIVE}},
    ),
    "urban1k": (
        {
            "Urban1k/caption/1.txt": "A street.\nA second line.\n",
            "Urban1k/caption/221.txt": "A square, with trees.",
            "Urban1k/image/1.jpg": None,
            "Urban1k/image/221.jpg": None,
        },
        {"en": {"Urban1k/image/1.jpg": ["A street."], "Urban1k/image/221.jpg": ["A square, with trees."]}},
    ),
    "docci": (
        {
            "docci_descriptions.jsonlines": [
                {"split": "test", "image_file": "test_0.jpg", "description": "A long\u2028text."},
                {"split": "train", "image_file": "train_0.jpg", "description": "Another."},
            ],
            "images/test_0.jpg": None,
        },
        {"en": {"images/test_0.jpg": ["A long\u2028text."]}},
    ),
    "sharegpt4v": (
        {
            "share-captioner_coco_lcs_sam_1246k_1107.json": listing(
                said("coco/train2017/1.jpg", "A view.\nFrom above."), said("sam/images/1.jpg", "More.")
            ),
            "coco/train2017/1.jpg": None,
            "sam/images/1.jpg": None,
        },
        {"en": {"coco/train2017/1.jpg": ["A view. From above."], "sam/images/1.jpg": ["More."]}},
    ),
    "xm3600": (
        {
            "captions.jsonl": [
                {"image/key": "a1", "image/locale": "sw", "sw": {"caption": ["paka"]}, "de": {"caption": ["Katze"]}},
                {"image/key": "b2", "image/locale": "de", "sw": {"caption": ["x", "y"]}, "de": {"caption": ["Hund"]}},
            ],
            "images/a1.jpg": None,
            "images/b2.jpg": None,
        },
        {
            "sw": {"images/a1.jpg": ["paka"], "images/b2.jpg": ["x", "y"]},
            "de": {"images/a1.jpg": ["Katze"], "images/b2.jpg": ["Hund"]},
        },
    ),
    "flickr-cn": (
        {
            "test/flickr30k_cn_test.txt": "7#zhm#0\t一只猫\n7.jpg#1 一只 白猫\n9\t一只狗\n",
            "images/7.jpg": None,
            "images/9.jpg": None,
        },
        {"zh": {"images/7.jpg": ["一只猫", "一只 白猫"], "images/9.jpg": ["一只狗"]}},
    ),
    "flickr-cn commas": (
        {"flickr30k_cn_test.txt": "image,caption\n7.jpg,一只猫, 一只狗\n", "7.jpg": None},
        {"zh": {"7.jpg": ["一只猫, 一只狗"]}},
    ),
    "coco-cn": (
        {
            "coco-cn_test.txt": "COCO_val2014_2\nCOCO_train2014_1\n",
            "imageid.human-written-caption.txt": "COCO_train2014_1#0\t猫\nCOCO_val2014_2#0\t狗\n"
            "COCO_val2014_3#0\t鸟\nCOCO_val2014_2#1\t大狗\n",
            "train2014/COCO_train2014_1.jpg": None,
            "val2014/COCO_val2014_2.jpg": None,
        },
        {"zh": {"val2014/COCO_val2014_2.jpg": ["狗", "大狗"], "train2014/COCO_train2014_1.jpg": ["猫"]}},
    ),
}
CALLED = {
    "msrvtt": "MSR-VTT",
    "msvd": "MSVD",
    "flickr30k": "Flickr30k",
    "coco": "COCO",
    "urban1k": "Urban1k",
    "docci": "DOCCI",
    "sharegpt4v": "ShareGPT4V",
    "xm3600": "XM3600 {}",
    "flickr-cn": "Flickr30k-CN",
    "coco-cn": "COCO-CN",
}


def expected(kind: str, by_path: dict[str, list[str]], words: tuple[str, str, str | None]) -> tuple[list, list]:
    """Return `pairs` of both directions.

    words: prefixes of a query caption, a candidate medium and a query medium; the last is None if both directions
    compare the same items.
    """

    def medium(text: str, path: str) -> Item:
        return Item(text, video=path.encode()) if kind == "text-video" else Item(text, (path.encode(),))

    from_text = [(Item(words[0] + text), [medium(words[1], path)]) for path, texts in by_path.items() for text in texts]
    asking, answers = (words[1], words[0]) if words[2] is None else (words[2], "")
    to_text = [(medium(asking, path), [Item(answers + text) for text in texts]) for path, texts in by_path.items()]
    return from_text, to_text


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_layouts_load_as_retrieval_tasks(layout, tmp_path):
    name = layout.split()[0]
    files, by_language = LAYOUTS[layout]
    collection = added(name, lay_out(str(tmp_path), files))
    kind, letter = ("text-video", "v") if name in ("text-video", "msrvtt", "msvd") else ("text-image", "i")
    mark = "<video>" if letter == "v" else "<image>"
    assert [(task.name, task.kind, task.direction, task.language) for task in collection.tasks] == [
        (CALLED.get(name, tmp_path.name).format(language), kind, direction, language)
        for language in by_language
        for direction in (f"t2{letter}", f"{letter}2t")
    ]
    for tasks, by_path in zip(np.reshape(collection.tasks, (-1, 2)), by_language.values(), strict=True):
        assert tuple(pairs(collection, task) for task in tasks) == expected(kind, by_path, ("", mark, mark))
        assert tasks[0].queries.tolist() == tasks[1].candidates.tolist()
        assert tasks[1].queries.tolist() == tasks[0].candidates.tolist()
        assert len(tasks[1].candidates) == sum(map(len, by_path.values()))  # equal captions stay separate candidates
    paths = {path for by_path in by_language.values() for path in by_path}
    texts = {text for by_path in by_language.values() for own in by_path.values() for text in own}
    assert len(collection.items) == len(paths) + len(texts)  # each once over all tasks
    assert {str(tmp_path / path) for path in paths} < set(collection.names)


def test_instructions_are_added_to_items(tmp_path):
    for name, words in {
        "flickr30k": (
            "Find me an everyday image that matches the given caption: ",
            "<image>\nRepresent the given image.",
            "<image>\nFind an image caption describing the given everyday image.",
        ),
        "msrvtt": (
            "Find me an video that matches the given caption: ",  # LLaVE's own wording
            "<video>\nRepresent the given video.",
            None,
        ),
    }.items():
        files, by_language = LAYOUTS[name]
        collection = added(name, lay_out(str(tmp_path / name), files), instructed=True)
        found = tuple(pairs(collection, task) for task in collection.tasks)
        assert found == expected(collection.tasks[0].kind, by_language["en"], words)


def test_s3_set_loads_and_changed_image_changes_key(s3, tmp_path):
    root = lay_out(f"s3://pipeline-tests/caption-sets/{tmp_path.name}", LAYOUTS["xm3600"][0])
    collection = added("xm3600", f"{root}/")
    assert [task.name for task in collection.tasks] == ["XM3600 sw", "XM3600 sw", "XM3600 de", "XM3600 de"]
    by_path = LAYOUTS["xm3600"][1]["de"]
    found = tuple(pairs(collection, task) for task in collection.tasks[2:])
    assert found == expected("text-image", by_path, ("", "<image>", "<image>"))
    keys = dict(zip(collection.names, collection.keys, strict=True))
    objects.write(f"{root}/images/b2.jpg", b"another")
    again = added("xm3600", root)
    changed = {name for name, key in zip(again.names, again.keys, strict=True) if keys[name] != key}
    assert changed == {f"{root}/images/b2.jpg"}


def test_sharegpt4v_reads_first_1000_entries(tmp_path, monkeypatch):
    text = listing(*(said(f"{number}.jpg", f"view {number} ü") for number in range(1001)))
    lay_out(str(tmp_path), {f"{number}.jpg": "" for number in range(1000)})
    file = tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json"
    file.write_text(text.replace("},", "}\n ,")[:-1] + ", broken")  # the invalid part is after the first thousand
    monkeypatch.setattr(module, "_FIRST_BYTES", text.index("ü") + 1)  # the first block ends between this letter's bytes
    collection = added("sharegpt4v", str(tmp_path))
    names = [collection.names[row] for row in collection.tasks[0].queries]
    assert names == [f"view {number} ü" for number in range(1000)]
    for content, why in ((text.replace("999.jpg", "999.jpg\n").encode(), ""), (text.encode("utf-16"), "it is UTF-16")):
        file.write_bytes(content)
        with pytest.raises(PipelineError, match=f"is not a list of .*: {why}"):
            added("sharegpt4v", str(tmp_path))


@pytest.mark.parametrize(
    ("layout", "files", "said"),
    [
        ("flickr30k", {"flickr30k-images/9.jpg": ...}, "has no file 9.jpg (gif, jpeg, jpg, png, webp)"),
        ("flickr30k", {"more/9.png": None}, "9.jpg may be flickr30k-images/9.jpg or more/9.png"),
        ("flickr30k", {"dataset_flickr30k.json": ...}, "has no dataset_flickr30k.json"),
        ("flickr30k", {"more/dataset_flickr30k.json": None}, "keep only one dataset_flickr30k.json"),
        ("flickr30k", {"dataset_flickr30k.json": "[]"}, "dataset_flickr30k.json is not Karpathy's"),
        ("flickr30k", {"dataset_flickr30k.json": karpathy(("", "7.jpg", "val", FIVE))}, "no split 'test': it has val"),
        (
            "flickr30k",
            {"dataset_flickr30k.json": karpathy(("", "7.jpg", "test", ["a", " "]))},
            "dataset_flickr30k.json: a caption of 7.jpg cannot be used: empty text",
        ),
        (
            "flickr30k",
            {"dataset_flickr30k.json": karpathy(("", "7.jpg", "test", []))},
            "dataset_flickr30k.json has no caption of 7.jpg (en)",
        ),
        ("flickr30k", {"dataset_flickr30k.json": karpathy(("", "7.jpg", "test", [7]))}, "7.jpg is 7, not a text"),
        (
            "flickr30k",
            {"dataset_flickr30k.json": karpathy(("", "7.jpg", "test", ["good", None]))},
            "a caption of 7.jpg is None, not a text",
        ),
        ("msvd", {"msvd_test.json": listing({"video": "y_3_4", "caption": ["a", None]})}, "y_3_4 is None, not a text"),
        (
            "text-image",
            {"captions.json": {"1.jpg": "a\0b"}},
            "1.jpg cannot be used: NUL character: is its file",
        ),
        (
            "flickr30k",
            {"dataset_flickr30k.json": karpathy(("", "7.jpg", "test", ["an <image>"]))},
            "7.jpg cannot be used: marks and files differ: 1 <image> for 0 files",
        ),
        ("coco", {"images/val2014/7.jpg": ..., "more/7.jpg": None}, "val2014/7.jpg may be images/train2014/7.jpg or"),
        ("msrvtt", {"MSRVTT_JSFUSION_test.csv": ...}, "has no MSRVTT_JSFUSION_test.csv or msrvtt_test_1k.json"),
        ("msrvtt", {"MSRVTT_JSFUSION_test.csv": "a,b\n1,2\n"}, "test.csv is not a list of names with their captions"),
        ("msrvtt", {"MSRVTT_JSFUSION_test.csv": "video_id,sentence\n"}, "list no captions"),
        ("msrvtt", {"all/video8.MP4": ..., "all/video8.jpg": None}, "has no file video8 (avi, "),
        ("msvd text", {"test_list.txt": "y_3_4\nw_1_2\n", "w_1_2.avi": None}, "has no caption of w_1_2 (en)"),
        ("msvd text", {"AllVideoDescriptions.txt": ...}, "has no AllVideoDescriptions.txt"),
        ("urban1k", {"Urban1k/image/1.jpg": ...}, "has no file Urban1k/image/1"),
        ("urban1k", {"Urban1k/caption/1.txt": ...}, "image/1.jpg has no caption"),
        ("urban1k", {"Urban1k/caption/1.txt": ""}, "caption/1.txt has no caption of"),
        ("docci", {"docci_descriptions.jsonlines": [{"split": "test", "image_file": "test_0.jpg"}]}, "'description'"),
        ("docci", {"docci_descriptions.jsonlines": [{"split": "val"}]}, "none of the test split"),
        (
            "sharegpt4v",
            {"sam/images/1.jpg": ..., "coco/train2017/1.jpg": ..., "1.jpg": None},
            "coco/train2017/1.jpg and sam/images/1.jpg both match",
        ),
        (
            "xm3600",
            {"captions.jsonl": [{"image/key": "a1", "sw": {"caption": ["x"]}}, {"image/key": "b2"}]},
            "captions.jsonl has no caption of b2 (sw)",
        ),
        ("xm3600", {"captions.jsonl": [{"image/key": "a1", "sw": {"caption": "paka"}}]}, "'paka' is no list"),
        ("xm3600", {"captions.jsonl": [{"image/key": 3, "sw": {"caption": ["x"]}}]}, "name of a file is 3"),
        ("flickr-cn", {"test/flickr30k_cn_test.txt": "7#0\t猫\n7#1\n"}, "line 2 is '7#1'"),
        ("coco-cn", {"coco-cn_test.txt": "COCO_val2014_9", "COCO_val2014_9.jpg": None}, "no caption of COCO_val2014_9"),
    ],
)
def test_invalid_caption_sets_are_refused(tmp_path, layout, files, said):
    lay_out(str(tmp_path), {**LAYOUTS[layout][0], **{path: what for path, what in files.items() if what is not ...}})
    for path, what in files.items():
        if what is ...:
            (tmp_path / path).unlink()
    with pytest.raises(PipelineError) as caught:
        added(layout.split()[0], str(tmp_path))
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folder_and_non_utf8_file_are_refused(tmp_path):
    with pytest.raises(PipelineError, match="has no files"):
        added("coco", str(tmp_path / "gone"))
    for content, said in ((b'["\xff"]', "is not UTF-8: byte 3"), ("[]".encode("utf-16"), "is UTF-16: convert it")):
        (tmp_path / "msvd_test.json").write_bytes(content)
        with pytest.raises(PipelineError, match=f"msvd_test.json {said}"):
            added("msvd", str(tmp_path))


def test_byte_order_mark_is_stripped_from_captions(tmp_path):
    url = lay_out(str(tmp_path), {"captions.json": {"1.jpg": "\ufeff a man"}, "1.jpg": None})
    assert " a man" in added("text-image", url).names


def test_wording_file_sets_instructions(tmp_path):
    words = {"medium": "<video>\nEmbed.", "seeks_caption": "<video>\nCaption?", "seeks_medium": "Which shows {}?"}
    files = {"captions.json": {"1.mp4": "a {man}"}, "1.mp4": None}
    url = lay_out(str(tmp_path), files | {"wording.json": words})
    collection = added("text-video", url, instructed=True)
    by_path = {"1.mp4": ["a {man}"]}
    ask, be_asked = (pairs(collection, task) for task in collection.tasks)
    assert ask == [(Item("Which shows a {man}?"), [Item("<video>\nEmbed.", video=b"1.mp4")])]
    assert be_asked == [(Item("<video>\nCaption?", video=b"1.mp4"), [Item("a {man}")])]
    bare = added("text-video", url)
    assert pairs(bare, bare.tasks[0]) == expected("text-video", by_path, ("", "<video>", "<video>"))[0]
    lay_out(url, {"wording.json": {name: text for name, text in words.items() if name != "seeks_caption"}})
    same = added("text-video", url, instructed=True)
    assert pairs(same, same.tasks[0]) == ask
    assert pairs(same, same.tasks[1]) == [(ask[0][1][0], [ask[0][0]])]
    for wrong in ({"medium": "Embed."}, {"seeks_caption": ""}, {"seeks_medium": "Which?"}, {"other": ""}):
        lay_out(url, {"wording.json": words | wrong})
        with pytest.raises(PipelineError, match=r"wording\.json is not .*with <video>"):
            added("text-video", url, instructed=True)
