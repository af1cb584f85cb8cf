import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import plot
from config import ExperimentError

ROOT = Path(plot.__file__).parent
pytestmark = pytest.mark.filterwarnings("error")


def training_row(step, layers=2, experts=4, **changes):
    loss = 4 + 6 * math.exp(-step / 30)
    return (
        dict(
            step=step,
            train_loss=loss,
            train_perplexity=math.exp(loss),
            train_accuracy=0.3,
            load_balancing_loss=1.0,
            grad_norm=1.0,
            muon_lr=0.01,
            adamw_lr=0.001,
            tokens_per_second=5e4,
            mfu=None,
            expert_load=[[1 / experts] * experts] * layers,
            memory_allocated_gb=40.0,
            memory_reserved_gb=60.0,
            memory_peak_gb=55.0,
            elapsed_seconds=1.0 * step,
            tokens_seen=1000 * step,
            loss_scale=65536.0,
            skipped_steps=0,
        )
        | changes
    )


def validation_row(step):
    return dict(step=step, val_loss=5.0, val_perplexity=148.4, val_accuracy=0.2)


def run(steps=20, **options):
    rows = [validation_row(0)]
    for step in range(1, steps + 1):
        rows += [training_row(step, **options)] + ([validation_row(step)] if step % 10 == 0 else [])
    return rows


CPU = dict(memory_allocated_gb=1.2, memory_peak_gb=1.5, memory_reserved_gb=None)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Draws rows and returns the panels by name. No file is written: that takes a second."""

    def draw(rows, **options):
        panels = {}

        def write(figure, path):
            names = ("loss", "perplexity", "rate", "speed", "experts", "memory")
            panels.update(zip(names, figure.axes, strict=True))

        monkeypatch.setattr(plot, "write_figure", write)
        plot.plot_training_curves(rows, tmp_path / "c.png", **options)
        return panels

    return draw


def texts(axes):
    return [t.get_text() for t in axes.texts]


def lines(axes):
    return {line.get_label(): np.asarray(line.get_ydata(), float) for line in axes.lines}


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [validation_row(0)],
        [training_row(1)],
        run(2),
        run(20),
        run(20, layers=48, experts=64),
        run(20, layers=1, experts=1),
        run(20, layers=0),
        run(20, **CPU),
        run(3, layers=0, **CPU),
        run(20, train_loss=math.nan, train_perplexity=math.inf),
        run(20, train_loss=None, tokens_per_second=None),
        run(20, train_perplexity=0.0, muon_lr=0.0, adamw_lr=0.0, tokens_per_second=0.0),
        run(20, memory_peak_gb=math.inf),
        run(5) + run(5, train_loss=-math.inf, grad_norm=math.nan),
        run(20, expert_load=[[None, math.nan, math.inf, 0.5]]),
        [{"step": 3}, {"step": 4, "train_loss": 1.0}, {"step": 5, "val_loss": 1.0}],
        [training_row(10**7)],
        [training_row(s, train_perplexity=200 + s) for s in range(9)],
    ],
)
def test_any_history_gives_a_plot_without_warnings(tmp_path, rows):
    path = tmp_path / "training_curves.png"
    plot.plot_training_curves(rows, path, title="a title", unigram_cross_entropy=7.0)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_panels_show_the_data(draw):
    panels = draw(run(20), unigram_cross_entropy=7.0)
    assert list(lines(panels["loss"])["validation"]) == [5.0] * 3
    assert set(lines(panels["loss"])["unigram cross-entropy of the held-out text"]) == {7.0}
    assert panels["perplexity"].get_yscale() == "log"
    assert {k: v[0] for k, v in lines(panels["rate"]).items()} == {"Muon": 0.01, "AdamW": 0.001}
    assert {k: v[0] for k, v in lines(panels["memory"]).items()} == {
        "allocated": 40,
        "reserved": 60,
        "peak": 55,
    }
    assert panels["memory"].get_title() == "GPU memory (GB)" and panels["memory"].get_ylim()[0] == 0
    for axes in panels.values():
        assert axes.get_title() and not texts(axes)


def test_each_optimizer_has_its_learning_rate(draw):
    shown = lines(draw(run(20, sgd_lr=0.5))["rate"])
    assert {label: values[0] for label, values in shown.items()} == {
        "Muon": 0.01,
        "AdamW": 0.001,
        "sgd": 0.5,
    }


def test_expert_panel_has_the_extremes_of_each_layer(draw):
    load = [[0.1, 0.9], [0.4, 0.6], [0.3, 0.7]]
    even = [[0.5, 0.5]] * 3
    rows = [training_row(s, expert_load=even if s == 4 else load) for s in range(5)]
    panel = draw(rows)["experts"]
    shown = lines(panel)
    assert (
        shown["busiest expert, median layer"][0] == 0.7
        and shown["idlest expert, median layer"][0] == 0.3
    )
    assert shown["even share, 1/2"][0] == 0.5
    bands = [b.get_paths()[0].vertices for b in panel.collections]
    for step, expected in ((0, [(0.6, 0.9), (0.1, 0.4)]), (4, [(0.5, 0.5), (0.5, 0.5)])):
        shares = [band[band[:, 0] == step, 1] for band in bands]
        assert [(share.min(), share.max()) for share in shares] == expected
    assert panel.get_ylim()[1] >= 0.9 * 1.4, "room for the legend above the bands"


def test_dense_and_cpu_and_empty_runs_say_so(draw):
    panels = draw(run(20, layers=0, **CPU))
    assert texts(panels["experts"]) == ["dense model: no experts"]
    assert panels["memory"].get_title() == "Memory (GB)" and set(lines(panels["memory"])) == {
        "resident",
        "peak",
    }
    assert {t for axes in draw([]).values() for t in texts(axes)} == {"no data yet"}
    assert texts(draw([validation_row(0)])["experts"]) == ["no data yet"]


def test_a_single_row_is_visible(draw):
    panels = draw([training_row(7)])
    for name in ("loss", "perplexity", "rate", "speed", "experts", "memory"):
        assert panels[name].lines[-1].get_marker() == "o" or name == "experts"


def test_bad_values_leave_a_gap(draw):
    rows = run(30)
    for row in rows[10:15]:
        row["train_loss"] = math.inf
    smooth = lines(draw(rows)["loss"])["training, smoothed"]
    assert 3 <= np.isnan(smooth).sum() <= 5 and np.isfinite(smooth[-10:]).all()


def test_smoothing():
    assert len(plot._smoothed(np.array([]))) == 0
    y = np.arange(200.0)
    assert np.allclose(plot._smoothed(y)[:-4], y[:-4])  # a straight line stays where it is: no lag
    assert np.allclose(plot._smoothed(np.full(100, 3.0)), 3.0)
    noise = np.random.default_rng(0).normal(size=10_000)
    assert plot._smoothed(noise)[200:-200].std() < 0.08
    assert np.array_equal(
        plot._smoothed(np.array([np.nan, 2.0, np.nan])), [np.nan, 2.0, np.nan], equal_nan=True
    )


@pytest.mark.slow
def test_a_redrawn_plot_is_a_new_file(tmp_path):
    path = tmp_path / "c.png"
    path.write_bytes(b"old")
    (tmp_path / "reader.png").hardlink_to(path)  # someone who has the old one open
    plot.plot_training_curves(run(3), path)
    assert (tmp_path / "reader.png").read_bytes() == b"old" != path.read_bytes()


@pytest.mark.slow
def test_a_failed_write_keeps_the_old_plot(tmp_path, monkeypatch):
    path = tmp_path / "c.png"
    path.write_bytes(b"old")

    def fail(self, file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(ExperimentError, match="c.png.*No space"):
        plot.plot_training_curves(run(3), path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    with pytest.raises(ExperimentError, match="No such file"):
        plot.plot_training_curves(run(3), tmp_path / "missing" / "c.png")


@pytest.mark.slow
def test_fifty_thousand_rows_are_fast(tmp_path):
    rows = run(50_000, layers=12, experts=8)
    start = time.process_time()
    plot.plot_training_curves(rows, tmp_path / "c.png")
    # On a busy machine 2.3 s, of which a run of 50 rows takes 1.5. All points took 6 s.
    assert time.process_time() - start < 5


@pytest.mark.slow
def test_a_long_run_is_drawn_as_fast_as_a_short_one(tmp_path, draw):
    rows = run(50_000, layers=4, experts=8)
    rows[40_000]["train_loss"] = 99.0
    panels = draw(rows)
    drawn = sum(len(line.get_xdata()) for panel in panels.values() for line in panel.lines)
    assert drawn < 60_000, "not every point of 500,000"
    assert max(panels["loss"].lines[0].get_ydata()) == 99, "no spike is left out"


def test_few_points_are_drawn_of_many_and_gaps_stay():
    y = np.arange(100_000.0)
    y[50_000:60_000] = np.nan
    shown = plot._extremes(y)
    assert 1000 < len(shown) <= plot.MOST_POINTS
    assert (shown[0], shown[-1]) == (0, len(y) - 1)
    assert np.isnan(y[shown]).any()
    assert list(plot._extremes(np.zeros(1500))) == list(range(1500))


def test_resume_points_are_marked_where_there_are_data(draw, tmp_path):
    panels = draw(run(20, layers=0), resumed_at=[5, 12])
    marks = [line for line in panels["loss"].lines if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in marks] == [5, 12]
    _, names = panels["loss"].get_legend_handles_labels()
    assert names.count("resumed") == 1
    assert not panels["experts"].lines, "dense: nothing is drawn there"
    starts = [dict(step=0, resumed_from=None), dict(step=5, resumed_from="a")]
    content = dict(step=12, resumed_from="b", earlier=starts)
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert plot.read_resume_points(tmp_path) == [5, 12]
    (tmp_path / "run.json").write_text("[]")
    assert plot.read_resume_points(tmp_path) == []


def test_a_comparison_marks_resume_points_on_the_runs_own_lines(monkeypatch, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder in folders:
        folder.mkdir()
        write_metrics(folder, run(20, layers=0))
    starts = [dict(step=0, resumed_from=None), dict(step=5, resumed_from="a")]
    content = dict(step=12, resumed_from="b", earlier=starts)
    (folders[1] / "run.json").write_text(json.dumps(content))

    figures = []
    monkeypatch.setattr(plot, "write_figure", lambda figure, path: figures.append(figure))
    plot.draw_runs(folders, tmp_path / "c.png")
    [axes] = figures[0].axes
    marks = [line for line in axes.lines if line.get_marker() == "|"]
    [of_b, entry] = marks  # the second one is an entry of the legend
    assert list(of_b.get_xdata()) == [5, 12] and not len(entry.get_xdata())
    names = [plot._as_label(str(folder)) for folder in folders]
    line_of_b = next(line for line in axes.lines if line.get_label() == names[1])
    assert of_b.get_color() == line_of_b.get_color()
    drawn = dict(zip(line_of_b.get_xdata(), line_of_b.get_ydata()))
    assert list(of_b.get_ydata()) == [drawn[5], drawn[12]]
    assert axes.get_legend_handles_labels()[1] == [*names, "resumed"]

    (folders[1] / "run.json").unlink()
    plot.draw_runs(folders, tmp_path / "c.png")
    assert not [line for line in figures[1].axes[0].lines if line.get_marker() == "|"]


# --- command line


@pytest.fixture
def no_pictures(monkeypatch):
    """Rendering a figure takes a second; its file is written without it."""

    def write(figure, path):
        mark = b"Software\0" + plot.SOFTWARE.encode()
        Path(path).write_bytes(plot.PNG_SIGNATURE + bytes(16) + mark)

    monkeypatch.setattr(plot, "write_figure", write)


def write_metrics(folder, rows, tail=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)


@pytest.mark.parametrize("tail", ["", '{"step": 21, "train_lo', "\n"])
def test_a_line_that_is_half_written_is_left_out(tmp_path, tail):
    write_metrics(tmp_path, run(20, train_loss=math.nan), tail)
    assert plot.read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 20


@pytest.mark.slow
def test_redraws_a_run(tmp_path, capsys, request):
    write_metrics(tmp_path, run(20, train_loss=math.nan), '{"step": 21, "train_lo')
    assert plot.main([str(tmp_path)]) == 0
    picture = (tmp_path / "training_curves.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    plot.check_replaceable(tmp_path / "training_curves.png")  # it is ours
    request.getfixturevalue("no_pictures")
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "other.png")]) == 0
    assert (tmp_path / "other.png").exists()
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "\udcff.png")]) == 0  # no text
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_command_line_errors(tmp_path, capsys):
    assert plot.main([str(tmp_path / "missing")]) == 1
    assert "metrics.jsonl cannot be read: No such file" in capsys.readouterr().err
    for bad in ("{oops\n", "[1]\n", '{"train_loss": 1}\n'):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + bad + '{"step": 2}\n')
        rows = plot.read_metrics(tmp_path / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2]
        assert "metrics.jsonl that hold no row are left out: 1" in capsys.readouterr().err
    write_metrics(tmp_path, [], '{"ste')
    assert plot.main([str(tmp_path)]) == 1
    assert (
        "no rows yet" in capsys.readouterr().err and not (tmp_path / "training_curves.png").exists()
    )
    write_metrics(tmp_path, run(2))
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "no" / "c.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert plot.main([str(tmp_path), "--out", "a" * 300]) == 1
    assert "error: " in capsys.readouterr().err


def png(width: int, height: int, software: bytes) -> bytes:
    """The beginning of a PNG of this size."""
    header = b"\0\0\0\rIHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return plot.PNG_SIGNATURE + header + b"....tEXtSoftware\0" + software


OURS = plot.SOFTWARE.encode()
MATPLOTLIB = b"Matplotlib version3.10"


@pytest.mark.parametrize(
    "content, ours",
    [
        (png(5, 5, OURS), True),
        (png(1800, 1500, MATPLOTLIB), True),  # of before the mark
        (png(1350, 825, MATPLOTLIB), True),
        (png(640, 480, MATPLOTLIB), False),
        (png(1800, 1500, b"GIMP"), False),
        (b"my notes", False),
        (b"", False),
        (None, False),
    ],
)
@pytest.mark.parametrize("out", ["", "training_curves.png"])
def test_a_file_that_was_not_drawn_here_is_not_overwritten(
    tmp_path, capsys, no_pictures, content, ours, out
):
    write_metrics(tmp_path, run(2))
    path = tmp_path / "training_curves.png"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    options = ["--out", str(tmp_path / out)] if out else []
    code = plot.main([str(tmp_path), *options])
    assert code == (0 if ours else 1)
    error = capsys.readouterr().err
    if not ours:
        assert "training_curves.png is there already" in error
        assert "Name another file with --out, or delete it" in error
        assert path.is_dir() or path.read_bytes() == content


def test_a_pipe_or_a_device_is_not_replaced(tmp_path, capsys, no_pictures):
    write_metrics(tmp_path, run(2))
    os.mkfifo(tmp_path / "pipe")
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "pipe")]) == 1
    assert (tmp_path / "pipe").is_fifo()


def test_any_error_of_matplotlib_is_one_line(tmp_path, capsys, monkeypatch):
    write_metrics(tmp_path, run(2))
    monkeypatch.setattr(plot, "plot_training_curves", lambda *_, **__: 1 / 0)
    assert plot.main([str(tmp_path)]) == 1
    assert "cannot be drawn: division by zero" in capsys.readouterr().err


@pytest.mark.slow
def test_the_script_ends_without_a_traceback_and_never_imports_pyplot(tmp_path):
    """pyplot looks for a display."""
    code = f"""
import runpy, sys
sys.argv = ["plot.py", {str(tmp_path / "missing")!r}]
try:
    runpy.run_path("plot.py", run_name="__main__")
finally:
    assert "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


# --- several runs


@pytest.fixture
def runs(tmp_path):
    """runs(name=config, ...) writes a folder of metrics and configuration for each and returns their paths."""

    def make(file="run.json", **configs):
        for name, config in configs.items():
            (tmp_path / name).mkdir()
            write_metrics(tmp_path / name, run(20, train_loss=len(name)))
            if config is not None:
                (tmp_path / name / file).write_text(
                    json.dumps(dict(config=dict(config, save_dir=name, cache_dir=name)))
                )
        return [tmp_path / name for name in configs]

    return make


def drawn(monkeypatch, folders, *options):
    """{legend label: first training loss} of the figure that the command draws."""
    figures = []
    monkeypatch.setattr(plot, "write_figure", lambda figure, path: figures.append(figure))
    assert plot.main([*map(str, folders), *options]) == 0
    (axes,) = figures[0].axes
    handles, shown = axes.get_legend_handles_labels()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == shown
    return {label: handle.get_ydata()[0] for label, handle in zip(shown, handles)}


def test_several_runs_are_named_by_the_fields_in_which_they_differ(runs, monkeypatch):
    folders = runs(
        a=dict(muon_lr=0.02, seed=1, d_model=8),
        bb=dict(muon_lr=0.02, seed=2, d_model=8),
        ccc=dict(muon_lr=0.1, seed=1, d_model=8),
    )
    assert drawn(monkeypatch, folders) == {
        "muon_lr=0.02, seed=1": 1,
        "muon_lr=0.02, seed=2": 2,
        "muon_lr=0.1, seed=1": 3,
    }
    assert drawn(monkeypatch, folders[:2] + folders[:1]) == {"seed=1": 1, "seed=2": 2}, (
        "a run named twice is drawn once"
    )


def test_a_run_that_is_named_twice_is_drawn_once_and_said_so(
    runs, tmp_path, monkeypatch, capsys, no_pictures
):
    a, bb = runs(a=dict(seed=1), bb=dict(seed=2))
    monkeypatch.chdir(tmp_path)
    assert plot.main(["a", str(a)]) == 0
    said = capsys.readouterr()
    assert (
        said.out == f"{Path('a') / 'training_curves.png'}\n"
        and said.err == "note: a run that is named twice is drawn once: a\n"
    )
    assert plot.main([str(a), str(bb)]) == 0 and capsys.readouterr().err == ""


def test_a_run_of_before_eval_sequences_validated_eval_steps_batches(runs):
    common = dict(eval_steps=20, batch_size=4)
    a, b = runs(a=dict(common, seed=1), b=dict(common, seed=2, eval_sequences=80))
    assert plot.labels([a, b], [plot.read_config(p) for p in (a, b)]) == ["seed=1", "seed=2"]


def test_the_curves_of_a_run_have_its_reference_line(runs, monkeypatch):
    old, new = runs(old={}, new={})
    facts = json.loads((new / "run.json").read_text())
    (new / "run.json").write_text(json.dumps(facts | dict(data=dict(unigram_cross_entropy=7.5))))
    found = []
    monkeypatch.setattr(plot, "plot_training_curves", lambda *_, **options: found.append(options))
    assert plot.main([str(new)]) == plot.main([str(old)]) == 0
    assert [options["unigram_cross_entropy"] for options in found] == [7.5, None]


def test_runs_that_are_alike_or_have_no_configuration_are_named_by_their_folder(runs):
    a, bb, ccc, none = runs(a=dict(seed=1), bb=dict(seed=1), ccc=dict(seed=2), dddd=None)
    assert plot.labels([a, bb], [plot.read_config(p) for p in (a, bb)]) == [str(a), str(bb)]
    assert plot.labels([a, bb, ccc], [plot.read_config(p) for p in (a, bb, ccc)]) == [
        f"{a} (seed=1)",
        f"{bb} (seed=1)",
        "seed=2",
    ]
    assert plot.labels([a, none], [plot.read_config(p) for p in (a, none)]) == ["seed=1", str(none)]
    (none / "run.json").write_text("[broken")
    assert plot.read_config(none) == {}


def test_any_folder_s_name_can_be_a_label(runs, monkeypatch, tmp_path):
    folders = runs(**{"_a": None, r"b$c\q$": None})
    monkeypatch.chdir(tmp_path)
    assert plot.main([folder.name for folder in folders]) == 0
    assert list(drawn(monkeypatch, [folder.name for folder in folders])) == [" _a", r"b\$c\q\$"]


def test_an_older_run_has_its_configuration_in_its_results(runs, monkeypatch):
    assert list(
        drawn(monkeypatch, runs("training_results.json", a=dict(seed=1), b=dict(seed=2)))
    ) == ["seed=1", "seed=2"]


def test_help_says_where_the_plot_is_written(capsys):
    with pytest.raises(SystemExit):
        plot.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "comparison.png in the folder that contains the first RUN" in text


def test_the_comparison_is_written_beside_the_first_run(runs, tmp_path, capsys, no_pictures):
    folders = runs(**{"r" * n: dict(seed=n, data="a long path " * 20) for n in range(1, 10)})
    assert plot.main(list(map(str, folders))) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'comparison.png'}\n"
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG") and not list(
        tmp_path.glob("*/*.png")
    )
    assert (
        plot.main([*map(str, folders), "--out", str(tmp_path / "mine.png")]) == 0
        and (tmp_path / "mine.png").exists()
    )
    assert (
        plot.main([str(folders[0]), str(tmp_path / "missing")]) == 1
        and "missing" in capsys.readouterr().err
    )
    write_metrics(folders[0], [])
    assert plot.main(list(map(str, folders[:2]))) == 0, "one has nothing to draw yet"
    write_metrics(folders[1], [])
    assert plot.main(list(map(str, folders[:2]))) == 1
