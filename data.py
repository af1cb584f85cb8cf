"""Text to token shards to batches: sources, split by document, tokenizer, cache, and an order that can be resumed.

`prepare(config)` turns the corpus into two memory-mapped token arrays, once; later runs open them from the cache.
`batches` and `validation_batches` cut windows of max_seq_len + 1 tokens from them. The order of the training windows
is a pure function of (seed, position), so a resumed run continues with exactly the sequences it has not seen.
"""
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import struct
import sysconfig
import time
import uuid
from array import array
from dataclasses import dataclass
from pathlib import Path

# Tokenizing uses all cores; saying so keeps tokenizers from warning when DataLoader forks its workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Config, ExperimentError, nearest

BUILT_IN = ("python", "installed")
INSTALLED_SUFFIXES = (".py", ".pyi", ".pyx", ".pxd", ".h", ".hpp", ".hh", ".cuh", ".txt", ".md", ".rst")
USER_SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<|im_end|>", "[SEP]")   # first one wins
PIECE_CHARACTERS = 2048, 64 * 1024       # after which a long document is cut at the next line end: least, most
TOKENIZER_SAMPLE = 20_000_000            # characters that a tokenizer is trained on: measured 4 to 8 s on 2 cores
TOKENIZE_CHARACTERS = 4_000_000          # characters tokenized at a time
FORMAT_VERSION = 1                       # of the cache: raise it when the same files would give other shards
MAGIC, HEADER_BYTES = b"MOETOKEN", 1024
HEADER = struct.Struct("<8sIIQ32s")      # magic, version, bytes in a token, tokens, the tokenizer's sha256


@dataclass(frozen=True)
class Corpus:
    """A tokenized corpus. `train` and `validation` are memory-mapped uint16 or uint32 arrays [tokens]."""
    train: np.memmap
    validation: np.memmap
    tokenizer: Tokenizer
    tokenizer_json: str
    end_of_text: int
    data_hash: str           # of the documents' contents in order; the same on every machine
    tokenizer_hash: str      # sha256 of tokenizer_json
    characters: int          # of both splits
    documents: int           # of both splits, a piece of a long one counted as one
    unigram_entropy: float   # nats per token: the loss of the best model that ignores the context

    @property
    def tokens_per_character(self) -> float:
        return (len(self.train) + len(self.validation)) / self.characters


def prepare(config: Config) -> Corpus:
    """Opens the tokenized corpus that `config` describes, building it in config.cache_dir the first time.

    Raises ExperimentError when the text, the tokenizer or the cache folder cannot be used, or when the corpus is too
    small to give each split one window of max_seq_len + 1 tokens.
    """
    files = _sources(config)
    tokenizer_json = None if config.tokenizer == "train" else _read_tokenizer(config)
    cache = Path(config.cache_dir).expanduser()
    folder = cache / _cache_key(config, files, tokenizer_json)
    unfinished = cache / f"{folder.name}.{uuid.uuid4().hex[:8]}.unfinished"
    try:
        try:
            corpus = _open(folder) if folder.exists() else None
        except ExperimentError as error:
            print(f"data: {error}. Building it anew.")
            shutil.rmtree(folder)
            corpus = None
        for old in cache.glob("*.unfinished"):      # of a build that was killed; younger ones may be another process's
            if time.time() - old.stat().st_mtime > 86_400:
                shutil.rmtree(old, ignore_errors=True)
        if corpus is None:   # built beside its place and renamed when whole, so that there is never half a cache
            unfinished.mkdir(parents=True)
            _build(config, files, tokenizer_json, unfinished)
            try:
                unfinished.rename(folder)
            except OSError:   # another process was faster; its folder has the same content
                if not folder.is_dir():
                    raise
            corpus = _open(folder)
    except OSError as error:
        raise ExperimentError(f"cannot keep the tokenized corpus in the folder {cache}: {error}. Free some space there "
                              "or choose another folder with --cache_dir") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    least = config.max_seq_len + 1
    if min(len(corpus.train), len(corpus.validation)) < least:
        raise ExperimentError(
            f"the corpus is too small: {len(corpus.train):,} training tokens and {len(corpus.validation):,} validation "
            f"tokens from {corpus.documents:,} documents, and each needs at least {least:,} (max_seq_len + 1). Give "
            "more text, a smaller --max_seq_len or, if only validation is short, a larger --validation_fraction")
    return corpus


# --- order of the windows

@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n_windows: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(n_windows)
    order.flags.writeable = False   # it is shared through the cache
    return order


def sequences(tokens: np.ndarray, seq_len: int, seed: int, position: int, count: int) -> np.ndarray:
    """The sequences at data positions position ... position + count - 1, counted since the beginning of the run.

    Returns int64 [count, seq_len + 1]. Window i is tokens[i * seq_len : (i + 1) * seq_len + 1]; every epoch takes each
    window once, in an order of its own. A function of nothing but its arguments; tokens must hold at least one window.
    """
    n_windows = (len(tokens) - 1) // seq_len
    rows = np.empty((count, seq_len + 1), np.int64)
    for row in range(count):
        epoch, place = divmod(position + row, n_windows)
        start = int(_permutation(seed, epoch, n_windows)[place]) * seq_len
        rows[row] = tokens[start:start + seq_len + 1]
    return rows


def _inputs_and_targets(rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.from_numpy(rows)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


class _TrainingBatches:
    """What DataLoader indexes: the micro-batch that begins at a data position."""

    def __init__(self, tokens: np.ndarray, config: Config):
        self.tokens, self.config = tokens, config

    def __getitem__(self, position: int):
        c = self.config
        return _inputs_and_targets(sequences(self.tokens, c.max_seq_len, c.seed, position, c.batch_size))


def _leave_signals_to_the_trainer(_worker: int):
    """A signal to the whole process group must not kill the workers under the trainer, which saves first; they end with
    the iterator."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(tokens: np.ndarray, config: Config, position: int, pin_memory: bool = False):
    """Endless iterator of (inputs, targets), int64 [batch_size, max_seq_len] each, from data position `position` on.

    With config.num_workers > 0 background processes read ahead; they end when the iterator is closed or collected.
    """
    yield from DataLoader(
        _TrainingBatches(tokens, config), sampler=range(position, 2**62, config.batch_size), batch_size=None,
        num_workers=config.num_workers, pin_memory=pin_memory, worker_init_fn=_leave_signals_to_the_trainer,
        multiprocessing_context="fork" if config.num_workers else None,   # the others would copy the mapped tokens
        generator=torch.Generator())   # its own, or starting workers would advance the global one


def validation_batches(tokens: np.ndarray, config: Config):
    """Iterator of (inputs, targets) over eval_steps * batch_size windows, or as many as there are: always the same ones,
    spread evenly over the tokens (the first ones would be a few documents), int64 [batch_size, max_seq_len] each; the
    last batch may hold fewer sequences."""
    seq_len = config.max_seq_len
    there = (len(tokens) - 1) // seq_len
    taken = min(config.eval_steps * config.batch_size, there)
    starts = np.arange(taken) * there // taken * seq_len
    for first in range(0, taken, config.batch_size):
        rows = [tokens[start:start + seq_len + 1] for start in starts[first:first + config.batch_size]]
        yield _inputs_and_targets(np.stack(rows).astype(np.int64))


# --- tokenizer

def load_tokenizer(json_text: str) -> tuple[Tokenizer, int]:
    """The tokenizer whose tokenizer.json has this text, and the id of its end-of-text token. Raises ExperimentError."""
    try:
        tokenizer = Tokenizer.from_str(json_text)
    except Exception as error:   # tokenizers raises plain Exception
        raise ExperimentError(f"not a tokenizer.json: {error}; give one saved by the tokenizers library") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True   # "<|endoftext|>" written in a document is ordinary text, not the token
    for token in END_OF_TEXT:
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return tokenizer, token_id
    raise ExperimentError(f"the tokenizer has no end-of-text token; add one of {' '.join(END_OF_TEXT)} to it")


def train_tokenizer(texts, vocab_size: int) -> str:
    """Trains a byte-level BPE (GPT-2's pre-tokenization) of at most vocab_size tokens, <|endoftext|> among them, on an
    iterable of texts; returns its tokenizer.json. Every text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    texts = iter(texts)
    tokenizer.train_from_iterator(iter(lambda: list(itertools.islice(texts, 64)), []), trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, special_tokens=[END_OF_TEXT[0]], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    return tokenizer.to_str()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _vocabulary(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1   # ids may have gaps


def _read_tokenizer(config: Config) -> str:
    path = Path(config.tokenizer).expanduser()
    try:
        text = path.read_bytes().decode()
        tokenizer, _ = load_tokenizer(text)
    except (OSError, UnicodeDecodeError, ExperimentError) as error:
        raise ExperimentError(f"cannot use the tokenizer {path}: {error}. Give --tokenizer the path of a "
                              "tokenizer.json, or train to train one on the corpus") from error
    if (size := _vocabulary(tokenizer)) > config.vocab_size:
        raise ExperimentError(f"the tokenizer {path} has {size} tokens and the model's vocab_size is only "
                              f"{config.vocab_size}; set --vocab_size to at least {size}")
    return text


# --- sources

def _walk(root: str, suffixes: tuple[str, ...], skip: tuple[str, ...] = ()) -> list[str]:
    """Files under `root` with one of the suffixes, in an order that depends only on their paths within `root`."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if s not in skip)
        found += [os.path.join(folder, n) for n in sorted(names) if n.lower().endswith(suffixes)]
    return [f for f in found if os.path.isfile(f)]   # not broken links


def _sources(config: Config) -> list[str]:
    """The corpus's files in reading order. Raises ExperimentError when there are none."""
    if config.data in BUILT_IN:
        files = _walk(sysconfig.get_path("stdlib"), (".py",), ("site-packages", "dist-packages", "__pycache__"))
        if config.data == "installed":
            for root in dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]):
                files += _walk(root, INSTALLED_SUFFIXES)
        if not files:
            raise ExperimentError("this Python comes without its library's source files; give --data a file or folder")
        return files
    path = os.path.expanduser(config.data)
    if os.path.isfile(path):
        files = [path]
    elif os.path.isdir(path):
        files = _walk(path, USER_SUFFIXES)
    elif glob.has_magic(path):
        files = [f for f in sorted(glob.glob(path, recursive=True)) if os.path.isfile(f)]
    else:
        raise ExperimentError(f"there is no file or folder {path}.{nearest(config.data, BUILT_IN)} Give --data python, "
                              "installed, or the path of a file, a folder or a glob")
    files = [f for f in files if f.lower().endswith(USER_SUFFIXES)]
    if not files:
        raise ExperimentError(f"no text to read in {path}: it must be or hold {' '.join(USER_SUFFIXES)} files. "
                              "Convert it, or correct --data")
    return files


def _json_rows(path: str, field: str):
    """Yields (place, value of the field) for every line that is not blank."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {field: ""}
            except (ValueError, RecursionError) as error:
                raise ExperimentError(f"{path}:{number}: not valid JSON ({error}). Every line must be an object; "
                                      "correct or remove this one") from error
            if not isinstance(row, dict) or field not in row:
                there = f"the fields are {', '.join(row)}" if isinstance(row, dict) else "the line is not an object"
                raise ExperimentError(f"{path}:{number}: no field {field!r}; {there}. Choose one with --text_field")
            yield f"{path}:{number}", row[field]


def _parquet_rows(path: str, field: str):
    """Yields (place, value of the field) for every row."""
    import pyarrow.parquet   # slow to import and rarely needed
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in (names := file.schema_arrow.names):
            raise ExperimentError(f"{path}: no field {field!r}; the fields are {', '.join(names)}. Choose one with "
                                  "--text_field")
        groups = file.iter_batches(batch_size=1024, columns=[field])
        for number, value in enumerate((v for group in groups for v in group.column(0).to_pylist()), 1):
            yield f"{path}, row {number}", value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise ExperimentError(f"{path} is not a sound parquet file ({error}). Make or download it again") from error


def _streams(path: str, config: Config):
    """Yields a text stream for each document of the file at `path`."""
    if config.data in BUILT_IN:
        try:
            yield io.StringIO(Path(path).read_bytes().decode(), newline="")
        except (OSError, UnicodeDecodeError):
            pass   # libraries hold files in odd encodings on purpose, to test with
    elif path.lower().endswith((".jsonl", ".parquet")):
        rows = _json_rows if path.lower().endswith(".jsonl") else _parquet_rows
        for place, value in rows(path, config.text_field):
            try:
                value = "" if value is None else value
                value.encode()
            except (AttributeError, UnicodeEncodeError) as error:   # not a string, or half a surrogate pair
                raise ExperimentError(f"{place}: field {config.text_field!r} holds no valid text: {value!r:.60}. "
                                      "Correct it, or choose another field with --text_field") from error
            yield io.StringIO(value, newline="")
    else:
        with open(path, encoding="utf-8-sig", newline="") as file:   # line ends are kept as they are
            yield file


def _bad_byte(path: str) -> str:
    """Where the first byte of a file is that is not UTF-8."""
    offset = 0
    with open(path, "rb") as file:
        for line in file:   # a line end is never inside a character
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"invalid byte at offset {offset + error.start}"
            offset += len(line)
    return "invalid byte"


def _documents(files: list[str], config: Config):
    """Yields (text, whether its document ends with it): a short document at once, a long one in pieces, each
    prolonged to the end of its line unless that is as far again."""
    least, most = PIECE_CHARACTERS
    length = min(most, max(least, sum(map(os.path.getsize, files)) // 200))    # a small corpus is cut more finely

    def read(stream) -> str:
        piece = stream.read(length)
        return piece + stream.readline(length) if len(piece) == length else piece

    for path in files:
        try:
            for stream in _streams(path, config):
                piece = read(stream)
                while piece:
                    following = read(stream)
                    yield piece, not following
                    piece = following
        except UnicodeDecodeError as error:
            raise ExperimentError(f"{path} is not UTF-8 text: {_bad_byte(path)}. Convert it, for example with iconv, "
                                  "or take it out of the corpus") from error
        except OSError as error:
            raise ExperimentError(f"cannot read {path}: {error.strerror}. Mend it or take it out of --data") from error


# --- building the cache

def split(hashes: np.ndarray, lengths: np.ndarray, validation_fraction: float) -> np.ndarray:
    """Which documents are held out, bool [documents]: those of the lowest hashes, until they hold validation_fraction
    of all characters. Equal documents have equal hashes, so they stay together; two different ones give two sides."""
    order = np.argsort(hashes, kind="stable")
    characters = np.cumsum(lengths[order])
    last = order[np.searchsorted(characters, validation_fraction * characters[-1])]
    validation = hashes <= hashes[last]
    return hashes < hashes.max() if validation.all() else validation


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _dtype(config: Config) -> np.dtype:
    return np.dtype("<u2" if config.vocab_size <= 65536 else "<u4")


def _cache_key(config: Config, files: list[str], tokenizer_json: str | None) -> str:
    """Changes with whatever changes the shards; files are told apart by name, size and time of change."""
    tokenizer = [TOKENIZER_SAMPLE, config.vocab_size] if tokenizer_json is None else _sha256(tokenizer_json)
    stats = [(os.path.abspath(path), os.stat(path)) for path in files]
    identity = [FORMAT_VERSION, PIECE_CHARACTERS, tokenizer, _dtype(config).str, config.validation_fraction, config.text_field,
                config.data in BUILT_IN, [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]]
    return _sha256(json.dumps(identity))[:16]


def _bar(what: str, total: int | None = None):
    return tqdm(desc=what, total=total, unit="char", unit_scale=True, leave=False, mininterval=0.5)


def _build(config: Config, files: list[str], tokenizer_json: str | None, folder: Path):
    """Reads the documents, trains the tokenizer when tokenizer_json is None, and writes the cache into `folder`.

    The text is streamed: once for a hash and a length per document, which are all that is kept, once to tokenize it,
    and once between the two when a tokenizer is trained.
    """
    start = time.perf_counter()
    hashes, lengths, ends = array("Q"), array("Q"), bytearray()
    with _bar("reading the corpus") as bar:
        for text, last in _documents(files, config):
            hashes.append(_digest(text))
            lengths.append(len(text))
            ends.append(last)
            bar.update(len(text))
    if not hashes:
        what = files[0] if len(files) == 1 else f"every file of {config.data}"
        raise ExperimentError(f"{what} is empty. Give --data a corpus with text")
    data_hash = hashlib.blake2b(hashes.tobytes() + ends, digest_size=16).hexdigest()
    hashes, lengths, ends = np.array(hashes), np.array(lengths, np.int64), np.array(ends, bool)
    held_out, characters = split(hashes, lengths, config.validation_fraction), int(lengths.sum())
    print(f"data: {len(files):,} files, {len(hashes):,} documents, {characters:,} characters, "
          f"{lengths[held_out].sum() / characters:.2%} held out")

    def texts(chosen: np.ndarray, what: str):
        """The chosen documents again, with a progress bar."""
        with _bar(what, int(lengths[chosen].sum())) as bar:
            again = (text for text, _ in _documents(files, config))
            for text, expected, take in itertools.zip_longest(again, hashes, chosen):
                if text is None or _digest(text) != expected:
                    raise ExperimentError(f"the corpus {config.data} changed while it was being read; run again")
                if take:
                    yield text
                    bar.update(len(text))

    if tokenizer_json is None:
        began, sample = time.perf_counter(), ~held_out
        share = min(1, TOKENIZER_SAMPLE / lengths[sample].sum())
        sample[sample] = np.diff(np.floor(np.arange(sample.sum() + 1) * share)) > 0   # spread evenly over the corpus
        tokenizer_json = train_tokenizer(texts(sample, "training the tokenizer"), config.vocab_size)
        print(f"data: tokenizer trained on {lengths[sample].sum():,} characters in {time.perf_counter() - began:.1f} s")
    tokenizer, end_of_text = load_tokenizer(tokenizer_json)
    # End-of-text follows the last piece of a document, and a piece whose successor is on the other side.
    separated = ends | np.append(held_out[1:] != held_out[:-1], True)
    counts = _write_shards(folder, texts(ends | True, "tokenizing"), held_out, separated, tokenizer, end_of_text,
                           _dtype(config), _sha256(tokenizer_json))
    tokens = counts.sum(1).tolist()
    p = counts[0][counts[0] > 0] / tokens[0]
    facts = dict(data=config.data, documents=len(hashes), characters=characters, train_tokens=tokens[0],
                 validation_tokens=tokens[1], vocabulary=_vocabulary(tokenizer), data_hash=data_hash,
                 tokenizer_hash=_sha256(tokenizer_json), unigram_entropy=float(-(p * np.log(p)).sum()))
    (folder / "tokenizer.json").write_bytes(tokenizer_json.encode())
    (folder / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"data: {tokens[0]:,} training and {tokens[1]:,} validation tokens, {time.perf_counter() - start:.1f} s")


def _write_shards(folder: Path, texts, held_out: np.ndarray, separated: np.ndarray, tokenizer: Tokenizer,
                  end_of_text: int, dtype: np.dtype, tokenizer_hash: str) -> np.ndarray:
    """Writes train.bin and validation.bin; returns how often each token occurs in them, int64 [2, vocabulary]."""
    counts = np.zeros((2, _vocabulary(tokenizer)), np.int64)
    with open(folder / "train.bin", "wb") as train, open(folder / "validation.bin", "wb") as validation:
        for file in (train, validation):
            file.write(bytes(HEADER_BYTES))
        place = zip(map(int, held_out), separated)
        for batch in _batches_of_text(texts):
            ids = ([], [])
            # encode_batch_fast leaves out the offsets: the same ids, measured 1.8 times as fast as encode_batch.
            for encoding, (side, separate) in zip(tokenizer.encode_batch_fast(batch, add_special_tokens=False), place):
                ids[side].extend(encoding.ids)
                if separate:
                    ids[side].append(end_of_text)
            for side, file in enumerate((train, validation)):
                tokens = np.array(ids[side], dtype)
                counts[side] += np.bincount(tokens, minlength=counts.shape[1])
                file.write(tokens.tobytes())
        for side, file in enumerate((train, validation)):
            file.seek(0)
            file.write(HEADER.pack(MAGIC, FORMAT_VERSION, dtype.itemsize, int(counts[side].sum()),
                                   bytes.fromhex(tokenizer_hash)))
    return counts


def _batches_of_text(texts):
    """Lists of texts of about TOKENIZE_CHARACTERS characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= TOKENIZE_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# --- opening the cache

def open_shard(path, tokenizer_hash: str) -> np.ndarray:
    """Maps a token shard into memory, uint16 or uint32 [tokens]. Raises ExperimentError when its header or size is not
    what a whole shard of this tokenizer has."""
    path = Path(path)
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        size = os.fstat(file.fileno()).st_size
    problem = "is cut short"
    if len(header) == HEADER_BYTES:
        magic, version, width, count, tokenizer = HEADER.unpack_from(header)
        problem = ("is not a token shard" if magic != MAGIC else
                   f"has format version {version}, not {FORMAT_VERSION}" if version != FORMAT_VERSION else
                   f"has tokens of {width} bytes, not 2 or 4" if width not in (2, 4) else
                   "belongs to another tokenizer" if tokenizer.hex() != tokenizer_hash else
                   f"holds {size - HEADER_BYTES:,} bytes of tokens, not {count * width:,}"
                   if size != HEADER_BYTES + count * width else None)
    if problem:
        raise ExperimentError(f"{path} {problem}: delete the folder {path.parent} and run again")
    dtype = np.dtype(f"<u{width}")
    return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(count,)) if count else np.empty(0, dtype)


def _open(folder: Path) -> Corpus:
    """Opens a cache folder. Raises ExperimentError when it is damaged."""
    try:
        facts = json.loads((folder / "corpus.json").read_bytes())
        tokenizer_json = (folder / "tokenizer.json").read_bytes().decode()
        tokenizer_hash = _sha256(tokenizer_json)
        if facts["tokenizer_hash"] != tokenizer_hash:
            raise ValueError("tokenizer.json was changed")
        tokenizer, end_of_text = load_tokenizer(tokenizer_json)
        return Corpus(train=open_shard(folder / "train.bin", tokenizer_hash),
                      validation=open_shard(folder / "validation.bin", tokenizer_hash), tokenizer=tokenizer,
                      tokenizer_json=tokenizer_json, end_of_text=end_of_text, tokenizer_hash=tokenizer_hash,
                      **{name: facts[name] for name in ("data_hash", "characters", "documents", "unigram_entropy")})
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"the cache folder {folder} is damaged ({error}): delete it and run again") from error
