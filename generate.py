"""Text from a trained model, with a key/value cache: batches, temperature, top-k, top-p, streaming.

Training does not know of this module: the layers of the blocks are called here one by one, with the
keys and values of earlier tokens kept. On a GPU the work of one token is recorded as a CUDA graph.

Past max_seq_len the model sees the last max_seq_len tokens, as a model without a cache would. Each
token then shifts the positions of all others. What the cache holds is no longer right, and the
whole window is read anew for each token.

Shape suffixes: B texts, S positions, V vocabulary, T positions in the cache.
"""

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.triton_kernels import GEMV_MAX_ROWS, triton
from model import MoETransformer

# Without cuDNN's attention, which training prefers on some GPUs: it makes a plan for each length,
# and each prompt brings a new length.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]

# Keys and values of each block, [B, n_kv_heads, T, head_dim] each.
Cache = list[tuple[Tensor, Tensor]]


# ---------------------------------------------------------------- token ids


@torch.no_grad()
def stream(
    model: MoETransformer,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: int | None = None,
    n: int = 1,
) -> Iterator[list[int | None]]:
    """Yields the next token id of each of `n` texts that continue `prompt`.

    The id is None for a text that has ended with the id `stop`. The stream ends when all texts
    have, or after `max_new_tokens`. The prompt must not be empty.

    temperature 0 takes the likeliest token. top_k > 0 draws from the k likeliest tokens only, and
    top_p < 1 from the fewest likeliest that hold this probability together. Text i is the only one
    that seed + i gives with n=1.

    On a GPU run one stream at a time: CUDA graphs share the libraries' workspace.
    """
    max_seq_len = model.config.max_seq_len
    device = model.norm.weight.device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    cache = _empty_cache(model, n, length=min(max_seq_len, len(prompt) + max_new_tokens))
    read_next = _reader_of_next_tokens(model, cache, n)

    # The prompt has one row, whatever n: it is read once, for all texts.
    tokens_BS = torch.tensor([prompt[-max_seq_len:]], device=device)
    unread_BS = tokens_BS
    position = 0  # of the first unread token
    ended = [False] * n
    for _ in range(max_new_tokens):
        if position + unread_BS.shape[1] > max_seq_len:  # read the whole window anew
            unread_BS = tokens_BS
            position = 0
        if position == 0:
            logits_BV = _read(model, cache, unread_BS).expand(n, -1)
        else:
            logits_BV = read_next(unread_BS, torch.tensor([position], device=device))
        position += unread_BS.shape[1]

        if temperature == 0:
            chosen_B = logits_BV.argmax(dim=-1)
        else:
            # drawn on the CPU, so that a seed gives the same numbers on every device
            draws_B = torch.cat([torch.rand(1, generator=generator) for generator in generators])
            chosen_B = choose(logits_BV, draws_B.to(device), temperature, top_k, top_p)
        unread_BS = chosen_B[:, None]
        tokens_BS = torch.cat([tokens_BS.expand(n, -1), unread_BS], dim=1)[:, -max_seq_len:]

        chosen = chosen_B.tolist()  # the one wait for the GPU
        yield [None if over else token for token, over in zip(chosen, ended)]
        ended = [over or token == stop for token, over in zip(chosen, ended)]
        if all(ended):
            return


def generate(
    model: MoETransformer, prompt: list[int], max_new_tokens: int, **choices
) -> list[list[int]]:
    """The n texts that `stream` yields, each with its `stop` if it has ended.

    `choices` are options of `stream`.
    """
    steps = stream(model, prompt, max_new_tokens, **choices)
    return [[token for token in text if token is not None] for text in zip(*steps)]


def finished_texts(steps: Iterator[list[int | None]], stop: int) -> Iterator[tuple[int, list[int]]]:
    """Yields (number, tokens) of each text of `stream`, as soon as the text has ended."""
    texts: dict[int, list[int]] = {}
    for step in steps:
        for i, token in enumerate(step):
            if token is None:
                continue
            texts.setdefault(i, []).append(token)
            if token == stop:
                yield i, texts[i]
    for i, tokens in texts.items():
        if tokens[-1] != stop:
            yield i, tokens


def choose(
    logits_BV: Tensor, draws_B: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """Turns uniform numbers `draws_B` in [0, 1) into token ids [B].

    The likelier tokens come first. A row's token is the one at which the cumulative probability
    passes the draw. Of logits that are nan it is any token: a run that diverges is then stopped by
    the check of its loss, and not by an index out of range.
    """
    logits_BV = logits_BV / temperature
    if top_k:
        sorted_BV, token_ids_BV = logits_BV.topk(min(top_k, logits_BV.shape[-1]))
    else:
        sorted_BV, token_ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.softmax(dim=-1)
    cumulative_BV = probs_BV.cumsum(dim=-1)
    # A token is kept if those before it hold less than top_p. The first one always is.
    kept_BV = cumulative_BV - probs_BV < top_p
    last_kept_B1 = (kept_BV.sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    # the draw, as a share of the probability that is kept
    threshold_B1 = draws_B[:, None] * cumulative_BV.gather(1, last_kept_B1)
    rank_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True)
    # rounding may put the draw at the end of what is kept, or behind it
    return token_ids_BV.gather(1, rank_B1.minimum(last_kept_B1)).squeeze(1)


# ---------------------------------------------------------------- characters


def text_pieces(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the text of tokens as they come, and nothing while a character is incomplete.

    Together the strings are tokenizer.decode of all tokens.
    """
    decoder = DecodeStream(skip_special_tokens=True)
    ids = []
    shown = ""
    for token in tokens:
        ids.append(token)
        new = decoder.step(tokenizer, token)
        if new:
            shown += new
            yield new
    whole = tokenizer.decode(ids)
    if whole.startswith(shown):
        yield whole[len(shown) :]  # of a character that was never completed


# ---------------------------------------------------------------- reading tokens with a cache


def _empty_cache(model: MoETransformer, n: int, length: int) -> Cache:
    config = model.config
    zeros = functools.partial(
        torch.zeros,
        (n, config.n_kv_heads, length, config.head_dim),
        device=model.norm.weight.device,
        dtype=model.compute_dtype,
    )
    return [(zeros(), zeros()) for _ in model.blocks]


def _reader_of_next_tokens(
    model: MoETransformer, cache: Cache, n: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """`_read` of one more token of each of n texts, as a CUDA graph where that is possible."""
    config = model.config
    # Grouped matmuls of many rows may copy `offs` to the host, which a graph cannot. The kernel for
    # few rows never does.
    takes_gemv = triton is not None and n * config.top_k <= GEMV_MAX_ROWS
    if model.norm.weight.is_cuda and (takes_gemv or config.n_moe_layers == 0):
        return _GraphedRead(model, cache)
    return functools.partial(_read, model, cache)


def _read(
    model: MoETransformer, cache: Cache, tokens_BS: Tensor, position_1: Tensor | None = None
) -> Tensor:
    """Reads a prompt, or one more token of each text at `position_1`. Returns logits [B, V].

    Keys and values go into the cache. Those of a prompt with a single row go to all rows of it.
    """
    if position_1 is None:
        positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        visible_T = None
    else:
        positions_S = position_1
        cached_keys, _ = cache[0]
        visible_T = torch.arange(cached_keys.shape[2], device=tokens_BS.device) <= position_1
    with model.autocast(), sdpa_kernel(ATTENTION):
        x_BSD = model.embedding(tokens_BS).to(model.compute_dtype)
        for block, (cached_keys, cached_values) in zip(model.blocks, cache):
            q, k, v = block.attention.project(block.attention_norm(x_BSD), positions_S)
            cached_keys[:, :, positions_S] = k
            cached_values[:, :, positions_S] = v
            if position_1 is not None:
                k = cached_keys
                v = cached_values
            x_BSD = x_BSD + block.attention.attend(q, k, v, visible_T)
            out = block.ffn(block.ffn_norm(x_BSD))
            if block.moe:
                out, _routing = out
            x_BSD = x_BSD + out
        return F.linear(model.norm(x_BSD[:, -1]), model.head_weight).float()


class _GraphedRead:
    """`_read` of one more token of each text as a CUDA graph, recorded at the first call.

    A token takes hundreds of kernels, so small that most of the time would go into launching them
    one by one.
    """

    def __init__(self, model: MoETransformer, cache: Cache):
        self.read = functools.partial(_read, model, cache)
        self.graph = torch.cuda.CUDAGraph()
        self.inputs: tuple[Tensor, Tensor] | None = None
        self.logits_BV: Tensor | None = None

    def __call__(self, tokens_B1: Tensor, position_1: Tensor) -> Tensor:
        with torch.cuda.device_of(tokens_B1):
            if self.inputs is None:
                self._record(tokens_B1, position_1)
            graph_tokens_B1, graph_position_1 = self.inputs
            graph_tokens_B1.copy_(tokens_B1)
            graph_position_1.copy_(position_1)
            self.graph.replay()
            return self.logits_BV

    def _record(self, tokens_B1: Tensor, position_1: Tensor) -> None:
        self.inputs = (tokens_B1.clone(), position_1.clone())
        # once before, as libraries prepare themselves when they are first used
        self.read(*self.inputs)
        # "thread_local": the trainer has other threads, which may use the GPU meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits_BV = self.read(*self.inputs)
