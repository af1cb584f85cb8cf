"""The model of the tests' runs: a step takes milliseconds on a CPU."""

# Changes to the preset `tiny`: fields of Config, and options of the same names.
SMALL_MODEL = dict(
    d_model=32,
    n_layers=2,
    n_heads=2,
    d_ff=32,
    num_experts=4,
    max_seq_len=16,
    vocab_size=300,
    batch_size=2,
)
