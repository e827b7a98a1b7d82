"""The curves of a run: legends name every line, and no axis or band leaves the range of its metric."""

from types import SimpleNamespace

import pytest

from rec_r1 import cli, config
from rec_r1.evaluation import compare
from rec_r1.pages import cards, figures, plots

REWARD, HELD_OUT, LENGTH, *_ = plots.PANELS

pytestmark = pytest.mark.curves


def log(steps=30, reward=0.02, std=0.4, **more):
    """Rows of metrics.jsonl of a run whose rewards hardly change and spread widely."""
    rows = [{"step": 0, "eval/ndcg@10": 0.311, "eval/raw/ndcg@10": 0.310}]
    for step in range(1, steps + 1):
        rows.append({"step": step, "reward": reward, "reward_std": std, "reward/ndcg@10": reward} | more)
        rows[-1]["reward/ndcg@10/std"] = std
        rows[-1]["completions/mean_length"] = 7.0 + step % 2 / 100
    return rows


@pytest.fixture
def panel():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots()
    yield axes
    plt.close(figure)


def bands(panel):
    return [path.vertices[:, 1] for collection in panel.collections for path in collection.get_paths()]


@pytest.mark.parametrize("reward", [0.02, 0.98])
def test_bands_of_a_metric_stay_between_0_and_1(panel, reward):
    plots.fill(panel, REWARD, {"run": log(reward=reward)})
    sums, metric = bands(panel)
    assert sums.min() >= 0 and metric.min() >= 0 and metric.max() <= 1
    assert metric.max() - metric.min() > 0.4  # Cut where values end, and not left out.


def test_bands_of_other_rewards_are_drawn_as_they_are(panel):
    rows = log(reward=-0.5, **{"reward/format": -0.5, "reward/format/std": 0.4})
    plots.fill(panel, REWARD, {"run": rows})
    sums, form, _ = bands(panel)
    assert sums.min() == pytest.approx(-0.9) and form.min() == pytest.approx(-0.9)


@pytest.mark.parametrize("title", [REWARD, HELD_OUT, LENGTH])
def test_the_legend_of_the_picture_is_above_the_curves(panel, title):
    panel.figure.set_size_inches(5, 4)  # The size of a panel in the picture.
    plots.fill(panel, title, {"run": log()})
    plots._make_room(panel, False)
    panel.figure.canvas.draw()
    legend = panel.get_legend().get_window_extent().transformed(panel.transData.inverted())
    assert legend.y0 >= panel.dataLim.y1


def test_the_legend_says_which_lines_are_smoothed(panel):
    plots.fill(panel, LENGTH, {"run": log()})
    assert panel.get_legend().get_title().get_text() == "smoothed: mean of the last 10 values"
    smooth = [line for line in panel.lines if line.get_gid() == plots.SMOOTHED]
    assert len(smooth) == 1
    values = [7.0 + step % 2 / 100 for step in range(1, 31)]
    assert list(smooth[0].get_ydata()) == pytest.approx([
        sum(values[max(0, i - 9) : i + 1]) / len(values[max(0, i - 9) : i + 1]) for i in range(30)
    ])  # fmt: skip


def test_a_line_that_is_not_smoothed_is_not_said_to_be(panel):
    plots.fill(panel, HELD_OUT, {"run": log()})
    assert panel.get_legend().get_title().get_text() == ""


def test_the_legend_of_a_report_says_it_too():
    ((_, svg),) = figures.curves({"run": log()}, [LENGTH])
    assert "smoothed: mean of the last 10 values" in svg


@pytest.mark.parametrize("title", [REWARD, HELD_OUT])
def test_an_axis_of_a_metric_does_not_magnify_noise(panel, title):
    plots.fill(panel, title, {"run": log(std=0.0)})
    low, high = panel.get_ylim()
    assert high - low >= 0.1 - 1e-9
    assert low <= 0.02 <= high if title == REWARD else low <= 0.310 < 0.311 <= high


def test_other_axes_span_at_least_a_tenth_of_the_values(panel):
    plots.fill(panel, LENGTH, {"run": log()})
    low, high = panel.get_ylim()
    assert high - low >= 0.7 and low <= 7.0 < 7.01 <= high


def test_steps_are_whole_numbers(panel):
    plots.fill(panel, LENGTH, {"run": log(steps=3)})
    assert all(float(tick).is_integer() for tick in panel.get_xticks())


@pytest.mark.slow
def test_the_card_of_a_run_has_its_results_once_they_are_there(tmp_path):
    run = tmp_path / "run"
    recipe = config.load("quickstart", [f"output_dir={run}"])
    run.mkdir()
    cards.write_run(run, recipe)
    before = (run / "README.md").read_text()
    assert f"has not been evaluated yet: `rec-r1 eval {run}`" in before and "A LoRA adapter for" in before
    assert cli.main(["baseline", "quickstart", "random", f"output_dir={run}"]) == 0
    result = compare.read(run, "test")
    (run / "config.yaml").write_text(config.dump(recipe))
    cards.write_evaluated(run)
    after = (run / "README.md").read_text()
    row = next(row for row in result["tables"][0]["rows"] if row["system"] == "random")
    assert f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]" in after and "not been evaluated" not in after
    assert "| " not in after and 'Policy.load("' in after


def test_the_end_of_a_training_is_drawn_once(tmp_path, monkeypatch):
    """The trainer logs its last row, with the whole time, right before it calls `on_train_end`."""
    from rec_r1.training import callbacks

    drawn = []
    monkeypatch.setattr(callbacks.plots, "draw", lambda folders, output: drawn.append(output))
    monkeypatch.setattr(callbacks, "FIRST_DRAWING", 0)
    callback, state = callbacks.Log(tmp_path), SimpleNamespace(is_world_process_zero=True, global_step=2)
    callback.on_log(None, state, None, {"reward": 0.1})
    assert drawn == [tmp_path / "reward_curve.png"]
    callback.next_drawing = 0
    callback.on_log(None, state, None, {"train_runtime": 9.0})
    callback.on_train_end(None, state, None)
    assert len(drawn) == 2
