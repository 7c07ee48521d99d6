"""Comparisons: what they find, what they call evaluations, and what they show."""

import json
import re
import shutil

import numpy as np
import pytest
from evaluations import evaluation_folder
from pages import read

from respodiff_jax import cli
from respodiff_jax.errors import UserError
from respodiff_jax.evaluation import compare
from respodiff_jax.evaluation.report import glossary, thumbnails
from respodiff_jax.evaluation.report.comparison import _distinct
from respodiff_jax.evaluation.report.findings import Finding, headline
from respodiff_jax.evaluation.report.markup import Markup, breakable
from respodiff_jax.evaluation.results import Measurement
from respodiff_jax.images import save_png


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluations")


@pytest.fixture(scope="module")
def evaluation(folder):
    return folder / "strong", evaluation_folder(folder / "strong", pictures=40)


@pytest.fixture(scope="module")
def weaker(folder):
    evaluation_folder(folder / "weaker", professions=("doctor", "teacher"), effect=0.3, pictures=40)
    return folder / "weaker"


def finding(metric="deviation_ratio", **values):
    """A finding on evaluations with these values and half widths of intervals."""

    def pair(value, width):
        interval = None if width is None else (value - width, value + width)
        return {"adapted": Measurement(metric, "adapted", value, 9, "fairness", interval)}

    return Finding.of({name: pair(*v) for name, v in values.items()})


def test_finding_names_the_better_one_and_whether_intervals_overlap():
    clear = finding(a=(0.3, 0.05), b=(0.1, 0.05))
    assert clear.text == "b is fairer: 0.10. a has 0.30 (+0.20); the intervals do not overlap."
    assert headline([clear]) == "b is fairer: deviation ratio, 0.10 against 0.30"
    contrary = finding("clip_score", a=(31, 0.1), b=(30, 0.1))
    assert headline([clear, contrary]) == (
        "b is fairer: deviation ratio, 0.10 against 0.30; a has the better CLIP score"
    )
    doubtful = finding("clip_score", a=(31, 2), b=(30, 2))
    assert doubtful.text == (
        "a is better: 31.00. b has 30.00 (−1.00); the intervals overlap, so this may be chance."
    )
    assert headline([doubtful, clear]) == headline([clear])
    assert headline([doubtful]) == "No headline metric tells the evaluations apart"
    unsure = finding(a=(0.1, None), b=(0.3, 0.05))
    assert unsure.text.endswith("no intervals tell whether this is chance.") and not unsure.is_clear


def test_finding_calls_equal_numbers_equal():
    equal = finding("clip_score", a=(13.0001, 0.1), b=(13.0002, 0.1))
    assert equal.text == "a and b are equal: 13.00."
    assert headline([equal]) == "a and b are equal"
    three = finding(a=(0.3, 0.01), b=(0.1, 0.01), c=(0.1, 0.01))
    assert three.text == (
        "b and c are equal: 0.10. a has 0.30 (+0.20); the intervals do not overlap."
    )
    assert not three.is_clear
    best = finding(a=(0.3, 0.01), b=(0.1, 0.01), c=(0.2, 0.2))
    assert best.text.startswith("b is fairest: 0.10. c has 0.20 (+0.10); the intervals overlap")
    # No share of steered prompts is better than another, so the order stays.
    steered = finding("steered", a=(0.3, 0.01), b=(0.1, 0.01), c=(0.3, 0.01))
    assert steered.text == (
        "a and c are equal: 30\u00a0%. b has 10\u00a0% (−20\u00a0%); the intervals do not overlap."
    )
    alone = finding(a=(0.3, 0.01))
    assert alone.text == "Only a measured it: 0.30."
    assert not alone.is_headline
    assert headline([]) == "The evaluations have no headline metric in common"


def test_names_are_what_differs_in_the_paths():
    assert _distinct(["x/gender/21/scale 1", "x/gender/22/scale 1"]) == ["21", "22"]
    assert _distinct(["x/a", "x/a/b"]) == ["a", "a/b"]
    assert _distinct(["a/1/z", "b/1/z", "b/2/z"]) == ["a/1", "b/1", "b/2"]
    # Names go on in the next line after a separator, never within a word.
    assert breakable("run_a/<b>") == "run_<wbr>a/<wbr>&lt;b&gt;"
    assert isinstance(breakable("a"), Markup)


def test_comparison_has_all_runs_and_their_differences(evaluation, weaker, tmp_path):
    content = json.loads((weaker / "results.json").read_text())
    content["made"]["sampling"]["guidance_scale"] = 5.0
    (weaker / "results.json").write_text(json.dumps(content))
    page = read(compare([evaluation[0], weaker], tmp_path / "pages" / "both.html"))
    title = page.text[page.text.index("RespoDiff comparison") :]
    assert title.startswith("RespoDiff comparison strong is fairer: gender deviation ratio, 0.")
    assert "Gender deviation ratio.  strong is fairer: " in page.text
    # Only shared professions are shown: doctor and teacher, each with base and two adapted rows.
    assert len(page.all("img")) == 2 * 3 * 8
    assert "sampling: guidance scale 7.5 5" in page.text
    assert "The evaluations differ in sampling: guidance scale." in page.text
    # A warning of both runs is shown once.
    assert page.text.count("mean little") == 1
    assert f"{evaluation[0].name}, {weaker.name}: the classifier finds only 50%" in page.text
    assert evaluation[1].made["adapter"]["sha256"] not in page.text
    metrics = {(m.metric, m.attribute) for m in evaluation[1].measurements}
    assert sum(a.get("data-label") == "finding" for a in page.all("td")) == len(metrics)
    for m in evaluation[1].measurements:
        if m.subject is None:
            assert glossary.value_text(m) in page.text
    assert "(−0.71 to −0.42)" in page.text


def test_comparison_shows_no_pictures_outside_its_folders(evaluation, weaker, tmp_path):
    """A table from somebody else may name any file of the reader's."""
    secret, stranger = tmp_path / "secret.png", tmp_path / "stranger"
    save_png(np.full((8, 8, 3), 200, np.uint8), secret)
    shutil.copytree(weaker, stranger)
    table = (stranger / "per_image.csv").read_text()
    name = re.search(r"fairness/base/\d+\.png", table)[0]
    link = re.search(r"fairness/adapted/\d+\.png", table)[0]
    (stranger / link).unlink()
    (stranger / link).symlink_to(secret)
    (stranger / "per_image.csv").write_text(table.replace(name, "../secret.png", 1))
    folder = evaluation[0]
    with pytest.warns(UserWarning, match=r"2 pictures of .*stranger are outside that folder"):
        page = compare([folder, stranger], tmp_path / "page.html").read_text("utf-8")
    shown = re.findall(r"data:image/webp;base64,([^\"]+)", page)
    assert shown and thumbnails.thumbnail(secret).split(",")[1] not in shown
    (stranger / "per_image.csv").write_text("file,prompt\na.png,b\n")
    with pytest.raises(UserError, match=r"per_image\.csv lacks the column\(s\) images, protocol"):
        compare([folder, stranger], tmp_path / "page.html")


def test_compare_on_the_command_line(evaluation, weaker, tmp_path, capsys):
    out = str(tmp_path / "comparison.html")
    both = ["compare", str(evaluation[0]), str(weaker), "--out", out]
    assert cli.main([*both, "--name", "new", "--name", "old one"]) == 0
    assert "2 evaluations" in capsys.readouterr().out
    assert "new is fairer" in read(tmp_path / "comparison.html").text
    for names in (["--name", "new"], ["--name", "new", "--name", " new"]):
        assert cli.main([*both, *names]) == 2
        assert "--name are" in capsys.readouterr().err
    assert cli.main(["compare", str(evaluation[0]), "--out", out]) == 2
    assert "expected two or more" in capsys.readouterr().err
    assert cli.main(["compare", str(weaker), str(weaker), "--out", out]) == 2
    assert "given twice" in capsys.readouterr().err
