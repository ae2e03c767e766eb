"""Group-packed training lays out a prompt once, then its completions, which see the prompt and themselves.

    tokens      x1 x2 x3 | y1 y2 | z1 z2 z3 | next group ...
    positions    0  1  2 |  3  4 |  3  4  5 |
    sees          causal | x + y |   x + z  |

There is no padding, and a completion's last token is only a target. Everything token-wise (embedding,
projections, MLP, norms) runs on these tokens, so a prompt costs once and not m times; gradients flow into it
from all of its completions. Only attention is different: on a GPU FlexAttention runs with a block mask of the
above; elsewhere, and where that fails, attention is computed on padded blocks: prompts [G, P], completions
[M, C] against [their prompt, themselves]. It is registered through transformers' attention interface; the
model's code stays as it is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gvpo_ray.groups import Row
from gvpo_ray.learner.context import Context
from gvpo_ray.learner.logprobs import trained_tokens

NAME = "group_packed"
"""The name of packed attention in transformers' attention interface."""


@dataclass
class Layout:
    """A Layout says where the T tokens of a micro-batch with G groups and M completions are.

    P is the length of the longest prompt, C that of the longest completion without its last token.
    """

    prompts: Tensor
    """[G, P] The index, 0..T-1, of each token of each prompt; 0 is padding."""
    prompt_lengths: Tensor
    """[G] The number of tokens of each prompt."""
    completions: Tensor
    """[M, C] The index, 0..T-1, of each token of each completion but the last; 0 is padding."""
    group: Tensor
    """[M] The group of each completion."""
    place: Tensor
    """[T] The row of each token's output in the padded blocks: g P + i or, in a completion, G P + n C + i."""
    owners: Tensor
    """[3, T] The group, the completion (-1: the prompt) and the position of each token."""
    block_masks: dict[int, Any] | None
    """FlexAttention's masks by sliding window, made at their first use; None: padded blocks are used."""
    context: Context | None = None
    """The ranks that split the sequence; None: this rank has it whole."""
    own: Tensor | None = None
    """The targets, 0..num_targets-1, that are predicted at this rank's tokens, where ranks split it."""
    num_targets: int = 0
    """The number of targets of all these ranks."""

    def whole(self, logprobs: Tensor) -> Tensor:
        """Return the log-probs of all targets, [num_targets], of which this rank may have computed some."""
        if self.context is None or self.own is None:
            return logprobs
        return self.context.whole(logprobs, self.own, self.num_targets)

    def block_mask(self, window: int | None) -> Any:
        """Return FlexAttention's mask for layers with this sliding window (None: full attention)."""
        assert self.block_masks is not None
        width = ALL if window is None else window
        if width not in self.block_masks:
            self.block_masks[width] = _block_mask(self.owners, width)
        return self.block_masks[width]


ALL = 1 << 30
"""The sliding window of a layer with full attention, a number so that both kinds share one mask function."""

BLOCK = 128
"""The number of tokens per side of a block of FlexAttention's mask."""

LEAST = 2 * BLOCK
"""The shortest packed sequence for FlexAttention, in tokens.

Below 128 tokens FlexAttention runs another kernel, and a single block would be compiled separately.
"""


def _block_mask(owners: Tensor, window: int) -> Any:
    """Return FlexAttention's BlockMask, which says where the mask is all true, mixed or all false.

    torch's create_block_mask does the same, but compiled it is one graph more for each kind of length, and
    not compiled it holds [T, T].

    Args:
        owners: [3, T] as in `Layout`; T is a multiple of BLOCK.
        window: the sliding window in tokens, or ALL.
    """
    from torch.nn.attention.flex_attention import BlockMask

    group, completion, position = owners.unbind()
    width = torch.tensor(window, device=owners.device)  # a tensor, because a number would be compiled in

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        mine = (group[q] == group[k]) & ((completion[k] == -1) | (completion[k] == completion[q])) & (q >= k)
        return mine & (position[q] - position[k] < width)

    size = owners.shape[1]
    places = torch.arange(size, device=owners.device)
    rows = BLOCK * max(1, (1 << 25) // (BLOCK * size))  # rows of [T, T] that are held at a time
    some, every = [], []
    for part in places.split(rows):  # type: ignore[no-untyped-call]
        seen = sees(part, part, part[:, None], places[None, :]).view(-1, BLOCK, size // BLOCK, BLOCK)
        some.append(seen.any(3).any(1))
        every.append(seen.all(3).all(1))
    full = torch.cat(every)

    def columns(blocks: Tensor) -> tuple[Tensor, Tensor]:  # their number in each row, and they before others
        order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        return blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]

    partial = torch.cat(some) & ~full
    return BlockMask.from_kv_blocks(*columns(partial), *columns(full), BLOCK_SIZE=BLOCK, mask_mod=sees)


@functools.cache
def _flex_attention() -> Callable[..., Any]:
    """Return FlexAttention, compiled once for all lengths.

    It raises where Dynamo would reach its limit of recompilations and run it unfused.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(flex_attention, dynamic=True)


def pack(
    rows: Sequence[Row], device: torch.device | str, flex: bool = False, context: Context | None = None
) -> tuple[dict[str, Any], list[int]]:
    """Lay out groups in one sequence of T tokens, [1, T].

    For FlexAttention T is a multiple of BLOCK, and at least LEAST, and where ranks split the sequence a
    multiple of their number: the tokens that fill the sequence up are a group of their own, which no other
    token sees and whose outputs are not read.

    Args:
        rows: the groups.
        device: where the tensors are made.
        flex: whether FlexAttention computes attention.
        context: the ranks that split the sequence; None: this rank has it whole.

    Returns:
        The arguments of CompletionLogprobs, and the number of trained tokens of each completion.
    """
    longest_prompt = max(len(row["prompt_ids"]) for row in rows)
    longest = max(len(ids) for row in rows for ids in row["completion_ids"]) - 1
    num_completions = sum(len(row["completion_ids"]) for row in rows)
    prompts = np.zeros((len(rows), longest_prompt), dtype=np.int64)
    completions = np.zeros((num_completions, longest), dtype=np.int64)
    # arrays of each prompt and each completion, which are put end to end below
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    place: list[np.ndarray] = []
    owners: list[tuple[int, int]] = []
    sources: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    group: list[int] = []
    length = 0
    for g, row in enumerate(rows):
        prompt = np.asarray(row["prompt_ids"], dtype=np.int64)
        index = np.arange(len(prompt))
        prompts[g, : len(prompt)] = length + index
        tokens.append(prompt)
        positions.append(index)
        place.append(g * longest_prompt + index)
        owners.append((g, -1))
        length += len(prompt)
        last = length - 1
        for text, places in zip(row["completion_ids"], trained_tokens(row), strict=True):
            ids = np.asarray(text, dtype=np.int64)
            # a range is what most have, and numpy takes it number by number
            trained = np.arange(len(ids)) if isinstance(places, range) else np.array(places, dtype=np.int64)
            index = np.arange(len(ids) - 1)
            completions[len(group), : len(index)] = length + index
            tokens.append(ids[:-1])
            positions.append(len(prompt) + index)
            place.append(prompts.size + len(group) * longest + index)
            owners.append((g, len(group)))
            sources.append(np.where(trained == 0, last, length - 1 + trained))  # the token before each
            targets.append(ids[trained])
            group.append(g)
            length += len(index)
    step = math.lcm(BLOCK if flex else 1, 1 if context is None else context.size)
    if missing := max(LEAST if flex else 0, -(-length // step) * step) - length:
        index = np.arange(missing)
        tokens.append(np.zeros_like(index))
        positions.append(index)
        owners.append((len(rows), -1))
        if not flex:
            place.append(np.zeros_like(index))
    sizes = [len(part) for part in positions]
    all_positions, source = np.concatenate(positions), np.concatenate(sources)

    def tensor(array: np.ndarray | list[int]) -> Tensor:
        return torch.as_tensor(array, dtype=torch.long).to(device)

    layout = Layout(
        prompts=tensor(prompts),
        prompt_lengths=tensor([len(row["prompt_ids"]) for row in rows]),
        completions=tensor(completions),
        group=tensor(group),
        place=tensor(np.concatenate(place)),
        owners=tensor(np.stack([*np.repeat(np.array(owners), sizes, axis=0).T, all_positions])),
        block_masks={} if flex else None,
        context=context,
    )
    inputs = {
        "input_ids": tensor(np.concatenate(tokens)[None]),
        "position_ids": tensor(all_positions[None]),
        # transformers passes a mask of four dimensions on as it is; the layout replaces it
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "rows": torch.zeros(len(source), dtype=torch.long, device=device),
        "positions": tensor(source),
        "targets": tensor(np.concatenate(targets)),
        "layout": layout,
    }
    lengths = [len(ids) for ids in targets]
    return inputs if context is None else context.split(inputs), lengths


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute the attention of packed groups; without a layout it is transformers' own SDPA.

    Args:
        module: the attention layer.
        query: [1, H, T, D].
        key: [1, H_kv, T, D].
        value: [1, H_kv, T, D].
        attention_mask: used without a layout only.
        scaling: multiplies the scores; None: 1 / sqrt(D).
        sliding_window: a token sees itself and sliding_window - 1 tokens before it; None: all before it.
        layout: what `pack` made.
        kwargs: other arguments of transformers' attention interface.

    Returns:
        The output, [1, T, H, D], and None in place of the attention weights.

    Raises:
        ValueError: the layer needs something that packed attention does not compute.
    """
    for name in ("softcap", "s_aux"):
        if layout is not None and kwargs.get(name) is not None:
            raise ValueError(f"its attention has {name}, which packed attention does not compute")
    if layout is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    context = layout.context
    if context is not None:
        query, key, value = context.by_heads(query, key, value)
    out = _attention(layout, query, key, value, scaling, sliding_window)
    return (out if context is None else context.by_tokens(out)), None


def _attention(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Return the attention of a whole packed sequence, [1, T, H, D]; arguments as in `packed_attention`."""
    if layout.block_masks is not None:
        # Under autocast the rotary embedding leaves query and key in float32; mixed with a value in bfloat16,
        # kernels are slow or wrong.
        query, key = query.to(value.dtype), key.to(value.dtype)
        is_grouped = query.shape[1] != key.shape[1]
        mask = layout.block_mask(window)
        out: Tensor = _flex_attention()(
            query, key, value, block_mask=mask, scale=scaling, enable_gqa=is_grouped
        )
        return out.transpose(1, 2)
    longest_prompt = layout.prompts.shape[1]
    num_completions, longest = layout.completions.shape

    def block(states: Tensor, tokens: Tensor) -> Tensor:  # [1, H, T, D], [B, L] -> [B, H, L, D]
        flat = states[0].index_select(1, tokens.flatten())
        blocks: Tensor = flat.unflatten(1, tokens.shape)  # type: ignore[no-untyped-call]
        return blocks.transpose(0, 1)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:  # [B, H, L, D] -> [B L, H, D]
        shared = query.shape[1] // key.shape[1]
        out = scaled_dot_product_attention(
            query,
            repeat_kv(key, shared),
            repeat_kv(value, shared),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
        )
        return out.transpose(1, 2).flatten(0, 1)

    prompt_key, prompt_value = block(key, layout.prompts), block(value, layout.prompts)
    # Padding is behind every prompt, so no real token sees it. The window matters only in longer prompts.
    mask = None
    if window is not None and longest_prompt > window:
        age = _ages(
            torch.arange(longest_prompt, device=query.device),
            torch.arange(longest_prompt, device=query.device),
        )
        mask = (age >= 0) & (age < window)
    outputs = [attend(block(query, layout.prompts), prompt_key, prompt_value, mask)]
    if longest:
        keys = torch.cat([prompt_key.index_select(0, layout.group), block(key, layout.completions)], dim=2)
        values = torch.cat(
            [prompt_value.index_select(0, layout.group), block(value, layout.completions)], dim=2
        )
        own = torch.arange(longest, device=query.device)
        before = torch.arange(longest_prompt, device=query.device)
        prompt_lengths = layout.prompt_lengths[layout.group, None, None]
        sees_prompt = (before < prompt_lengths).expand(num_completions, longest, longest_prompt)
        age_own = _ages(own, own).expand(num_completions, longest, longest)
        sees_own = age_own >= 0
        if window is not None:
            sees_prompt = sees_prompt & (_ages(own, before) + prompt_lengths < window)
            sees_own = sees_own & (age_own < window)
        mask = torch.cat([sees_prompt, sees_own], dim=2)
        # Padding behind a completion's end sees its prompt too, so that no softmax is empty; its output is
        # not read.
        outputs.append(attend(block(query, layout.completions), keys, values, mask[:, None]))
    return torch.cat(outputs).index_select(0, layout.place)[None]


def check_kernel(config: Any, rows: Sequence[Row], device: torch.device, dtype: torch.dtype) -> None:
    """Compare compiled FlexAttention, and its gradients, with padded blocks on heads like the model's.

    Query, key and value are random.

    Args:
        config: the model's.
        rows: groups whose layout is used.
        device: where the model is.
        dtype: the type of query, key and value.

    Raises:
        RuntimeError: they differ by more than the rounding of `dtype`, or a value is not finite.
    """
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    results = []
    for flex in (True, False):
        layout = pack(rows, device, flex)[0]["layout"]
        length, num_tokens = layout.owners.shape[1], len(layout.place)
        generator = torch.Generator(device).manual_seed(0)
        states = []
        for number in (heads, shared, shared):
            state = torch.randn((1, number, num_tokens, size), generator=generator, device=device).to(dtype)
            states.append(torch.nn.functional.pad(state, (0, 0, 0, length - num_tokens)).requires_grad_())
        with torch.enable_grad():
            query, key, value = states
            out, _ = packed_attention(nn.Module().eval(), query, key, value, None, layout=layout)
            out = out[:, :num_tokens]
            loss = (out.float() * torch.randn(out.shape, generator=generator, device=device)).sum()
            loss.backward()  # type: ignore[no-untyped-call]
        gradients = [state.grad[:, :, :num_tokens] for state in states if state.grad is not None]
        results.append([out.detach(), *gradients])
    for name, ours, theirs in zip(
        ("output", "query's gradient", "key's gradient", "value's gradient"), *results, strict=True
    ):
        difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        if not difference < (0.03 if dtype == torch.bfloat16 else 1e-3):
            raise RuntimeError(f"FlexAttention's {name} differs by {difference:.2g} of its norm")


def _ages(queries: Tensor, keys: Tensor) -> Tensor:
    """Return how many tokens each key is before each query, [1, queries, keys]."""
    return (queries[:, None] - keys[None, :])[None]


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
