"""What may be added to the program at the cost of one place: here, a field of Config."""

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OLD_RUNS = ROOT / "tests" / "fixtures" / "old_runs"
EXTRA_FIELD = '''
    extra: int = 0
    """A field with a default that changes nothing."""
'''

SMALL = dict(
    preset="tiny",
    d_model=32,
    n_layers=2,
    n_heads=2,
    d_ff=32,
    num_experts=4,
    max_seq_len=16,
    vocab_size=300,
    batch_size=2,
    gradient_accumulation_steps=1,
    max_steps=3,
    eval_steps=1,
    log_every=1,
    save_every=3,
    sample_tokens=0,
    validation_fraction=0.1,
)
# For a run that is resumed: an old run's own are folders of another machine.
OLD_DATA = dict(data=OLD_RUNS / "text.jsonl", tokenizer=OLD_RUNS / "tokenizer.json", log_every=1)


def command(*words, **options) -> str:
    """What run_experiment.py prints."""
    import run_experiment

    for name, value in options.items():
        words += (f"--{name}", str(value))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert run_experiment.main([str(word) for word in words]) == 0, out.getvalue()
    return out.getvalue()


def losses(run: Path) -> list:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[row["step"], row.get("train_loss"), row.get("val_loss")] for row in rows]


def behaviour(folder: Path) -> dict:
    """What the program that is imported chooses, plans and trains."""
    import plot
    from config import resolve
    from record import results
    from studies.run import summary

    results.plot_training_curves = lambda *args, **kwargs: None  # drawing takes longer
    chosen = [resolve({}, None, gpu_gb) for gpu_gb in (None, 10, 80, 150)]
    small = dict(SMALL, data=folder.parent / "text", cache_dir=folder / "cache", device="cpu")
    command(save_dir=folder / "new", **small)
    shutil.copytree(OLD_RUNS / "fp32", folder / "old")
    resumed = dict(OLD_DATA, cache_dir=folder / "cache", save_dir=folder / "old")
    command("--resume", folder / "old" / "checkpoint_step_6.pt", **resumed)

    shutil.copytree(OLD_RUNS / "fp32", folder / "untouched")
    pair = [folder / "old", folder / "untouched"]
    result = json.loads((folder / "new" / "training_results.json").read_text())
    return dict(
        presets=[(name, why) for _, name, why in chosen],
        parameters=[config.total_params for config, _, _ in chosen],
        plan=json.loads(command("plan", "--json", preset="5b", gpu="h200")),
        new_run=losses(folder / "new"),
        resumed_run=losses(folder / "old"),
        labels=[
            label.replace(str(ROOT), "")
            for label in plot.labels(pair, [plot.read_config(run) for run in pair])
        ],
        summary=sorted(summary(result)),
    )


def copy_of_the_program(folder: Path) -> Path:
    """The program as links, but for config.py, which has one more field."""
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name != "config.py" and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    text = (ROOT / "config.py").read_text()
    before_methods = "\n    def __post_init__"
    assert text.count(before_methods) == 1
    text = text.replace(before_methods, EXTRA_FIELD + before_methods)
    (folder / "config.py").write_text(text)
    return folder


def test_a_field_with_an_inert_default_costs_its_line_and_its_docstring(tmp_path, monkeypatch):
    from record import results

    monkeypatch.setattr(results, "plot_training_curves", results.plot_training_curves)
    (tmp_path / "text").mkdir()
    draw = random.Random(0)
    words = draw.choices(["tree", "house", "river", "stone", "bird", "cloud"], k=3000)
    (tmp_path / "text" / "words.txt").write_text(" ".join(words))
    for name in ("before", "after"):
        (tmp_path / name).mkdir()

    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "import config\n"
        "from tests import test_seams\n"
        "assert config.defaults()['extra'] == 0\n"
        "assert '--extra' in test_seams.help_text()\n"
        "print(json.dumps(test_seams.behaviour(Path(sys.argv[1]))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "after"],
        cwd=copy_of_the_program(tmp_path / "program"),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before = json.loads(json.dumps(behaviour(tmp_path / "before")))
    after = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, _ in after["presets"]] == ["tiny", "small", "5b", "18b"]
    assert len(before["new_run"]) >= 3
    assert after == before


def help_text() -> str:
    out = io.StringIO()
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(out):
        import run_experiment

        run_experiment.main(["--help"])
    return out.getvalue()
