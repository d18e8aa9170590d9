import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pipeline.data.mmeb import META_TASKS, MMEB_TASKS
from pipeline.errors import PipelineError
from pipeline.evaluation.html import change, write_report
from pipeline.evaluation.html import page as page_of
from pipeline.evaluation.published import PUBLISHED
from pipeline.evaluation.report import Case, DatasetResult, Report, Shown, Similarities, Variant
from pipeline.evaluation.terminal import _variants_tables, print_report
from pipeline.models.compact import Form

NAMES = [name for name in MMEB_TASKS if name != "ImageNet_1K"]
FEW = [name for name in NAMES if MMEB_TASKS[name][0] in ("classification", "grounding")][:-1]
CASE = Case(Shown("<script>alert(1)</script>"), Shown("a & b", "QUJD"), Shown("c"), 0.25, 0.5, 7)


def result(task: str, inside: bool | None, **changes: object) -> DatasetResult:
    values = np.linspace(-0.1, 0.9, 10)
    similarities = Similarities.of(values, values - 0.2)
    return replace(DatasetResult(task, inside, "", {"": 10}, {"P@1": 0.5}, 0.1, 0, similarities, [CASE]), **changes)


def retrieval(language: str = "", shift: float = 0, **changes: object) -> DatasetResult:
    metrics = {}
    for direction, r1 in (("t2i", 0.4), ("i2t", 0.3)):
        metrics |= {f"{direction} R@1": r1 + shift, f"{direction} R@5": 0.6, f"{direction} R@10": 0.7}
        metrics |= {f"{direction} MdR": 2.0, f"{direction} MnR": 11.5 - 10 * shift}
    queries = {"t2i": 50, "i2t": 10}
    return result("text-image", None, language=language, queries=queries, metrics=metrics, **changes)


def own_sets(**sets: tuple[str, bool, float]) -> Report:
    return Report("m", {name: result(task, inside, metrics={"P@1": p}) for name, (task, inside, p) in sets.items()})


def mmeb(names: list[str] = NAMES) -> dict[str, DatasetResult]:
    """Return results in which the n-th dataset of MMEB's table scores n %."""
    scores = {name: (place + 1) / 100 for place, name in enumerate(NAMES)} | {"ImageNet_1K": 0.01}
    return {name: result(*MMEB_TASKS[name], metrics={"P@1": scores[name]}) for name in names}


def test_mmeb_averages_weight_datasets_equally():
    results = mmeb()
    results["OVEN"] = replace(results["OVEN"], queries={"": 10**6}, chance=0.3)
    averages = Report("m", results).averages()
    # In the order of the table: 10 of classification, 10 of VQA, 12 of retrieval, 4 of grounding.
    expected = {"classification": 5.5, "vqa": 15.5, "retrieval": 26.5, "grounding": 34.5, "overall": 18.5}
    inside = [*range(1, 6), *range(11, 17), *range(21, 29), 33]
    assert len(inside) == 20
    expected["in distribution"] = np.mean(inside)
    expected["out of distribution"] = np.mean([n for n in range(1, 37) if n not in inside])
    assert {name: 100 * value for name, value in averages.items()} == pytest.approx(expected)
    chances = Report("m", results).averages(lambda each: each.chance)
    assert (chances["vqa"], chances["retrieval"]) == pytest.approx((0.1, (11 * 0.1 + 0.3) / 12))


def test_incomplete_averages_are_omitted_and_named():
    report = Report("m", mmeb([name for name in NAMES if name != "GQA"]) | {"Scene": result("vqa", False)})
    assert set(report.averages()) == {"classification", "retrieval", "grounding", "in distribution"}
    assert report.missing() == {"vqa": ["GQA"], "out of distribution": ["GQA"], "overall": ["GQA"]}
    assert "vqa lacks GQA of its 10; out of distribution lacks GQA of its 16" in report.remarks()[0]


def test_out_of_distribution_sets_alone_give_one_average():
    report = Report("m", mmeb([name for name in NAMES if not MMEB_TASKS[name][1]]))
    assert list(report.averages()) == ["out of distribution"]
    assert len(report.missing()["overall"]) == 20


def test_imagenet_counts_once_under_either_name():
    whole = Report("m", mmeb()).averages()
    alias = Report("m", mmeb(["ImageNet_1K", *NAMES[1:]]))
    assert alias.averages() == whole
    assert next(iter(alias.results)) == "ImageNet_1K"
    assert Report("m", mmeb([*NAMES, "ImageNet_1K"])).averages() == whole


def test_own_sets_average_over_available_results():
    report = own_sets(a=("vqa", True, 0.2), b=("vqa", False, 0.4), c=("retrieval", True, 0.9))
    assert report.averages() == pytest.approx(
        {"vqa": 0.3, "retrieval": 0.9, "in distribution": 0.55, "out of distribution": 0.4, "overall": 0.5}
    )
    assert (report.missing(), report.mmeb()) == ({}, {})
    assert report.score == pytest.approx(0.5)
    # A caption set with the name of an MMEB dataset does not count as MMEB.
    assert Report("m", {"MSCOCO": retrieval()}).mmeb() == {}


def test_results_follow_mmeb_table_then_input_order():
    shuffled = {"z": result("vqa", True), "Flickr30k": retrieval()} | mmeb(["RefCOCO", "OK-VQA", "A-OKVQA", "SUN397"])
    report = Report("m", shuffled)
    assert list(report.results) == ["SUN397", "OK-VQA", "A-OKVQA", "RefCOCO", "z", "Flickr30k"]


def test_report_round_trips_through_file(tmp_path):
    report = Report("m", mmeb() | {"XM3600/de": retrieval("de"), "Flickr30k": retrieval()})
    report.save(tmp_path / "there/report.json")
    for place in (tmp_path / "there/report.json", tmp_path / "there"):
        again = Report.read(place)
        assert again == report
        assert list(again.results) == list(report.results)
    assert json.loads((tmp_path / "there/report.json").read_text())["averages"] == report.averages()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: {}, "format is missing: it is not an evaluation's report"),
        (lambda content: content | {"format": 2}, "format: Input should be 1, got 2: it is not an evaluation's report"),
        (lambda content: {"format": 1, "model": "m"}, "is missing: it is not an evaluation's report"),
        (lambda content: content | {"results": {"a": {"group": "vqa"}}}, "a.in_distribution is missing"),
        (
            lambda content: content["results"]["a"].update(metrics={}) or content,
            "results.a.metrics: Dictionary should have at least 1 item",
        ),
        (
            lambda content: content["results"]["a"]["similarities"]["positive"].clear() or content,
            "results.a.similarities.positive: List should have at least 200 items",
        ),
    ],
)
def test_invalid_report_is_refused(tmp_path, change, said):
    own_sets(a=("vqa", True, 0.1)).save(file := tmp_path / "r.json")
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(PipelineError, match=re.escape(said)) as raised:
        Report.read(file)
    assert "\n" not in str(raised.value)


def test_missing_or_non_json_report_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    for path in (tmp_path, tmp_path / "absent.json", tmp_path / "deep.json"):
        with pytest.raises(PipelineError, match="not an evaluation's report"):
            Report.read(path)


def test_precision_is_printed_before_and_after(capsys):
    before, after = own_sets(a=("vqa", True, 0.1)), own_sets(**{"a": ("vqa", True, 0.7), "[b]": ("vqa", True, 0.2)})
    print_report(after, before)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = {line[1]: line[3::2] for line in lines if len(line) > 3}
    assert rows["a"] == ["vqa", "10", "10.0", "10.0", "70.0", "7.0"]
    assert rows["[b]"] == ["vqa", "10", "10.0", "-", "20.0", "2.0"]
    print_report(after)
    printed = capsys.readouterr().out
    assert "Precision@1" in printed
    assert "before" not in printed


def test_printed_retrieval_has_both_directions_and_language_means(capsys):
    languages = {"XM3600-de": retrieval("de"), "XM3600-sw": retrieval("sw", -0.2, ties=3)}
    earlier = {name: replace(each, metrics=retrieval().metrics) for name, each in languages.items()}
    report = Report("m", languages | {"Flickr30k": retrieval("en")})
    print_report(report, Report("n", earlier))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    (rows,) = report.others(Report("n", earlier)).values()
    assert [(row.name, row.direction, row.queries, row.chance) for row in rows] == [
        *[(name, *way) for name in languages for way in (("t2i", 50, 0.1), ("i2t", 10, None))],
        ("mean: XM3600, 2 languages", "t2i", None, pytest.approx(0.1)),
        ("mean: XM3600, 2 languages", "i2t", None, None),
        ("Flickr30k", "t2i", 50, 0.1),
        ("Flickr30k", "i2t", 10, None),
    ]
    assert rows[4].metrics == pytest.approx({"R@1": 0.3, "R@5": 0.6, "R@10": 0.7, "MdR": 2, "MnR": 12.5})
    for text in ("20.0 (-20.0)", "30.0 (-10.0)", "13.5 (+2.0)", "MdR", "3 queries had a wrong candidate as similar"):
        assert text in printed
    # Means are only compared over the same languages.
    (rows,) = report.others(Report("n", {"XM3600-de": retrieval("de")})).values()
    assert (bool(rows[0].before), rows[4].before) == (True, {})


def test_lower_rank_is_better():
    assert change("R@1", 0.5, 0.4) == ("+10.0", "better")
    assert change("R@1", 0.4, 0.5) == ("−10.0", "worse")
    assert change("MnR", 3.0, 2.0) == ("+1.0", "worse")
    assert change("MdR", 2.0, 2.0) == ("0.0", "")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return the folder of a report with all kinds of sets, compared with a report with some of them."""
    folder = tmp_path_factory.mktemp("report")
    video = {"t2v R@1": 0.4, "t2v R@5": 0.6, "v2t R@1": 0.3, "v2t R@5": 0.5}
    alone = result("zero-shot classification", None, metrics={"top-1": 0.7, "top-5": 0.9}, worst=[])
    others = {
        "MSR-VTT": result("text-video", None, queries={"t2v": 9, "v2t": 9}, metrics=video),
        "XM3600-de": retrieval("de"),
        "XM3600-<b>": retrieval("fr"),
        "ImageNet $x$": replace(alone, similarities=Similarities.of(np.array([0.5]), np.array([-np.inf]))),
    }
    report = Report("runs/<i>model</i>", mmeb(FEW) | others, ("mmeb", "video"))
    write_report(report, folder, Report("earlier", mmeb(FEW[::2])))
    assert Report.read(folder) == report
    return folder


def test_html_page_lists_every_dataset_without_external_content(written):
    page = (written / "report.html").read_text()
    for name in (*FEW, "MSR-VTT", "XM3600-de", "XM3600-&lt;b&gt;", "ImageNet $x$"):
        assert page.count(name) >= 3, name  # in a table, with its bar, with its similarities
    assert "&lt;script&gt;alert(1)" in page
    assert "a &amp; b" in page
    assert not re.search(r"<(script|link|iframe|object|base|i>model)\b", page)
    assert "XM3600-<b>" not in page
    assert not re.search(r"https?:|url\((?!#)|@import", page)
    assert set(re.findall(r"<img src=\"([^\"]*)", page)) == {"data:image/jpeg;base64,QUJD"}
    assert not re.search(r"\bsrc=(?!\"data:)", page)
    assert "default-src 'none'" in page


def test_html_page_shows_scores_beside_published_ones(written):
    page = (written / "report.html").read_text()
    rows = [re.sub(r"<[^>]+>|&[a-z]+;", " ", row).split() for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL)]
    assert ["classification", "5.5", "–", "–", "10.0", "57.4", "62.1", "65.7"] in rows
    assert ["overall", "–", "–", "–", "–", "59.1", "65.2", "70.3"] in rows
    assert ["LLaVE-7B", "published,", "arXiv", "2503.04812", "t2v", "46.8", "71.1"] in rows
    report = Report.read(written)
    for protocols, averages, video in ((("mmeb",), True, False), (("video",), False, True), ((), False, False)):
        alone = page_of(replace(report, protocols=protocols))
        assert ("70.3<" in alone, 'class="tag">published' in alone) == (averages, video)
    assert ["N24News", "2.0", "–", "–", "10.0", "10", "0"] in rows
    assert ["HatefulMemes", "3.0", "3.0", "0.0", "10.0", "10", "0"] in rows
    assert "grounding lacks Visual7W-Pointing of its 4" in page


def test_figures_are_drawn_in_both_themes(written):
    files = sorted(file.name for file in (written / "figures").iterdir())
    assert files == [f"{what}-{theme}.png" for what in ("bars", "similarities") for theme in ("dark", "light")]
    for name in files:
        with Image.open(written / "figures" / name) as picture:
            assert picture.format == "PNG"
            corner = sum(picture.convert("RGB").getpixel((0, 0)))
            assert (corner < 150) if "dark" in name else (corner > 700)
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_leaderboard_file_has_only_mmeb_datasets(written, tmp_path):
    content = json.loads((written / "leaderboard.json").read_text())
    assert list(content) == ["metadata", "metrics"]
    assert content["metadata"]["model_name"] == "runs/<i>model</i>"
    image = content["metrics"]["image"]
    assert list(image) == NAMES
    assert image["N24News"] == {"hit@1": 0.02, "num_pred": 10, "num_data": 10}
    assert image["Visual7W-Pointing"] == "FILE_N/A"
    write_report(own_sets(a=("vqa", True, 0.2)), tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figures", "report.html", "report.json"]
    assert "LLaVE" not in (tmp_path / "report.html").read_text()


def with_variants(results: dict[str, DatasetResult]) -> Report:
    """Return a report of the full vectors and of two other forms, whose scores are 0.9 and 0.75 of the full ones."""
    shares = {Form(48): 1, Form(48, "binary"): 0.9, Form(16, "int8"): 0.75}
    variants = [
        Variant(form, {name: share * result.score for name, result in results.items()})
        for form, share in shares.items()
    ]
    return Report("m", results, variants=tuple(variants))


def test_means_are_by_meta_task_and_other_group():
    tasks = {"classification": 5.5, "vqa": 15.5, "retrieval": 26.5, "grounding": 34.5, "overall": 18.5}

    def means(results: dict[str, DatasetResult]) -> dict[str, float]:
        return {name: pytest.approx(100 * mean) for name, mean in Report("m", results).means().items()}

    captions = {"a": retrieval(), "b": retrieval(shift=0.1)}
    assert means(mmeb()) == tasks
    assert means(captions) == {"text-image": 45}
    assert means(mmeb() | captions) == tasks | {"text-image": 45, "all datasets": (36 * 18.5 + 2 * 45) / 38}
    assert means(mmeb(NAMES[:11])) == {"classification": 5.5, "all datasets": 6}
    assert means(mmeb(NAMES[:1])) == {"all datasets": 1}


def test_variants_are_saved_and_shown(tmp_path, capsys):
    some = own_sets(x=("vqa", True, 0.4), y=("retrieval", True, 0.6)).results
    report = with_variants(some | {"a": retrieval()})
    write_report(report, tmp_path, report)
    assert Report.read(tmp_path) == report
    content = json.loads((tmp_path / "report.json").read_text())
    small = content["variants"][2]
    assert (small["form"], small["bytes"]) == ({"dimensions": 16, "kind": "int8"}, 16)
    assert small["means"]["vqa"] == small["scores"]["x"] == pytest.approx(0.3)
    rows = [  # of the page; the terminal's table has a column for each
        ["48", "float32", "192", "40.0", "60.0", "50.0", "40.0", "46.7"],
        ["48", "binary", "6", "36.0", "-4.0", "54.0", "-6.0", "45.0", "-5.0", "36.0", "-4.0", "42.0", "-4.7"],
        ["16", "int8", "16", "30.0", "-10.0", "45.0", "-15.0", "37.5", "-12.5", "30.0", "-10.0", "35.0", "-11.7"],
    ]
    page = (tmp_path / "report.html").read_text().replace("−", "-")
    section = page[page.index("By size and type") : page.index("<h2>Similarities")]
    shown = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr.*?</tr>", section, re.DOTALL)]
    assert shown[1:] == rows
    assert all(text in section for text in ("all datasets, %, by bytes", ">float32</text>", ">int8</text>", ">binary<"))
    assert {file.name for file in (tmp_path / "figures").iterdir()} >= {"sizes-dark.png", "sizes-light.png"}

    print_report(report)
    printed = capsys.readouterr().out
    table = printed[printed.index("means (%) by size and type of the vectors of m") :]
    cells = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in table.splitlines()]
    assert [row for row in cells if row] == [
        ["size", "48", "48", "16"],
        ["type", "float32", "binary", "int8"],
        ["bytes of a vector", "192", "6", "16"],
        ["vqa", "40.0", "36.0 (-4.0)", "30.0 (-10.0)"],
        ["retrieval", "60.0", "54.0 (-6.0)", "45.0 (-15.0)"],
        ["overall", "50.0", "45.0 (-5.0)", "37.5 (-12.5)"],
        ["text-image", "40.0", "36.0 (-4.0)", "30.0 (-10.0)"],
        ["all datasets", "46.7", "42.0 (-4.7)", "35.0 (-11.7)"],
    ]


@pytest.mark.parametrize(("width", "most"), [(80, 3), (120, 6)])
def test_tables_of_forms_fit_the_terminal_and_lose_no_figure(width, most):
    results = {name: result(task, True, metrics={"P@1": 0.4}) for name, task in zip("abcd", META_TASKS, strict=True)}
    results |= {"e": retrieval(), "f": result("text-video", None, metrics={"t2v R@1": 0.3})}
    results["g"] = result("zero-shot classification", None, metrics={"top-1": 1.0})
    forms = [Form(size, kind) for size in (3584, 1024, 64) for kind in ("float32", "int8", "binary")]
    scores = [
        {name: (1 - number / 10) * each.score for name, each in results.items()} for number, _ in enumerate(forms)
    ]
    report = Report("m", results, variants=tuple(map(Variant, forms, scores)))
    console = Console(width=width, file=io.StringIO())
    tables = _variants_tables(report, width)
    assert max(len(table.columns) - 1 for table in tables) == most
    for table in tables:
        console.print(table)
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= width and "…" not in printed
    cells = [[cell.strip() for cell in re.split("[┃│]", line)[1:-1]] for line in printed.splitlines()]
    shown: dict[str, list[str]] = {}
    for row in filter(None, cells):
        shown.setdefault(row[0], []).extend(row[1:])
    assert len(shown) == 3 + 9
    assert shown["type"] == [form.kind for form in forms]
    assert shown["bytes of a vector"] == [f"{form.bytes:,}" for form in forms]
    fractions = [f"{100 - 10 * number:.1f}" + f" (-{10 * number:.1f})" * bool(number) for number in range(9)]
    assert shown["zero-shot classification"] == fractions


def test_report_without_variants_does_not_name_them(written):
    assert "variants" not in json.loads((written / "report.json").read_text())
    assert "By size and type" not in (written / "report.html").read_text()


def test_variants_without_a_dataset_are_refused(tmp_path):
    with_variants({"a": retrieval(), "b": retrieval()}).save(file := tmp_path / "r.json")
    content = json.loads(file.read_text())
    del content["variants"][1]["scores"]["b"]
    file.write_text(json.dumps(content))
    with pytest.raises(PipelineError, match=r"r\.json lacks datasets with vectors of 48 binary: it is not"):
        Report.read(file)


def test_published_averages_are_consistent():
    """The rounded means of meta-tasks and parts give the rounded overall mean."""
    for paper in PUBLISHED:
        mean = paper.averages
        tasks = {"classification": 10, "vqa": 10, "retrieval": 12, "grounding": 4}
        assert sum(mean[task] * count for task, count in tasks.items()) / 36 == pytest.approx(mean["overall"], abs=1e-3)
        parts = 20 * mean["in distribution"] + 16 * mean["out of distribution"]
        assert parts / 36 == pytest.approx(mean["overall"], abs=1e-3)
    assert PUBLISHED[-1].metrics_of("msrvtt")["t2v R@1"] == 0.468
    assert PUBLISHED[-1].metrics_of("MSVD")["t2v R@10"] == 0.87
    assert PUBLISHED[-1].metrics_of("MSCOCO") == PUBLISHED[-1].metrics_of("MSVD, my split") == {}
