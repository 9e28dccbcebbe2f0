import json
import re
import subprocess
import sys
from itertools import pairwise

import fake_runs
import pytest

from deltaloom.core.atomic import write_json
from deltaloom.core.errors import InputError
from deltaloom.core.estimate import Estimate
from deltaloom.report.cost import product_cost
from deltaloom.report.headline import headline
from deltaloom.report.page import write_report
from deltaloom.report.quality import groups
from deltaloom.report.reading import read_runs
from deltaloom.report.selection import selections


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return fake_runs.recipe_run(tmp_path_factory.mktemp("recipe"), metrics=("accuracy", "loss"))


@pytest.fixture(scope="module")
def page(recipe, tmp_path_factory):
    return written([recipe], tmp_path_factory.mktemp("page") / "report.html")


def written(runs, out):
    write_report(runs, out)
    return out.read_text(encoding="utf-8")


def patch(folder, **changes):
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    write_json(folder / "run.json", record | changes)


def test_the_headline_is_the_comparison_that_was_made(page):
    claim = re.search(r'<p class="claim">(.*?)</p>', page)[1]
    assert claim.startswith("tuned-less beats tuned-random on test-home: +0.")
    assert "paired over 240 items" in claim
    assert "selection included" in claim


def test_sections_stand_in_order_with_headings(page):
    found = re.findall(r"<h2[^>]*>(.*?)</h2>", page)
    wanted = ["Headline", "Quality", "Cost", "Training", "Selection", "Sources", "How it was run"]
    assert found == wanted
    levels = [int(level) for level in re.findall(r"<h([1-6])", page)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


def test_nothing_is_loaded_and_the_script_is_the_one_allowed(page):
    assert "default-src 'none'" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:|//)""", page)
    assert not re.search(r"@import|url\(", page)
    assert page.count("<script>") == 1
    assert page.count("<link") == 1
    assert '<link rel="icon" href="data:,">' in page


def test_untrusted_text_is_escaped(tmp_path):
    pool = fake_runs.pool_rows(tmp_path, 40)
    folder = tmp_path / "chosen"
    settings = {"method": "less", "note": "</style><script>alert(3)</script>"}
    fake_runs.select(folder, pool, settings, count=40)
    text = written([folder], tmp_path / "report.html")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<script") == 1
    assert "<img" not in text
    assert text.count("</style>") == 1


def test_equal_runs_give_equal_bytes_of_bearable_size(recipe, page, tmp_path):
    assert written([recipe], tmp_path / "again.html") == page
    assert len(page.encode()) < 400_000
    assert [path.name for path in tmp_path.iterdir()] == ["again.html"]


def test_charts_and_tables_are_described(page):
    charts = re.findall(r"<svg ([^>]*)>", page)
    outer = [one for one in charts if "viewBox" not in one]
    assert outer
    assert all('role="img"' in one and "aria-label=" in one for one in outer)
    assert page.count("<table") == page.count("<caption>")
    assert page.count("nan") == page.count("nance")
    assert "Infinity" not in page


def test_costs_follow_the_lineage(recipe):
    report = read_runs([recipe])
    steps = {step.name: step for step in report.steps}
    less, tuned = steps["less"].cost["flops"], steps["tuned-less"].cost["flops"]
    assert product_cost(report, steps["tuned-less"])["flops"] == less + tuned
    home = steps["tuned-home-only"].cost["flops"]
    assert product_cost(report, steps["both"])["flops"] == less + tuned + home
    assert product_cost(report, None) is None


def test_models_are_ranked_and_compared(recipe):
    found = {(one.task, one.metric): one for one in groups(read_runs([recipe]))}
    assert list(found) == [
        (task, metric) for metric in ("accuracy", "loss") for task in ("test-home", "test-office")
    ]
    accuracy, loss = found["test-home", "accuracy"], found["test-home", "loss"]
    for group, sign in ((accuracy, -1), (loss, 1)):
        values = [sign * row.estimate.value for row in group.rows]
        assert values == sorted(values)
    pairs = {frozenset((pair.a.label, pair.b.label)): pair for pair in accuracy.pairs}
    assert len(pairs) == len(accuracy.pairs)
    assert pairs[frozenset(("tuned-less", "tuned-random"))].kind == "other data"
    assert frozenset(("base", "outside-adapter")) in pairs
    # Different settings: no controlled comparison.
    assert frozenset(("tuned-home-only", "tuned-random")) not in pairs
    assert all(pair.p_holm >= pair.result.p_value for pair in accuracy.pairs)


def test_no_difference_is_said_to_be_none(tmp_path):
    folder = tmp_path / "measured"
    fake_runs.measure(folder, ["base", "outside"], ["test-home"], "accuracy", compare="base")
    found = headline(read_runs([folder]), groups(read_runs([folder])))
    assert not found.shown
    assert found.main.startswith("No difference shown between")


def test_selection_shows_rows_scores_and_the_cut(recipe, page):
    less, chance = selections(read_runs([recipe]))
    assert less.chosen == 60
    assert less.pool == 900
    assert less.scores.cut == pytest.approx(less.rows[-1].score)
    assert sum(a for a, _ in less.scores.counts) == 60
    assert sum(a + b for a, b in less.scores.counts) == 900
    # No bin has rows from both sides of the cut.
    assert all(not (chosen and others) for chosen, others in less.scores.counts)
    assert chance.scores is None
    assert [one.name for one in less.sources] == [one.name for one in chance.sources]
    assert "closest to target row" in page
    assert "<details><summary>Where did the" in page


def test_many_rows_are_counted_not_shown(tmp_path):
    pool = fake_runs.pool_rows(tmp_path, 500)
    fake_runs.select(tmp_path / "many", pool, {"method": "less"}, count=260)
    text = written([tmp_path / "many"], tmp_path / "report.html")
    assert "The first 200 of 260 chosen rows; 60 more are in selected.jsonl" in text


def test_how_it_was_run(recipe, page):
    assert f"deltaloom run {recipe}/recipe.yaml out={recipe}-again" in page
    assert "density: 0.2" in page
    assert "<code>bbbbbbbbbbbbbbbb</code>" in page
    assert "<dt>torch</dt><dd>2.9.0</dd>" in page
    assert 'title="/data/test-home.jsonl">test-home.jsonl</th>' in page


def test_single_step_runs_find_one_another(tmp_path):
    pool = fake_runs.pool_rows(tmp_path)
    chosen, tuned, measured = (tmp_path / name for name in ("chosen", "tuned", "measured"))
    fake_runs.select(chosen, pool, {"method": "less"})
    fake_runs.tune(tuned, [str(chosen)], 3e5)
    fake_runs.measure(measured, ["base", str(tuned)], ["test-home"], "accuracy", compare="base")
    report = read_runs([measured, tuned, chosen])
    (group,) = groups(report)
    product = next(row.product for row in group.rows if row.label == "tuned")
    assert product.folder == tuned
    assert {step.name for step in report.lineage(product)} == {"chosen", "tuned"}
    text = written([measured, tuned, chosen], tmp_path / "report.html")
    assert "measured + tuned + chosen" in text


def test_two_runs_of_one_recipe_are_told_apart(tmp_path):
    folders = []
    for seed in ("seed1", "seed2"):
        folders.append(tmp_path / seed / "run")
        labels = ["base", "outside" if seed == "seed1" else "other"]
        fake_runs.measure(folders[-1] / "m", labels, ["test-home"], "accuracy", compare="base")
        fake_runs.finish_recipe(folders[-1], ["m"])
    report = read_runs(folders)
    assert [run.name for run in report.runs] == ["seed1/run", "seed2/run"]
    (group,) = groups(report)
    # The base was measured twice with one result: it is shown once.
    assert sorted(row.label for row in group.rows) == ["base", "other", "outside"]
    assert "seed1/run + seed2/run" in written(folders, tmp_path / "report.html")


def test_a_difference_may_not_outlive_correction(tmp_path):
    folder = tmp_path / "measured"
    labels = ["base", *(f"model{k}" for k in range(9))]
    fake_runs.measure(folder, labels, ["test-home"], "accuracy", compare="base")
    base = fake_runs.answers("base", "test-home", "accuracy", 240)
    flips = [key for key, value in base.items.items() if value == 0.0][:7]
    items = {key: 1.0 if key in flips else value for key, value in base.items.items()}
    one = Estimate.from_items(items, metric="accuracy", of="model0 on test-home")
    write_json(folder / "model0--test-home" / "estimate.json", one.to_json())
    (group,) = groups(read_runs([folder]))
    pair = next(p for p in group.pairs if {p.a.label, p.b.label} == {"base", "model0"})
    assert pair.result.favours == "a"
    assert pair.p_holm > 0.05
    text = written([folder], tmp_path / "report.html")
    assert "model0 is better (not after correction)" in text


def test_a_failed_recipe_shows_where_and_why(tmp_path):
    folder = fake_runs.recipe_run(tmp_path, rows=200, count=30)
    error = "the loss is nan at step 12; no checkpoint was written yet"
    patch(folder, status="failed", error=error, results={})
    patch(folder / "tuned-all", status="failed", error=error, results={})
    (folder / "measured-accuracy" / "run.json").unlink()
    for path in folder.glob("measured-accuracy/*/estimate.json"):
        path.unlink()
    text = written([folder], tmp_path / "report.html")
    assert text.count(error) == 1
    assert "8 of 8 done" not in text
    assert '<span class="badge failed">failed</span>' in text
    assert '<span class="badge missing">not started</span>' in text
    assert "Nothing was measured: tuned-all (tune lora) failed." in text
    assert "# takes it up where it stopped" in text


def test_a_recipe_that_failed_at_once(tmp_path):
    folder = fake_runs.recipe_run(tmp_path, rows=200, count=30)
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / "run.json").rename(alone / "run.json")
    patch(alone, status="interrupted", error="", results={})
    text = written([alone], tmp_path / "report.html")
    assert "0 of 8 done" in text
    assert "Training</h2>" not in text


def test_missing_and_damaged_pieces(tmp_path):
    folder = fake_runs.recipe_run(tmp_path, rows=200, count=30)
    (folder / "recipe.yaml").unlink()
    (folder / "random" / "selected.jsonl").unlink()
    (folder / "less" / "scores" / "shards" / "00000.safetensors").write_bytes(b"torn")
    (folder / "both" / "run.json").write_text("{", encoding="utf-8")
    with open(folder / "tuned-less" / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 121, "loss": NaN}\n{"step": 122, "lo')
    (folder / "measured-accuracy" / "base--test-home" / "estimate.json").write_text("[]")
    text = written([folder], tmp_path / "report.html")
    assert "The scores cannot be read" in text
    assert "unreadable" in text
    assert "method: less" in text  # the recipe comes from the record then
    found = {one.task: one for one in groups(read_runs([folder]))}
    # Its items are gone, its record is not: it is shown and not compared.
    assert "base" in {row.label for row in found["test-home"].rows}
    assert all("base" not in (pair.a.label, pair.b.label) for pair in found["test-home"].pairs)


def test_one_item_has_no_interval(tmp_path):
    folder = tmp_path / "measured"
    fake_runs.measure(folder, ["base"], ["test-home"], "accuracy")
    one = Estimate.from_items({"q": 3.5}, metric="accuracy", of="base on test-home")
    write_json(folder / "base--test-home" / "estimate.json", one.to_json())
    text = written([folder], tmp_path / "report.html")
    assert "[unknown]" in text
    assert "there is nothing to compare it with" in text


@pytest.mark.parametrize("content", [None, "", "[]", '{"schema": 99}'])
def test_what_is_no_run_is_refused_in_a_sentence(tmp_path, content):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        if content:
            (folder / "run.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"run|schema") as caught:
        write_report([folder], tmp_path / "report.html")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_bad_calls_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one"):
        write_report([], tmp_path / "report.html")
    fake_runs.measure(tmp_path / "m", ["base"], ["t"], "accuracy")
    with pytest.raises(InputError, match="is a folder"):
        write_report([tmp_path / "m"], tmp_path)


def test_reports_load_no_model_library():
    code = (
        "import sys, deltaloom.report.page\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'altair'} & sys.modules.keys()\n"
        "sys.exit(len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
