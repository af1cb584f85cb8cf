"""What a run leaves behind, and what it says while it runs.

    checkpoint.py, archive.py   one file of tensors and plain values, whole or not at all
    shared_save.py              the same file, written by all ranks of a run together
    causes.py                   what an error's cause is, in a few words
    schema.py                   what a checkpoint must hold, checked before it is used
    latest.py, lineage.py       checkpoint_latest.pt; which checkpoint of a folder a run continues
    run_folder.py               what a folder holds; which checkpoints a run keeps, and when
    run_file.py                 what run.json says about starting a run again
    metrics.py, meter.py        what is measured between two rows of metrics.jsonl; memory
    results.py                  metrics.jsonl, training_results.json, run.json, the curves
    tracker.py                  rows of metrics for TensorBoard, trackio or wandb
    messages.py                 texts on the console and of errors
    console.py                  stdout and stderr, which may be lost without ending a run
    stop.py                     what a signal does to a run, and to other commands

Keys and file names here are read by other programs and by old runs: add to them, but rename
nothing.
"""
