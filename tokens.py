"""Text to tokens: tokenizers, the split by document, and token shards made on all cores.

`build` appends to two shards and writes down, every SHARD_CHARACTERS characters, how far it is, so that a build that was
killed goes on from there.
"""
import collections
import hashlib
import itertools
import json
import os
import re
import signal
import struct
import time
from array import array
from pathlib import Path

# Tokenizing uses all cores; saying so keeps tokenizers from warning when DataLoader forks its workers.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from tqdm import tqdm

from config import Config, ConfigError, ExperimentError
from sources import Text, first_line

END_OF_TEXT = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<|im_end|>", "[SEP]")   # first one wins
TOKENIZER_SAMPLE = 20_000_000            # characters that a tokenizer is trained on: measured 4 to 8 s on 2 cores
TOKENIZE_CHARACTERS = 1_000_000          # characters tokenized at a time, by one core
SHARD_CHARACTERS = 64_000_000            # characters after which what is tokenized outlives a kill
COUNT_TOKENS = 2 ** 22                   # tokens counted at a time
FORMAT_VERSION = 1                       # of the cache: raise it when the same files would give other shards
MAGIC, HEADER_BYTES = b"MOETOKEN", 1024
HEADER = struct.Struct("<8sIIQ32s")      # magic, version, bytes in a token, tokens, the tokenizer's sha256
# A piece of text: its hash, its length in characters, whether its document ends with it.
PIECE = np.dtype([("hash", "<u8"), ("length", "<u4"), ("last", "?")])


# --- tokenizers

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


def vocabulary(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1   # ids may have gaps


def trained_size(config: Config) -> int | None:
    """The size of the tokenizer to train on the corpus, of train or train:VOCAB; None when one is given."""
    if not re.match(r"train(:|$)", config.tokenizer):
        return None
    size = config.tokenizer.removeprefix("train").removeprefix(":").replace("_", "") or str(config.vocab_size)
    if not (size.isascii() and size.isdecimal() and 257 <= int(size) <= config.vocab_size):
        raise ConfigError(f"tokenizer={config.tokenizer}: VOCAB of train:VOCAB must be a whole number from 257 (256 bytes and "
                          f"end-of-text) to vocab_size={config.vocab_size}")
    return int(size)


def read_tokenizer(config: Config) -> str:
    """The text of the tokenizer.json that config.tokenizer names: a file, a folder with one, or hf:NAME."""
    name = config.tokenizer
    try:
        path = Path(_download_tokenizer(name.removeprefix("hf:")) if name.startswith("hf:") else name).expanduser()
        if path.is_dir():
            path /= "tokenizer.json"
        text = path.read_bytes().decode()
        tokenizer, _ = load_tokenizer(text)
    except (OSError, UnicodeDecodeError, ExperimentError) as error:
        raise ExperimentError(f"cannot use the tokenizer {name}: {error}. Give --tokenizer the path of a tokenizer.json or of a "
                              "folder that holds one, hf:NAME for one of the Hugging Face hub, or train to train one on the "
                              "corpus") from error
    check_vocabulary(tokenizer, config)
    return text


def check_vocabulary(tokenizer: Tokenizer, config: Config) -> None:
    if (size := vocabulary(tokenizer)) > config.vocab_size:
        raise ExperimentError(f"the tokenizer {config.tokenizer} has {size} tokens and the model's vocab_size is only "
                              f"{config.vocab_size}; set --vocab_size to at least {size}")


def _download_tokenizer(name: str) -> str:
    """Path of the tokenizer.json of a model on the hub, from the hub's local cache when there is no network."""
    from huggingface_hub import errors, hf_hub_download   # slow to import, and only hf: needs it
    try:
        return hf_hub_download(name, "tokenizer.json")
    except errors.LocalEntryNotFoundError as error:
        raise ExperimentError("the Hugging Face hub cannot be reached and has not been asked for it before. Go online (and unset "
                              "HF_HUB_OFFLINE), or copy the model's tokenizer.json here and name its path") from error
    except errors.RemoteEntryNotFoundError as error:
        raise ExperimentError("it has no tokenizer.json on the Hugging Face hub. Make one with transformers: "
                              f"AutoTokenizer.from_pretrained({name!r}).save_pretrained('FOLDER')") from error
    except Exception as error:      # no such model, no consent, a name that cannot be one
        raise ExperimentError(first_line(error)) from error


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- what the text is like

class Bar:
    """A progress bar: characters or tokens a second, documents a second and, with a total, the time left."""

    def __init__(self, what: str, total: int | None = None, done: int = 0, unit: str = "char"):
        self.bar = tqdm(desc=what, total=total, initial=done, unit=unit, unit_scale=True, leave=False, mininterval=0.5)
        self.start, self.documents = time.perf_counter(), 0

    def add(self, count: int, documents: int = 0) -> None:
        self.documents += documents
        if self.documents:
            self.bar.set_postfix_str(f"{self.documents / (time.perf_counter() - self.start):,.0f} documents/s", refresh=False)
        self.bar.update(count)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def data_hash(pieces: np.ndarray) -> str:
    """The identity of a corpus, of its pieces (PIECE array, which may be mapped): the same on every machine."""
    total = hashlib.blake2b(digest_size=16)
    for name in ("hash", "last"):
        for first in range(0, len(pieces), COUNT_TOKENS):
            total.update(pieces[name][first:first + COUNT_TOKENS].tobytes())
    return total.hexdigest()


def survey(text: Text, folder: Path) -> dict:
    """Reads the text once; of a hub's data set only as much as a tokenizer is trained on. Kept in the folder for the next
    time. Returns pieces (PIECE array), whole (whether they are all), and rows, bad, bad_rows as Text has them."""
    path = folder / "survey.npz"
    if path.exists():
        with np.load(path) as saved:
            return {name: saved[name] if saved[name].ndim else saved[name].item() for name in saved}
    hashes, lengths, ends, whole = array("Q"), array("L"), bytearray(), True
    with Bar("reading the corpus") as bar:
        for piece, last in text.documents():
            hashes.append(_digest(piece))
            lengths.append(len(piece))
            ends.append(last)
            bar.add(len(piece), last)
            if text.hub and text.characters >= TOKENIZER_SAMPLE and last:
                whole = False
                break
    if not hashes:
        what = text.files[0] if len(text.files) == 1 else f"every file of {text.config.data}" if text.files else text.config.data
        raise ExperimentError(f"{what} is empty. Give --data a corpus with text")
    pieces = np.empty(len(hashes), PIECE)
    pieces["hash"], pieces["length"], pieces["last"] = hashes, lengths, np.frombuffer(ends, bool)
    found = dict(pieces=pieces, whole=whole, rows=text.rows, bad=text.bad, bad_rows="; ".join(text.bad_rows))
    np.savez(folder / "survey.tmp.npz", **found)
    os.replace(folder / "survey.tmp.npz", path)
    return found


def split(hashes: np.ndarray, lengths: np.ndarray, validation_fraction: float) -> np.ndarray:
    """Which documents are held out, bool [documents]: those of the lowest hashes, until they hold validation_fraction
    of all characters. Equal documents have equal hashes, so they stay together; two different ones give two sides."""
    order = np.argsort(hashes, kind="stable")
    characters = np.cumsum(lengths[order])
    last = order[np.searchsorted(characters, validation_fraction * characters[-1])]
    validation = hashes <= hashes[last]
    return hashes < hashes.max() if validation.all() else validation


def _changed(text: Text) -> ExperimentError:
    return ExperimentError(f"the corpus {text.config.data} changed while it was being read; run again")


# --- building shards

def token_dtype(config: Config) -> np.dtype:
    return np.dtype("<u2" if config.vocab_size <= 65536 else "<u4")


def recipe(config: Config, tokenizer_json: str | None) -> str:
    """Changes with whatever changes the shards of a text, besides the text."""
    size = trained_size(config)
    tokenizer = [TOKENIZER_SAMPLE, size] if size else config.tokenizer if tokenizer_json is None else sha256(tokenizer_json)
    return sha256(json.dumps([FORMAT_VERSION, tokenizer, token_dtype(config).str, config.validation_fraction]))[:16]


def replace_file(path: Path, content: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def build(config: Config, text: Text, found: dict, tokenizer_json: str | None, folder: Path) -> None:
    """Trains the tokenizer when tokenizer_json is None, and writes train.bin, validation.bin, tokenizer.json and the facts
    in corpus.json; `found` is the text's survey. Goes on from what a killed build left in the folder."""
    start, made_by = time.perf_counter(), recipe(config, tokenizer_json)
    pieces, lengths = found["pieces"], found["pieces"]["length"].astype(np.int64)
    held_out, characters = split(pieces["hash"], lengths, config.validation_fraction), int(lengths.sum())
    what = f"{len(text.files):,} files" if text.files else ("" if found["whole"] else "the beginning of ") + config.data
    print(f"data: {what}, {len(pieces):,} documents, {characters:,} characters, {lengths[held_out].sum() / characters:.2%} held out")
    if found["bad"]:
        print(f"data: {found['bad']:,} of {found['rows']:,} lines or rows cannot be read and are left out: {found['bad_rows']}")
    if tokenizer_json is None and (folder / "tokenizer.json").exists():
        tokenizer_json = (folder / "tokenizer.json").read_bytes().decode()
    elif tokenizer_json is None:
        began, sample = time.perf_counter(), ~held_out
        share = min(1, TOKENIZER_SAMPLE / lengths[sample].sum())
        sample[sample] = np.diff(np.floor(np.arange(sample.sum() + 1) * share)) > 0   # spread evenly over the corpus
        tokenizer_json = train_tokenizer(_chosen(text, pieces, sample), trained_size(config))
        print(f"data: tokenizer trained on {lengths[sample].sum():,} characters in {time.perf_counter() - began:.1f} s")
    replace_file(folder / "tokenizer.json", tokenizer_json)

    tokenizer, end_of_text = load_tokenizer(tokenizer_json)
    dtype, tokenizer_hash = token_dtype(config), sha256(tokenizer_json)
    limit = int(pieces["hash"][held_out].max()) if held_out.any() else -1
    done = _write_shards(folder, text, found, limit, _Encoder(tokenizer, end_of_text, dtype))
    for name, tokens in zip(("train.bin", "validation.bin"), done["tokens"]):
        with open(folder / name, "r+b") as file:
            file.write(HEADER.pack(MAGIC, FORMAT_VERSION, dtype.itemsize, tokens, bytes.fromhex(tokenizer_hash)))
    with Bar("counting", done["tokens"][0], unit="token") as bar:
        counts = count_tokens(np.memmap(folder / "train.bin", dtype, mode="r", offset=HEADER_BYTES), vocabulary(tokenizer), bar)
    read = np.memmap(folder / "pieces.bin", PIECE, mode="r")
    facts = dict(data=config.data, documents=len(read), characters=done["characters"], train_tokens=done["tokens"][0],
                 validation_tokens=done["tokens"][1], vocabulary=vocabulary(tokenizer), data_hash=data_hash(read),
                 tokenizer_hash=tokenizer_hash, unigram_entropy=entropy(counts), left_out=found["bad"], recipe=made_by)
    replace_file(folder / "corpus.json", json.dumps(facts, indent=1) + "\n")
    print(f"data: {done['tokens'][0]:,} training and {done['tokens'][1]:,} validation tokens, {time.perf_counter() - start:.1f} s")


def _chosen(text: Text, pieces: np.ndarray, chosen: np.ndarray):
    """The chosen pieces of a text that was surveyed."""
    with Bar("training the tokenizer", int(pieces["length"][chosen].sum())) as bar:
        for (piece, last), expected, take in zip(text.documents(), pieces["hash"], chosen):
            if _digest(piece) != expected:
                raise _changed(text)
            if take:
                yield piece
                bar.add(len(piece), last)


class _Encoder:
    """What DataLoader indexes, by (texts, the side of each, whether end-of-text follows it): the tokens of both sides."""

    def __init__(self, tokenizer: Tokenizer, end_of_text: int, dtype: np.dtype):
        self.tokenizer, self.end_of_text, self.dtype = tokenizer, end_of_text, dtype

    def __getitem__(self, batch: tuple):
        texts, sides, separated = batch
        ids = ([], [])
        try:    # encode_batch_fast leaves out the offsets: the same ids, measured 1.8 times as fast as encode_batch
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:      # tokenizers raises plain Exception; DataLoader would add a traceback to it
            return str(error)
        for encoding, side, separate in zip(encodings, sides, separated):
            ids[side].extend(encoding.ids)
            if separate:
                ids[side].append(self.end_of_text)
        return [np.array(tokens, self.dtype) for tokens in ids]


def _start_worker(_number: int):
    """Texts are spread over processes, each on one core; the first process alone decides when to stop."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _batches(text: Text, found: dict, limit: int, start: dict | None):
    """Cuts the text after `start` into batches: yields (what _Encoder is indexed by, its PIECE array, a position to go on
    from or None). Pieces whose hash is at most `limit` are held out. Raises ExperimentError when the text has changed."""
    pieces, number, since = found["pieces"], start["pieces"] if start else 0, 0

    def marked():
        """(text, hash, last, side, separate): end-of-text follows the last piece of a document, and a piece whose successor
        is on the other side."""
        previous = None
        for piece, last in text.documents(start):
            digest = _digest(piece)
            side = digest <= limit
            if previous:
                yield *previous, previous[-1] != side
            previous = None if last else (piece, digest, last, side)
            if last:
                yield piece, digest, last, side, True

    def packed(batch: list, position: dict | None):
        texts, hashes, last, sides, separated = zip(*batch)
        record = np.empty(len(batch), PIECE)
        record["hash"], record["length"], record["last"] = hashes, list(map(len, texts)), last
        return (list(texts), sides, separated), record, position

    batch, size = [], 0
    for one in marked():
        piece, digest, last, _, _ = one
        if number < len(pieces) and pieces["hash"][number] != digest:
            raise _changed(text)
        batch.append(one)
        number, size, since = number + 1, size + len(piece), since + len(piece)
        if size >= TOKENIZE_CHARACTERS:
            position = None
            if since >= SHARD_CHARACTERS and (last or not text.hub):
                position, since = text.position() | dict(pieces=number), 0      # the text may be a piece ahead
            yield packed(batch, position)
            batch, size = [], 0
    if found["whole"] and number != len(pieces):
        raise _changed(text)
    if batch:
        yield packed(batch, None)


def _progress(folder: Path, names: tuple, width: int) -> dict:
    """What a killed build wrote down of its work, after cutting off what it appended later; else an empty beginning."""
    done = empty = dict(tokens=[0, 0], characters=0, position=None)
    if (folder / "progress.json").exists():
        done = json.loads((folder / "progress.json").read_bytes())

    def sizes(done: dict) -> dict:
        pieces = done["position"]["pieces"] if done["position"] else 0
        return dict(zip(names, [HEADER_BYTES + width * n for n in done["tokens"]] + [PIECE.itemsize * pieces]))

    if any(not (folder / name).exists() or (folder / name).stat().st_size < size for name, size in sizes(done).items()):
        done = empty
        for name in names:
            (folder / name).unlink(missing_ok=True)     # it may be a link to another cache folder's
            (folder / name).touch()
    for name, size in sizes(done).items():
        os.truncate(folder / name, size)
    if done["position"]:
        print(f"data: going on after {done['characters']:,} characters that were tokenized before")
    return done


def _write_shards(folder: Path, text: Text, found: dict, limit: int, encoder: _Encoder) -> dict:
    """Appends the tokens of the text to train.bin and validation.bin, after room for their headers, and what it read to
    pieces.bin. Returns tokens (of both) and characters, all that there are."""
    names = ("train.bin", "validation.bin", "pieces.bin")
    done = _progress(folder, names, encoder.dtype.itemsize)
    total = int(found["pieces"]["length"].sum())
    workers = 0 if found["whole"] and total <= 2 * TOKENIZE_CHARACTERS else len(os.sched_getaffinity(0))
    if not found["whole"]:
        total = text.expected_characters(total, int(found["pieces"]["last"].sum()))
    waiting = collections.deque()       # of the batches whose tokens are being made: PIECE array, position

    def batches():
        for batch, *rest in _batches(text, found, limit, done["position"]):
            waiting.append(rest)
            yield batch

    files = [open(folder / name, "ab") for name in names]
    try:
        with Bar("tokenizing", total, done["characters"]) as bar:
            for tokens in DataLoader(encoder, sampler=batches(), batch_size=None, num_workers=workers, collate_fn=lambda x: x,
                                     worker_init_fn=_start_worker, multiprocessing_context="fork" if workers else None,
                                     generator=torch.Generator()):      # its own, or it would advance the global one
                if isinstance(tokens, str):
                    raise ExperimentError(f"the tokenizer cannot encode this corpus: {tokens}. Choose another with --tokenizer")
                record, position = waiting.popleft()
                for file, content in zip(files, (*tokens, record)):
                    file.write(content.tobytes())
                done["tokens"] = [n + len(t) for n, t in zip(done["tokens"], tokens)]
                characters = int(record["length"].sum())
                done["characters"] += characters
                bar.add(characters, int(record["last"].sum()))
                if position:
                    for file in files:
                        file.flush()
                        os.fsync(file.fileno())
                    done["position"] = position
                    replace_file(folder / "progress.json", json.dumps(done))
    except RuntimeError as error:       # DataLoader's, of a worker that is gone
        raise ExperimentError(f"a tokenizing process ended, most often for lack of memory ({error}). Run again: what was "
                              "tokenized is kept, and it goes on from there") from error
    finally:
        for file in files:
            file.close()
    return done


# --- counting

def count_tokens(tokens: np.ndarray, size: int, bar: Bar, digest=None) -> np.ndarray:
    """How often each token occurs, int64 [size]; feeds the tokens to a hash too. Raises ValueError at one out of range."""
    counts = np.zeros(size, np.int64)
    for first in range(0, len(tokens), COUNT_TOKENS):
        chunk = tokens[first:first + COUNT_TOKENS]
        if chunk.max() >= size:
            place = int(np.argmax(chunk >= size))
            raise ValueError(f"token {chunk[place]} at place {first + place}")
        counts += np.bincount(chunk, minlength=size)
        if digest:
            digest.update(chunk.tobytes())
        bar.add(len(chunk))
    return counts


def entropy(counts: np.ndarray) -> float:
    """Of the distribution with these counts, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())
