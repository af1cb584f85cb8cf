"""Coming back: what --resume finds in a folder, damaged or not, and where a resumed run writes."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import model
import run_experiment
from record import checkpoint, latest, run_file, run_folder
from tests.commands import (  # noqa: F401  (fixtures are found by their names)
    arguments,
    assert_refused,
    base,
    cli,
    contents,
    finished,
    no_pictures,
    rows,
    run,
    step_of,
)
from tools import evaluate

LATEST = "checkpoint_latest.pt"


def damage(path: Path) -> None:
    """Changes a byte of the tensors, in this file alone and not in what it is a link to."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.unlink()
    path.write_bytes(raw)


def chosen(folder: Path, capsys) -> tuple[str | None, str]:
    """(the file that --resume latest takes, the warnings)."""
    branches = []
    last_start = run_folder.last_start(folder)
    if last_start is not None:
        branches = last_start.get("lineage", [])
    found = latest.newest_intact(folder, branches)
    return found and found[0].name, capsys.readouterr().err


# ---------------------------------------------------------------- which checkpoint


@pytest.fixture(scope="module")
def branched(base, tmp_path_factory):  # noqa: F811
    """A run of 5 steps, each saved, and a second branch from step 3 that has saved its step 4.

    Copies of the folder have no links: latest and step 4 are two files. Not to be written to.
    """
    folder = tmp_path_factory.mktemp("branched") / "run"
    options = arguments(base, save_dir=folder, max_steps=5, save_every=1, keep_checkpoints=9)
    assert run_experiment.main(options) == 0
    again = ["--resume", folder / "checkpoint_step_3.pt", "--max_steps", 4]
    again += ["--cache_dir", base / "cache"]
    assert run_experiment.main([str(word) for word in again]) == 0
    (folder / "checkpoint_step_4.pt.1").unlink()  # of the first branch
    return folder


@pytest.fixture
def branch(branched, tmp_path):
    return Path(shutil.copytree(branched, tmp_path / "run"))


def test_a_damaged_latest_gives_way_to_its_own_branch(cli, branch):  # noqa: F811
    damage(branch / LATEST)
    code, out, err = cli("--resume", "latest", "--save_dir", branch)
    assert code == 0, err
    assert f"Resuming {branch / 'checkpoint_step_4.pt'} at step 4" in out, "not step 5"
    assert err.count("warning") == 1
    assert "checkpoint_latest.pt is damaged" in err
    assert (branch / "checkpoint_step_5.pt").exists(), "the other branch stays"
    assert checkpoint.load(branch / LATEST)["step"] == 4
    assert (branch / f"{LATEST}.1").exists(), "the damaged file is kept aside"


def test_the_highest_intact_step_of_the_branch_is_taken(branch, capsys):
    assert chosen(branch, capsys) == (LATEST, "")
    for name in (LATEST, "checkpoint_step_4.pt", "checkpoint_step_3.pt"):
        damage(branch / name)
    name, warnings = chosen(branch, capsys)
    assert name == "checkpoint_step_2.pt", "the parent's branch up to step 3 is its own"
    assert warnings.count("warning") == 3
    # Without run.json the lists in the checkpoints say the same; also without any list of latest.
    (branch / "run.json").unlink()
    assert chosen(branch, capsys)[0] == "checkpoint_step_2.pt"
    for step in (1, 2):
        (branch / f"checkpoint_step_{step}.pt").unlink()
    with pytest.raises(
        checkpoint.CheckpointError, match="given up .checkpoint_step_5.pt.*--resume FILE"
    ):
        chosen(branch, capsys)


def test_a_branch_that_has_not_saved_yet_is_not_left_for_the_one_before(branch, capsys):
    """It was killed between its start at step 3 and its first checkpoint."""
    (branch / "checkpoint_step_4.pt").unlink()
    shutil.copy(branch / "checkpoint_step_3.pt", branch / LATEST)
    assert chosen(branch, capsys) == (LATEST, ""), "step 5 descends from step 3, but was given up"
    damage(branch / LATEST)
    assert chosen(branch, capsys)[0] == "checkpoint_step_3.pt"


def test_a_start_that_could_not_make_its_checkpoint_the_latest_is_continued(branch, capsys):
    """run.json says that the run went back to step 3. Step 5 is newer, and was given up."""
    (branch / "checkpoint_step_4.pt").unlink()
    (branch / "checkpoint_step_5.pt").replace(branch / LATEST)
    name, warnings = chosen(branch, capsys)
    assert name == "checkpoint_step_3.pt"
    assert warnings.count("warning") == 1 and "branch that was given up" in warnings
    for step in (1, 2, 3):
        (branch / f"checkpoint_step_{step}.pt").unlink()
    assert chosen(branch, capsys) == (LATEST, ""), "it is all that there is"


def test_files_that_were_copied_into_the_folder_take_no_place(branch, capsys):
    shutil.copy(branch / "checkpoint_step_1.pt", branch / "checkpoint_step_90.pt")
    assert chosen(branch, capsys) == (LATEST, ""), "it is of step 1, whatever its name says"
    # A copy of the run went on elsewhere, and its step 9 comes back.
    state = checkpoint.load(branch / "checkpoint_step_5.pt")
    state["step"] = 9
    later = dict(id="elsewhere", began=4e9, step=5, file=None)
    state["lineage"] = [*state["lineage"], later]
    checkpoint.save(branch / "checkpoint_step_9.pt", state)
    assert chosen(branch, capsys) == (LATEST, "")
    damage(branch / LATEST)
    assert chosen(branch, capsys)[0] == "checkpoint_step_4.pt"


def test_a_start_does_not_end_when_its_checkpoint_cannot_be_made_the_latest(
    cli,  # noqa: F811
    branch,
    monkeypatch,
):
    link = latest.link_latest

    def full_once(path, name):
        monkeypatch.setattr(latest, "link_latest", link)
        raise OSError(28, "No space left on device", str(name))

    monkeypatch.setattr(latest, "link_latest", full_once)
    (branch / "checkpoint_step_5.pt").replace(branch / LATEST)  # the only copy
    code, _, err = cli("--resume", branch / "checkpoint_step_3.pt", "--save_every", 9)
    assert code == 0, err
    assert err.count(f"warning: {branch / LATEST} failed: ") == 1
    assert checkpoint.load_plain(branch / f"{LATEST}.1")["step"] == 5
    assert (branch / LATEST).samefile(branch / "checkpoint_step_5.pt"), "the next save does it"


def test_checkpoints_may_lie_on_another_disk(cli, branch, tmp_path):  # noqa: F811
    """Their names in the folder of the run are links."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("checkpoint_step_3.pt", LATEST):
        (branch / name).replace(elsewhere / name)
        (branch / name).symlink_to(elsewhere / name)
    code, _, err = cli("--resume", "latest", "--save_dir", branch, "--max_steps", 5)
    assert code == 0, err
    assert step_of(branch) == 5 and not (branch / LATEST).is_symlink()
    assert checkpoint.load_plain(elsewhere / LATEST)["step"] == 4
    start = run_experiment.Start(None, path=branch / "checkpoint_step_3.pt")
    assert start.continues(branch) and not start.continues(tmp_path)


def test_data_are_skipped_though_the_start_that_was_to_skip_them_was_killed(branch):
    """It has written run.json, and no checkpoint yet."""
    shutil.copy(branch / "checkpoint_step_3.pt", branch / LATEST)
    (branch / "checkpoint_step_4.pt").unlink()
    facts = json.loads((branch / "run.json").read_text())
    facts["skipped_data"] = [dict(step=3, steps=7, sequences=28)]
    (branch / "run.json").write_text(json.dumps(facts))
    args = run_experiment._train_parser().parse(["--resume", "latest"])
    config = run_experiment.Config(save_dir=str(branch))
    assert run_experiment.find_start(config, "", {}, args).skip_steps == 7

    state = checkpoint.load_plain(branch / LATEST)
    assert run_file.skipped_steps(facts, state | dict(skipped_data=facts["skipped_data"])) == 0
    assert run_file.skipped_steps(facts, state | dict(step=4)) == 0
    assert run_file.skipped_steps(facts, state | dict(lineage=facts["lineage"])) == 0
    for wrong in (None, [7], [dict(steps=True)], [dict(steps=10**30)]):
        assert run_file.skipped_steps(facts | dict(skipped_data=wrong), state) == 0


def test_a_checkpoint_that_was_not_linked_yet_is_adopted(cli, branch):  # noqa: F811
    shutil.copy(branch / "checkpoint_step_3.pt", branch / LATEST)
    code, out, err = cli("--resume", "latest", "--save_dir", branch)
    assert code == 0 and not err.count("warning"), err
    assert f"Resuming {branch / 'checkpoint_step_4.pt'} at step 4" in out
    assert (branch / LATEST).samefile(branch / "checkpoint_step_4.pt"), "it is linked now"


def without_lineage(folder: Path) -> None:
    """Makes the folder as an older version of this program left it."""
    for path in folder.glob("*.pt"):
        state = checkpoint.load(path)
        del state["lineage"]
        checkpoint.save(path, state)
        os.utime(path, (state["step"], state["step"]))
    facts = json.loads((folder / "run.json").read_text())
    for start in (facts, *facts["earlier"]):
        del start["lineage"], start["requested"]
    (folder / "run.json").write_text(json.dumps(facts))


def test_folders_of_older_programs(branch, capsys):
    without_lineage(branch)
    assert chosen(branch, capsys) == (LATEST, ""), "whether step 5 was given up is not known"
    os.utime(branch / "checkpoint_step_4.pt", (6, 6))
    damage(branch / LATEST)
    assert chosen(branch, capsys)[0] == "checkpoint_step_4.pt", "the one that was written last"


def test_an_older_checkpoint_begins_a_lineage(cli, branch, capsys):  # noqa: F811
    without_lineage(branch)
    assert cli("--resume", "latest", "--save_dir", branch, "--max_steps", 6)[0] == 0
    [first] = checkpoint.load(branch / LATEST)["lineage"]
    assert (first["step"], first["file"]) == (4, str(branch / LATEST))
    damage(branch / LATEST)
    damage(branch / "checkpoint_step_6.pt")
    damage(branch / "checkpoint_step_5.pt")
    assert chosen(branch, capsys)[0] == "checkpoint_step_4.pt"


def test_no_intact_checkpoint_is_no_new_run(cli, run):  # noqa: F811
    for path in run.glob("*.pt"):
        damage(path)
    before = contents(run)
    result = cli("--resume", "latest", "--save_dir", run)
    assert_refused(result, 1, "no checkpoint of", "damaged or gone", "--overwrite")
    assert contents(run) == before


def test_a_checkpoint_of_a_newer_program_gives_way_to_no_other(run, monkeypatch):  # noqa: F811
    state = checkpoint.load(run / LATEST)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    checkpoint.save(run / LATEST, state)
    monkeypatch.undo()
    with pytest.raises(checkpoint.CheckpointError, match="format 2"):
        latest.newest_intact(run, [])


def test_leftovers_of_a_checkpoints_size_are_known(cli, base, run, monkeypatch):  # noqa: F811
    names = [".checkpoint_step_6.pt.tmp", "checkpoint_step_4.pt.1", f"{LATEST}.12"]
    for name in names:
        shutil.copy(run / "checkpoint_step_4.pt", run / name)
    size = (run / names[0]).stat().st_size
    (run / "checkpoint_step_4.pt.mine").write_text("mine")
    with pytest.raises(checkpoint.CheckpointError, match=r"aside take .*step_4\.pt\.1"):
        checkpoint.check_free_space(run, 10**18)
    # What a killed save left is deleted before the disk is looked at.
    looked = []
    check = checkpoint.check_free_space
    monkeypatch.setattr(
        checkpoint,
        "check_free_space",
        lambda folder, needed, *rest: (
            looked.append((needed, (run / names[0]).exists())),
            check(folder, needed, *rest),
        ),
    )
    assert cli("--resume", "latest", "--save_dir", run, "--max_steps", 9)[0] == 0
    assert looked[-1][1] is False
    shutil.copy(run / "checkpoint_step_4.pt", run / names[0])
    looked.clear()
    assert cli(*arguments(base, save_dir=run, max_steps=1), "--overwrite")[0] == 0
    assert min(needed for needed, _ in looked) < -3 * size, "what they free is counted"
    assert not [name for name in names if (run / name).exists()]
    assert (run / "checkpoint_step_4.pt.mine").exists()


# ---------------------------------------------------------------- no checkpoint


@pytest.fixture
def unsaved(base, run):  # noqa: F811
    """A run that was killed before its first checkpoint."""
    for path in run.glob("*.pt"):
        path.unlink()
    return run


def config_of(folder: Path) -> dict:
    config = json.loads((folder / "run.json").read_text())["config"]
    del config["save_dir"]  # the folders are copies
    return config


def test_a_run_without_a_checkpoint_starts_again_with_its_configuration(cli, unsaved):  # noqa: F811
    before = config_of(unsaved)
    losses = rows(unsaved, "train_loss")
    options = (
        "--resume",
        "latest",
        "--save_dir",
        unsaved,
        "--preset",
        "18b",
        "--keep_checkpoints",
        1,
    )
    code, out, err = cli(*options, "--log_every", 1)
    assert code == 0, err
    [line] = [line for line in out.splitlines() if "Nothing to resume" in line]
    assert "run.json starts again with the same configuration, --preset 18b is not used" in line
    assert "Changed: keep_checkpoints: 3 -> 1; log_every: 2 -> 1" in line
    assert config_of(unsaved) == before | dict(keep_checkpoints=1, log_every=1)
    assert (unsaved / "metrics.jsonl.1").exists()
    assert not (unsaved / "run.json.1").exists()
    [earlier] = json.loads((unsaved / "run.json").read_text())["earlier"]
    assert earlier["config"].items() >= before.items()
    assert rows(unsaved, "train_loss")[-1]["grad_norm"] == losses[-1]["grad_norm"]


def test_what_was_auto_is_auto_again(unsaved):
    facts = json.loads((unsaved / "run.json").read_text())
    assert facts["requested"]["offload_optimizer"] == "auto"
    start = run_experiment._start_again("", facts, {}, None)
    assert start.config.offload_optimizer == "auto"
    assert facts["config"]["offload_optimizer"] == "false"


def test_a_run_that_began_from_a_file_begins_from_it_again(cli, base, finished, tmp_path):  # noqa: F811
    """A model that was imported, or trained elsewhere, is not trained anew from random weights."""
    folder = tmp_path / "run"
    first = tmp_path / "first.pt"
    shutil.copy(finished / "checkpoint_step_4.pt", first)
    begun = ("--resume", first, "--save_dir", folder, "--cache_dir", base / "cache")
    assert cli(*begun, "--muon_lr", 0.5)[0] == 0
    for path in folder.glob("*.pt"):
        path.unlink()
    code, out, err = cli("--resume", "latest", "--save_dir", folder, "--max_steps", 6)
    assert code == 0, err
    assert f"starts again with the same configuration, from {first}" in out
    assert f"Resuming {first} at step 4" in out
    assert (config_of(folder)["muon_lr"], step_of(folder)) == (0.5, 6)
    for path in (first, *folder.glob("*.pt")):
        path.unlink()
    assert_refused(cli("--resume", "latest", "--save_dir", folder), 1, str(first))


def test_a_start_that_is_refused_leaves_run_json_where_it_was(cli, unsaved):  # noqa: F811
    """Else the start after it would train another model."""
    before = contents(unsaved)
    options = ("--resume", "latest", "--save_dir", unsaved)
    assert_refused(cli(*options, "--data", unsaved / "nothing.txt"), 1, "nothing.txt")
    assert contents(unsaved) == before


# ---------------------------------------------------------------- small files


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        "\xff",
        "[" * 100_000,
        '{"earlier": 1}',
        '{"earlier": []}',
        '{"earlier": [], "lineage": [{}]}',
        '{"earlier": [], "config": {"n_layers": 1e9}}',
    ],
    ids=lambda text: text[:40],
)
def test_a_run_json_that_cannot_be_read_is_set_aside(tmp_path, capsys, text):
    (tmp_path / "run.json").write_text(text, "latin-1")
    assert run_folder.last_start(tmp_path) is None
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("it is now run.json.1")
    assert (tmp_path / "run.json.1").read_text("latin-1") == text


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def test_a_new_run_says_that_run_json_could_not_be_read(tmp_path, capsys):
    args = run_experiment._train_parser().parse(["--resume", "latest"])
    config = run_experiment.Config(save_dir=str(tmp_path))
    for make in (Path.mkdir, lambda path: path.write_text("{"), lambda path: path.symlink_to("x")):
        make(tmp_path / "run.json")
        start = run_experiment.find_start(config, "Preset tiny.", {}, args)
        assert (start.config, start.again) == (config, True)
        out, err = capsys.readouterr()
        assert "Its run.json could not be read and was set aside" in " ".join(out.split())
        assert "run.json cannot be read (" in err
    run_experiment.find_start(config, "Preset tiny.", {}, args)
    assert "run.json" not in capsys.readouterr().out


@pytest.mark.parametrize("make", [Path.mkdir, make_pipe])
def test_folders_and_pipes_with_the_name_of_a_file(cli, base, run, make):  # noqa: F811
    for name in (LATEST, "run.json", "metrics.jsonl", "training_results.json"):
        (run / name).unlink()
        make(run / name)
    code, out, err = cli("--resume", "latest", "--save_dir", run, "--max_steps", 9)
    assert code == 0, err
    assert "Resuming" in out and "checkpoint_step_8.pt at step 8" in out
    assert err.count("it is no file); it is now") == 4
    assert step_of(run) == 9

    (run / LATEST).unlink()
    make(run / LATEST)
    with pytest.raises(checkpoint.CheckpointError, match="directory|pipe"):
        checkpoint.load(run / LATEST)
    assert_refused(cli(*arguments(base, save_dir=run)), 2, "already holds a run")
    assert cli(*arguments(base, save_dir=run, max_steps=1), "--overwrite")[0] == 0
    assert step_of(run) == 1


# ---------------------------------------------------------------- the content of a checkpoint


def with_value(state: dict, path: str, value) -> dict:
    """Sets the value at a key path such as config/n_layers."""
    *parents, last = path.split("/")
    node = state
    for name in parents:
        node = node[name]
    node[last] = value
    return state


WRONG_VALUES = {
    "config/n_layers": 10**9,
    "config/d_model": 1e9,
    "config/precision": "fp8",
    "config": [],
    "step": -1,
    "tokens_seen": 2**70,
    "train_seconds": float("nan"),
    "mean_norm": "1",
    "saved_steps": ["../../x"],
    "run_id": 3,
    "tokenizer_json": None,
    "data": {},
    "data/rules": "2",
    "metrics": dict(val_loss="low"),
    "model/norm.weight": torch.ones(3),
    "model": {},
    "optimizer/adamw/steps": 1.5,
    "optimizer/adamw": [],
    "optimizer": {},
}
WRONG_IN_A_RUN = {
    "data_position": None,
    "loss_scaler/scale": float("inf"),
    "lineage": [dict(id="a")],
    "skipped_data": [dict(step=1, steps="2", sequences=3)],
    "interval": dict(seconds="long"),
    "interval/sequences": -4,
    "interval/cross_entropy": torch.ones(2, 4),
    "interval/expert_counts": torch.ones(()),
    "random/torch": torch.zeros(5, dtype=torch.uint8),
    "random/numpy": ["MT19937", [0] * 624, 1e9, 0.0, 0.0],
    "random/python": [3, [0], None],
}


def test_every_wrong_value_of_a_checkpoint_is_named(finished):  # noqa: F811
    path = finished / LATEST
    checkpoint.check_content(path, checkpoint.load(path), resuming=True)
    for name, value in {**WRONG_VALUES, **WRONG_IN_A_RUN}.items():
        state = with_value(checkpoint.load(path), name, value)
        with pytest.raises(checkpoint.CheckpointError) as error:
            checkpoint.check_content(path, state, resuming=name in WRONG_IN_A_RUN)
        text = str(error.value)
        name = name.removeprefix("optimizer/").removesuffix("/torch")
        assert name.split("/")[0] in text and "\n" not in text, text
        assert str(path) in text


def test_a_wrong_content_ends_in_one_line_before_memory_is_taken(  # noqa: F811
    cli, finished, tmp_path, monkeypatch
):
    """The model's size is what the content says. Its tensors must have that size too."""
    monkeypatch.setattr(model.MoETransformer, "__init__", None)
    path = tmp_path / "hostile.pt"
    for name, value in (("n_layers", 10**9), ("n_layers", 1024), ("d_ff", 2**20)):
        state = with_value(checkpoint.load(finished / LATEST), f"config/{name}", value)
        checkpoint.save(path, state)
        result = cli("--resume", path, "--save_dir", tmp_path / "run")
        assert_refused(result, 1, str(path), "is not what this program writes")
        assert_refused(cli("sample", "--checkpoint", path, "--prompt", "a"), 1, str(path))
    assert not (tmp_path / "run").exists()


def test_a_resumed_file_decides_nothing_about_where_is_written(cli, base, run, monkeypatch):  # noqa: F811
    elsewhere = run.parent / "elsewhere"
    path = run / "checkpoint_step_4.pt"
    state = with_value(checkpoint.load(path), "config/save_dir", str(elsewhere / "run"))
    checkpoint.save(path, with_value(state, "config/cache_dir", str(elsewhere / "cache")))
    here = run.parent / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    code, out, err = cli("--resume", path, "--max_steps", 5)
    assert code == 0, err
    assert not elsewhere.exists()
    assert [found.name for found in here.iterdir()] == ["cache"], "the default --cache_dir"
    assert step_of(run) == 5, "beside the file"
    assert "--cache_dir names another" in out and str(elsewhere / "cache") in out
    assert (
        cli("--resume", path, "--max_steps", 5, "--save_dir", "new", "--cache_dir", base / "cache")[
            0
        ]
        == 0
    )
    assert step_of(Path("new")) == 5


# ---------------------------------------------------------------- a file system without links


@pytest.fixture
def no_links(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(os, "symlink", refuse)


def test_latest_without_links_is_a_small_file_that_all_commands_follow(  # noqa: F811
    cli, base, tmp_path, no_links, capsys, monkeypatch
):
    folder = tmp_path / "run"
    options = arguments(base, save_dir=folder, save_every=1, keep_checkpoints=1, max_steps=3)
    assert cli(*options)[0] == 0
    pointer = folder / LATEST
    assert pointer.read_text() == "The latest checkpoint is checkpoint_step_3.pt\n"
    assert not (folder / "checkpoint_step_2.pt").exists(), "old ones go as ever"
    assert checkpoint.load(pointer)["step"] == checkpoint.load_plain(pointer)["step"] == 3

    assert cli("sample", "--checkpoint", pointer, "--prompt", "a", "--max_new_tokens", 2)[0] == 0
    evaluate.main(["--checkpoint", str(pointer), "--limit", "20", "--json"])
    assert json.loads(capsys.readouterr().out)["step"] == 3
    for resume in (["latest", "--save_dir", folder], [pointer, "--cache_dir", base / "cache"]):
        last = step_of(folder)
        code, out, err = cli("--resume", *resume, "--max_steps", last + 1)
        assert code == 0, err
        assert f"Resuming {pointer} at step {last}" in out
        assert pointer.stat().st_size < 100 and step_of(folder) == last + 1

    # By time, latest is a checkpoint of its own; the next numbered one is pointed to again.
    checkpoint.save(pointer, checkpoint.load(pointer))
    assert pointer.stat().st_size > 1000
    assert cli("--resume", "latest", "--save_dir", folder, "--max_steps", 6)[0] == 0
    assert "checkpoint_step_6.pt" in pointer.read_text()
    damage(folder / "checkpoint_step_6.pt")
    code, _, err = cli("--resume", "latest", "--save_dir", folder)
    assert code == 1 and "checkpoint_step_6.pt is damaged" in err


def test_a_pointer_names_files_of_its_folder_only(tmp_path):
    secret = tmp_path / "secret.pt"
    checkpoint.save(secret, {"step": 1})
    (tmp_path / "run").mkdir()
    pointer = tmp_path / "run" / LATEST
    for name in ("../secret.pt", str(secret), "..", ""):
        pointer.write_text(f"{checkpoint.POINTER}{name}\n")
        with pytest.raises(checkpoint.CheckpointError):
            checkpoint.load(pointer)
    checkpoint.save(tmp_path / "run" / "best.pt", {"step": 2})
    pointer.write_text(f"{checkpoint.POINTER}best.pt\n")
    (tmp_path / "link.pt").symlink_to(pointer)
    assert checkpoint.load(tmp_path / "link.pt") == {"step": 2}
