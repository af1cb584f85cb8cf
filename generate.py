"""Text from a trained model: a key/value cache, batches, temperature, top-k, top-p, tokens as they come.

Training knows nothing of it: the blocks' own layers are called here one by one, with keys and values kept from token to
token; on a GPU, what a token takes is recorded once as a CUDA graph. Past max_seq_len the model sees the last max_seq_len tokens, as a model without a cache would: every position
shifts with each token then, so what was kept no longer holds and the whole window is read anew for each token.

Shape suffixes: B texts, S positions, V vocabulary.
"""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.triton_kernels import GEMV_MAX_ROWS, triton
from model import MoETransformer

# cuDNN's attention, training's first choice on some GPUs, makes a plan for each length, and each prompt brings a new one.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


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
    """Yields the next token id of each of `n` texts that continue `prompt`, which must not be empty; None for a text that
    has ended with the id `stop`. Ends when all have, or after `max_new_tokens`.

    temperature 0 takes the likeliest token; top_k > 0 draws from the k likeliest only; top_p < 1 from the fewest likeliest
    that hold this probability together. Text i is the only one that seed + i gives with n=1.
    On a GPU go through one stream at a time: graphs share the libraries' workspace.
    """
    config, device = model.config, model.norm.weight.device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(n)]
    length = min(config.max_seq_len, len(prompt) + max_new_tokens)
    cache = [
        [
            torch.zeros(
                n,
                config.n_kv_heads,
                length,
                config.head_dim,
                device=device,
                dtype=model.compute_dtype,
            )
            for _ in "kv"
        ]
        for _ in model.blocks
    ]
    # the products of many rows by expert may ask the host for the ranges, which a graph cannot
    few = not config.n_moe_layers or triton is not None and n * config.top_k <= GEMV_MAX_ROWS
    read_next = (
        _GraphedRead(model, cache)
        if device.type == "cuda" and few
        else functools.partial(_read, model, cache)
    )
    tokens_BS = torch.tensor([prompt[-length:]], device=device)  # read once, whatever n
    unread_BS, start, ended = tokens_BS, 0, [False] * n
    for _ in range(max_new_tokens):
        if start + unread_BS.shape[1] > config.max_seq_len:
            unread_BS, start = tokens_BS, 0
        logits_BV = (
            read_next(unread_BS, torch.tensor([start], device=device))
            if start
            else _read(model, cache, unread_BS).expand(n, -1)
        )
        start += unread_BS.shape[1]
        if temperature == 0:
            chosen_B = logits_BV.argmax(dim=-1)
        else:
            draws_B = torch.cat([torch.rand(1, generator=generator) for generator in generators])
            chosen_B = choose(logits_BV, draws_B.to(device), temperature, top_k, top_p)
        unread_BS = chosen_B[:, None]
        tokens_BS = torch.cat([tokens_BS.expand(n, -1), unread_BS], dim=1)[:, -config.max_seq_len :]
        new = chosen_B.tolist()  # the one wait for the GPU
        yield [None if over else token for token, over in zip(new, ended)]
        ended = [over or token == stop for token, over in zip(new, ended)]
        if all(ended):
            return


def generate(
    model: MoETransformer, prompt: list[int], max_new_tokens: int, **choices
) -> list[list[int]]:
    """The n texts that `stream` yields, each with its `stop` if it ended; `choices` are stream's options."""
    steps = zip(*stream(model, prompt, max_new_tokens, **choices))
    return [[token for token in text if token is not None] for text in steps]


def finished_texts(steps: Iterator[list[int | None]], stop: int) -> Iterator[tuple[int, list[int]]]:
    """Yields (number, tokens) of the texts of `stream` when each has ended."""
    texts: dict[int, list[int]] = {}
    for step in steps:
        for i, token in enumerate(step):
            if token is not None:
                texts.setdefault(i, []).append(token)
                if token == stop:
                    yield i, texts[i]
    yield from ((i, tokens) for i, tokens in texts.items() if tokens[-1] != stop)


def text_pieces(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the text of tokens as they come, together tokenizer.decode of all; nothing while a character is incomplete."""
    decoder, ids, shown = DecodeStream(skip_special_tokens=True), [], ""
    for token in tokens:
        ids.append(token)
        if piece := decoder.step(tokenizer, token):
            shown += piece
            yield piece
    text = tokenizer.decode(ids)
    if text.startswith(shown):
        yield text[len(shown) :]  # of a character that was never completed


def choose(
    logits_BV: Tensor, draws_B: Tensor, temperature: float, top_k: int, top_p: float
) -> Tensor:
    """The token [B] at which each row's cumulative probability, likeliest first, passes the draw (uniform in [0, 1)); of
    logits that are nan any token, so that the run's own check of its loss speaks and not an index out of range."""
    logits_BV = logits_BV / temperature
    if top_k:
        logits_BV, order_BV = logits_BV.topk(min(top_k, logits_BV.shape[-1]))
    else:
        logits_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = logits_BV.softmax(dim=-1)
    sums_BV = probs_BV.cumsum(dim=-1)
    last_B1 = ((sums_BV - probs_BV < top_p).sum(dim=-1, keepdim=True) - 1).clamp(
        min=0
    )  # of those that are kept
    place_B1 = torch.searchsorted(
        sums_BV, draws_B[:, None] * sums_BV.gather(1, last_B1), right=True
    )
    return order_BV.gather(1, place_B1.minimum(last_B1)).squeeze(1)


def _read(
    model: MoETransformer,
    cache: list[list[Tensor]],
    tokens_BS: Tensor,
    position_1: Tensor | None = None,
) -> Tensor:
    """Logits [B, V] after a prompt, or after one more token of each text, at this position. Keys and values go into the cache,
    those of a single row to all of its rows."""
    positions_S = (
        torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        if position_1 is None
        else position_1
    )
    seen_L = (
        None
        if position_1 is None
        else torch.arange(cache[0][0].shape[2], device=tokens_BS.device) <= position_1
    )
    with model.autocast(), sdpa_kernel(ATTENTION):
        x_BSD = model.embedding(tokens_BS).to(model.compute_dtype)
        for block, kept in zip(model.blocks, cache):
            q, *new = block.attention.project(block.attention_norm(x_BSD), positions_S)
            for whole, part in zip(kept, new):
                whole[:, :, positions_S] = part
            x_BSD = x_BSD + block.attention.attend(
                q, *(new if position_1 is None else kept), seen_L
            )
            out = block.ffn(block.ffn_norm(x_BSD))
            x_BSD = x_BSD + (out[0] if block.moe else out)
        return F.linear(model.norm(x_BSD[:, -1]), model.head_weight).float()


class _GraphedRead:
    """`_read` of one more token of each text as a CUDA graph, recorded at the first: a token takes hundreds of kernels so small that
    launching them one by one is most of its time."""

    def __init__(self, model: MoETransformer, cache: list[list[Tensor]]):
        self.read, self.graph = functools.partial(_read, model, cache), torch.cuda.CUDAGraph()
        self.inputs = self.logits_BV = None

    def __call__(self, tokens_B1: Tensor, position_1: Tensor) -> Tensor:
        with torch.cuda.device_of(tokens_B1):
            if self.inputs is None:
                self.inputs = tokens_B1.clone(), position_1.clone()
                self.read(
                    *self.inputs
                )  # once before, as libraries prepare themselves when they are first used
                with torch.cuda.graph(
                    self.graph, capture_error_mode="thread_local"
                ):  # the trainer has other threads
                    self.logits_BV = self.read(*self.inputs)
            for kept, new in zip(self.inputs, (tokens_B1, position_1)):
                kept.copy_(new)
            self.graph.replay()
            return self.logits_BV
