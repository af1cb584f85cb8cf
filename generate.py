"""Text from a trained model, with a key/value cache: batches, temperature, top-k, top-p, streaming.

The layers of the blocks are called here one by one, and the keys and values of earlier tokens are
kept. So the model needs no code for generation. On a GPU the forward pass of one token is recorded
as a CUDA graph.

Past max_seq_len the model sees the last max_seq_len tokens, as a model without a cache would. Each
new token then shifts the positions of all others. So the cache does not hold any more, and the
whole window is read again for each token.

To read tokens is to run the model on them, which puts their keys and values into the cache.

Shape suffixes: B texts, S positions, V vocabulary, D d_model, T positions in the cache.
"""

import functools
from collections.abc import Callable, Iterator

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.triton_kernels import GEMV_MAX_ROWS, triton
from model import MoETransformer

# Kernels of attention. cuDNN's, which training prefers on some GPUs, is left out: it makes a plan
# for each length, and each prompt has a new length.
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

    A text ends with the id `stop`; after that its ids are None. The stream ends when all texts
    have ended, or after `max_new_tokens`. The prompt must not be empty.

    temperature 0 takes the likeliest token. top_k > 0 draws from the k likeliest tokens only.
    top_p < 1 draws from the fewest likeliest tokens whose probabilities sum to at least top_p. Text
    i is the text that n=1 gives with seed + i.

    On a GPU run one stream at a time: CUDA graphs share the libraries' workspace.
    """
    generators = []
    for i in range(n):
        generator = torch.Generator()
        generators.append(generator.manual_seed(seed + i))
    texts = _Texts(model, prompt, n, max_new_tokens)
    ended = [False] * n
    for _ in range(max_new_tokens):
        logits_BV = texts.next_logits()
        if temperature == 0:
            chosen_B = logits_BV.argmax(dim=-1)
        else:
            draws_B = _draws(generators).to(logits_BV.device)
            chosen_B = choose(logits_BV, draws_B, temperature, top_k, top_p)
        texts.append(chosen_B)

        step: list[int | None] = []
        for i, token in enumerate(chosen_B.tolist()):  # the one wait for the GPU
            if ended[i]:
                step.append(None)
            else:
                step.append(token)
                ended[i] = token == stop
        yield step
        if all(ended):
            return


def _draws(generators: list[torch.Generator]) -> Tensor:
    """A uniform number in [0, 1) from each generator.

    They are drawn on the CPU, so that a seed gives the same numbers on every device.
    """
    draws = [torch.rand(1, generator=generator) for generator in generators]
    return torch.cat(draws)


def generate(
    model: MoETransformer,
    prompt: list[int],
    max_new_tokens: int,
    **choices,
) -> list[list[int]]:
    """The token ids of the n texts that `stream` yields, each up to and with its `stop`.

    `choices` are further arguments of `stream`.
    """
    steps = list(stream(model, prompt, max_new_tokens, **choices))
    texts = []
    for tokens_of_text in zip(*steps):
        texts.append([token for token in tokens_of_text if token is not None])
    return texts


def finished_texts(
    steps: Iterator[list[int | None]],
    stop: int,
) -> Iterator[tuple[int, list[int]]]:
    """Yields (i, token ids) of each text i of `stream`, as soon as the text has ended.

    `steps` is what `stream` returned. Texts that never reach `stop` come last.
    """
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
    logits_BV: Tensor,
    draws_B: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
) -> Tensor:
    """Draws a token id for each row of logits. `draws_B` are uniform numbers in [0, 1).

    Tokens are ranked from the likeliest on, and their probabilities are summed in that order. The
    token drawn is the one at which the sum passes the draw. Returns token ids [B].

    Logits that are nan give any token. A run that diverges is then stopped by the check of its
    loss, and not by an index out of range.
    """
    logits_BV = logits_BV / temperature
    if top_k:
        k = min(top_k, logits_BV.shape[-1])
        sorted_logits_BV, token_ids_BV = logits_BV.topk(k)
    else:
        sorted_logits_BV, token_ids_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_logits_BV.softmax(dim=-1)
    cumulative_BV = probs_BV.cumsum(dim=-1)

    # top-p keeps a token if those before it sum to less than top_p: always the first one.
    before_BV = cumulative_BV - probs_BV
    kept_BV = before_BV < top_p
    num_kept_B1 = kept_BV.sum(dim=-1, keepdim=True)
    last_kept_B1 = (num_kept_B1 - 1).clamp(min=0)  # none is kept where the logits are nan

    # The draw is a share of the probability that is kept.
    kept_probability_B1 = cumulative_BV.gather(1, last_kept_B1)
    threshold_B1 = draws_B[:, None] * kept_probability_B1
    rank_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True)
    # Rounding may put the threshold at the end of the kept tokens, or after it.
    rank_B1 = rank_B1.minimum(last_kept_B1)
    return token_ids_BV.gather(1, rank_B1).squeeze(1)


# ---------------------------------------------------------------- characters


def text_chunks(tokens: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the text of tokens as the tokens come.

    A character may take several tokens: it is yielded with the last of them. The strings together
    are tokenizer.decode of all tokens.
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
    # The text may have ended within a character, of which nothing was yielded yet. What was printed
    # cannot be taken back: where the whole text begins otherwise, nothing more is yielded.
    whole = tokenizer.decode(ids)
    if whole.startswith(shown):
        yield whole[len(shown) :]


# ---------------------------------------------------------------- reading tokens with a cache


class _Texts:
    """The last max_seq_len tokens of n texts that begin alike, and the cache of what was read.

    The prompt has one row, whatever n: it is read once, for all texts. So `tokens_BS` and
    `unread_BS` have one row at first, and n rows after the first `append`.
    """

    def __init__(
        self,
        model: MoETransformer,
        prompt: list[int],
        n: int,
        max_new_tokens: int,
    ):
        self.model = model
        self.n = n
        self.max_seq_len = model.config.max_seq_len
        self.device = model.norm.weight.device
        longest = min(self.max_seq_len, len(prompt) + max_new_tokens)
        self.cache = _empty_cache(model, n, longest)
        self.read_next = _reader_of_next_tokens(model, self.cache, n)

        window = prompt[-self.max_seq_len :]
        self.tokens_BS = torch.tensor([window], device=self.device)
        self.unread_BS = self.tokens_BS
        self.position = 0  # of the first unread token

    def next_logits(self) -> Tensor:
        """Reads the tokens not read yet. Returns the logits [B, V] of each text's next token."""
        num_unread = self.unread_BS.shape[1]
        if self.position + num_unread > self.max_seq_len:
            # The cache is full: the last max_seq_len tokens are read again, from position 0.
            self.unread_BS = self.tokens_BS
            self.position = 0
        if self.position == 0:
            logits_BV = _read(self.model, self.cache, self.unread_BS)
            logits_BV = logits_BV.expand(self.n, -1)
        else:
            position_1 = torch.tensor([self.position], device=self.device)
            logits_BV = self.read_next(self.unread_BS, position_1)
        self.position += self.unread_BS.shape[1]
        return logits_BV

    def append(self, token_ids_B: Tensor) -> None:
        """Adds one token to each text."""
        self.unread_BS = token_ids_B[:, None]
        earlier_BS = self.tokens_BS.expand(self.n, -1)
        tokens_BS = torch.cat([earlier_BS, self.unread_BS], dim=1)
        self.tokens_BS = tokens_BS[:, -self.max_seq_len :]


def _empty_cache(model: MoETransformer, n: int, length: int) -> Cache:
    """A cache for n texts of up to `length` tokens."""
    config = model.config
    shape = (n, config.n_kv_heads, length, config.head_dim)
    options = dict(device=model.norm.weight.device, dtype=model.compute_dtype)
    cache = []
    for _ in model.blocks:
        keys = torch.zeros(shape, **options)
        values = torch.zeros(shape, **options)
        cache.append((keys, values))
    return cache


def _reader_of_next_tokens(
    model: MoETransformer,
    cache: Cache,
    n: int,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The function that reads one more token of each of n texts: (tokens, position) to logits.

    It is a CUDA graph where that is possible.
    """
    config = model.config
    # A CUDA graph cannot copy to the host, which grouped matmuls of many rows may do with `offs`.
    # The kernel for few rows never does. Each of the n tokens is one row for each of its experts.
    routed_rows = n * config.top_k
    takes_gemv = triton is not None and routed_rows <= GEMV_MAX_ROWS
    stays_on_gpu = takes_gemv or config.n_moe_layers == 0
    if model.norm.weight.is_cuda and stays_on_gpu:
        return _GraphedRead(model, cache)
    return functools.partial(_read, model, cache)


def _read(
    model: MoETransformer,
    cache: Cache,
    tokens_BS: Tensor,
    position_1: Tensor | None = None,
) -> Tensor:
    """Runs the model on tokens, and writes their keys and values into the cache.

    Without `position_1` the tokens are a whole window, from position 0. It may have one row [1, S]:
    its keys and values are then written to all rows of the cache. With `position_1`, int64 [1],
    they are one more token [B, 1] of each text, at that position.

    Returns the logits [B, V] of the next token.
    """
    if position_1 is None:
        length = tokens_BS.shape[1]
        positions_S = torch.arange(length, device=tokens_BS.device)
        visible_T = None
    else:
        positions_S = position_1
        cached_keys, _ = cache[0]
        cache_positions_T = torch.arange(cached_keys.shape[2], device=tokens_BS.device)
        visible_T = cache_positions_T <= position_1
    with model.autocast(), sdpa_kernel(ATTENTION):
        x_BSD = model.embedding(tokens_BS).to(model.compute_dtype)
        for block, (cached_keys, cached_values) in zip(model.blocks, cache):
            attention_in_BSD = block.attention_norm(x_BSD)
            q, k, v = block.attention.project(attention_in_BSD, positions_S)
            cached_keys[:, :, positions_S] = k
            cached_values[:, :, positions_S] = v
            if position_1 is not None:
                k = cached_keys
                v = cached_values
            attention_out_BSD = block.attention.attend(q, k, v, visible_T)
            x_BSD = x_BSD + attention_out_BSD
            ffn_in_BSD = block.ffn_norm(x_BSD)
            ffn_out = block.ffn(ffn_in_BSD)
            if block.moe:
                ffn_out, _routing = ffn_out
            x_BSD = x_BSD + ffn_out
        last_x_BD = model.norm(x_BSD[:, -1])
        return model.logits(last_x_BD)


class _GraphedRead:
    """`_read` of one more token of each text as a CUDA graph, recorded at the first call.

    A token takes hundreds of small kernels. Most of the time would go into launching them one by
    one; a graph launches them all at once.

    The logits of a call are overwritten by the next call.
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
        # Each replay reads its inputs from these tensors.
        self.inputs = (tokens_B1.clone(), position_1.clone())
        # One run before the recording: libraries allocate what they need when they are first used.
        # It writes the token's keys and values into the cache. The first replay writes the same
        # ones to the same position again, so this changes nothing.
        self.read(*self.inputs)
        # "thread_local": the trainer has other threads, which may use the GPU meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.logits_BV = self.read(*self.inputs)
