"""The report page: its numbers are the comparison's, its text is escaped, it needs nothing from outside."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rec_r1 import baselines, cli, config
from rec_r1.config import UserError
from rec_r1.environment import open_environment
from rec_r1.evaluation import records
from rec_r1.evaluation.evaluate import compare_folder, metric_scorer, save_raw, score_answers
from rec_r1.pages import run_report

METRICS = ["ndcg@10", "recall@100"]
NASTY = "<script>alert(1)</script> $a_1$ | `b` & *c*"
VOID = {"meta", "br", "path", "use", "rect", "line", "circle", "img", "hr", "link"}


@pytest.fixture(scope="module")
def env():
    return open_environment(config.load("quickstart"))


def make_run(folder, env, answers, trained=True):
    """A run's folder as training and evaluation leave it, with the answers given in place of a model's."""
    recipe = config.load("quickstart", [f"output_dir={folder}"])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(recipe))
    (folder / "run.json").write_text(json.dumps({"device": "2 CPU threads", "versions": {"torch": "9"}}))
    rows = [{"step": 0, "eval/ndcg@10": 0.2, "eval/raw/ndcg@10": 0.1}]
    rows += [{"step": s, "reward": s / 10, "reward_std": 0.1, "step_time": 90.0, "entropy": 3.0} for s in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    split, scorer = env.task.test, metric_scorer(env.scorer, METRICS)
    save_raw(folder, "test", env, split, scorer)
    for name, given in (("untrained", ["rain"] * len(split)), ("trained", answers))[: 1 + trained]:
        records.save(folder, "test", env, split, score_answers(given, split, scorer), name, "policy", f"{name} <b>")
    return compare_folder(folder, recipe, env, "test", METRICS, policy="best")


@pytest.fixture(scope="module")
def good(env):
    """Answers that name the first relevant document, but for three: nasty, malformed, far off."""
    titles, test = env.task.catalog.titles, env.task.test
    return [NASTY, "", "zzzz"] + [titles[rows[0]].split(" ", 1)[-1] for rows in test.rows[3:]]


@pytest.fixture(scope="module")
def made(env, good, tmp_path_factory):
    """The folder of a run with these answers, and its comparison. Tests that change files take a copy."""
    folder = tmp_path_factory.mktemp("made") / "a"
    return folder, make_run(folder, env, good)


class Page(HTMLParser):
    """Text and tags; fails where tags are not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.text, self.cells = [], [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


@pytest.mark.slow
def test_the_page_shows_the_comparison_s_numbers(made, tmp_path):
    folder, result = shutil.copytree(made[0], tmp_path / "a"), made[1]
    html, markdown = run_report.write([folder], folder / "report.html")
    page, text = Page(html), markdown.read_text(encoding="utf-8")
    assert result["best_baseline"]["verdict"] == "better"
    verdict = f"Trained is better than the best of the others ({result['best_baseline']['system']}): ndcg@10"
    assert verdict in page.text and verdict in text
    for table in result["tables"]:
        for row in table["rows"]:
            assert f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in page.text
            assert f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in text
        for c in table["comparisons"]:
            assert f"{c['wins']} / {c['ties']} / {c['losses']}" in page.text and f"{c['wins']} / {c['ties']}" in text
    for fact in (
        "3 steps, groups of 8",
        "4 min of steps on 2 CPU threads",
        "best: the checkpoint with the best ndcg@10 on validation",
        "torch 9",
    ):
        assert fact in page.text and fact in text
    trained = records.load_all(folder, "test")["trained"].rows
    nothing = sum(row["metrics"]["ndcg@10"] == 0 and not row["malformed"] for row in trained)
    assert f"1 of 219 completions are malformed, and {nothing} others have ndcg@10 0" in page.text
    for query in result["changed"]["improved"]:
        assert next(row for row in trained if row["query_id"] == query)["hits"][0]["title"] in page.text


@pytest.mark.slow
def test_the_page_is_whole_escaped_and_needs_nothing_from_outside(made, tmp_path):
    html, markdown = run_report.write([made[0]], tmp_path / "r.html")
    page, source = Page(html), html.read_text(encoding="utf-8")
    assert not {"script", "img", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert name.startswith("xmlns") or "//" not in (value or ""), (name, value)
            assert name != "xlink:href" or value.startswith("#")
    assert "@import" not in source and not re.search(r"url\((?!#)", source)
    assert "alert(1)" in page.text and "<script" not in source and "<b>" not in markdown.read_text(encoding="utf-8")
    assert source.count("<svg") == 2 + 3 and "#0a0b" not in source and "#010203" not in source
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id", "").startswith("p")]
    used = set(re.findall(r"url\(#(\w+)\)", source))
    assert used <= set(ids)
    for line in markdown.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and "won / tied / lost" not in line:
            assert re.sub(r"\\.", "", line).count("|") in (6, 8, 9)  # the columns of the three kinds of tables


@pytest.mark.slow
def test_a_comparison_without_p_and_with_users_says_so(made, tmp_path):
    folder, result = made
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a/evaluation/test/comparison.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "users": 7}))
    html, markdown = run_report.write([tmp_path / "a"], tmp_path / "r.html")
    (against,) = [c for c in result["tables"][1]["comparisons"] if c["against"] == "raw query"]
    assert result["tables"][1]["slice"] == "mismatch" and against["p_holm"] is None
    for text in (Page(html).text, markdown.read_text(encoding="utf-8")):
        assert "No p against the raw query on mismatch, because these queries were chosen by its score." in text
        assert "intervals and p are over 7 users with all their queries." in text and "None" not in text
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    both = run_report.write([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html")
    assert "No p against the raw query on mismatch" in both[1].read_text(encoding="utf-8")
    old = json.loads(path.read_text())
    del old["users"]  # a comparison of before, with a p everywhere
    for table in old["tables"]:
        for c in table["comparisons"]:
            c["p"] = c["p_holm"] = 0.5
    path.write_text(json.dumps(old))
    assert "No p against" not in Page(run_report.write([tmp_path / "a"], tmp_path / "r.html")[0]).text


@pytest.mark.slow
def test_answers_written_after_the_comparison_are_told(made, tmp_path):
    folder, result = made
    shutil.copytree(folder, tmp_path / "a")
    path = tmp_path / "a/evaluation/test/untrained.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    gone = result["changed"]["improved"][0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["query_id"] != gone))
    with pytest.raises(UserError, match=f"{gone}.*not in the answers of 'untrained'.*run rec-r1 eval again"):
        run_report.write([tmp_path / "a"], tmp_path / "r.html")


@pytest.mark.slow
def test_baselines_alone_and_a_training_without_evaluation(made, tmp_path):
    recipe = config.load("quickstart", [f"output_dir={tmp_path / 'b'}", "evaluation.metrics=[ndcg@10]"])
    baselines.run(recipe, "popularity", "test")
    page = Page(run_report.write([tmp_path / "b"], tmp_path / "b.html")[0])
    assert "Only baselines were" in page.text and "popularity" in page.text and "svg" in {tag for tag, _ in page.tags}
    shutil.copytree(made[0], tmp_path / "c", ignore=shutil.ignore_patterns("evaluation"))
    html, markdown = run_report.write([tmp_path / "c"], tmp_path / "c.html")
    for text in (Page(html).text, markdown.read_text(encoding="utf-8")):
        assert "The test split was not evaluated yet: run rec-r1 eval" in text and "3 steps" in text


@pytest.mark.slow
def test_several_runs_are_compared_where_their_queries_agree(env, made, tmp_path):
    make_run(tmp_path / "two" / "a", env, ["rain"] * len(env.task.test))
    folders = [made[0], tmp_path / "two" / "a"]
    found = run_report.gather(folders, "test")["against"]
    (row,) = [r for r in found["tables"][0]["rows"] if r["system"] == str(folders[1])]
    one, two = (records.load_all(f, "test")["trained"].scores("ndcg@10") for f in folders)
    assert row["comparison"]["difference"] == pytest.approx((one - two).mean())
    page = Page(run_report.write(folders, tmp_path / "both.html")[0])
    assert f"is better than the best of the others ({folders[1]})" in found["verdict"]
    assert page.text.count("The recipe, as resolved") == 2 and found["verdict"] in page.text
    path = folders[1] / "evaluation/test/trained.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert run_report.gather(folders, "test")["against"] is None


def test_mistakes_are_named(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", str(tmp_path / "typo")]) == 2
    assert f"{tmp_path / 'typo'}: no such folder: give the output_dir" in capsys.readouterr().err
    assert cli.main(["report", str(tmp_path / "empty")]) == 2
    assert "no training (metrics.jsonl) and no evaluation of its test split" in capsys.readouterr().err
    for folder in ("page.html", "both.md"):
        (tmp_path / folder).mkdir()
    for output, message in (
        (tmp_path / "r.pdf", "ends in .html"),
        (tmp_path / "no" / "r.html", "does not exist"),
        (tmp_path / "empty", "empty is a folder: name a file in it"),
        (tmp_path / "page.html", "page.html is a folder"),
        (tmp_path / "both.html", "both.md is a folder"),
        (Path("/proc/x.html"), "cannot write into /proc"),
    ):
        with pytest.raises(UserError, match=message):
            run_report.write([tmp_path / "empty"], output)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.slow
def test_no_sideways_scrolling_in_a_real_browser(made, tmp_path, width):
    run_report.write([made[0]], tmp_path / "r.html")
    frame = f"""<iframe src="r.html" style="width:{width}px;height:900px" onload="document.title =
        [this.contentDocument.documentElement.scrollWidth, this.contentWindow.innerWidth]"></iframe>"""
    (tmp_path / "frame.html").write_text(frame)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    shown = subprocess.run(
        ["chromium", *options, f"--window-size={max(width, 600)},1000", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    ).stdout  # fmt: skip
    wide, window = map(int, re.search(r"<title>(\d+),(\d+)</title>", shown).groups())
    assert window == width and wide <= window
