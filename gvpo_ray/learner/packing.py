"""Group-packed forward: a prompt once, then its completions, each of which sees the prompt and itself only.

    tokens      x1 x2 x3 | y1 y2 | z1 z2 z3 | next group ...      no padding; a completion's last token is
                                                                  only a target
    positions    0  1  2 |  3  4 |  3  4  5 |
    sees         causal  | x + y | x + z    |

Everything token-wise (embedding, projections, MLP, norms) runs on these tokens, so a prompt costs once and
not m times; gradients flow into it from all of its completions. Attention alone is different: on a GPU
FlexAttention runs with a block mask of the above; elsewhere (and where that fails) it is computed on padded
blocks: prompts [G, P], completions [M, C] against [their prompt, themselves]. It is registered through
transformers' attention interface; the model's code stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gvpo_ray.groups import Row

NAME = "group_packed"


@dataclass(frozen=True)
class Layout:
    """Where the T tokens of a micro-batch with G groups and M completions are, and whom each sees."""

    prompts: Tensor
    """[G, P] token at each place of each prompt; 0 where a prompt has no such place."""
    prompt_lengths: Tensor
    """[G]"""
    completions: Tensor
    """[M, C] likewise, without each completion's last token."""
    group: Tensor
    """[M] group of each completion."""
    place: Tensor
    """[T] where a token's output is: g P + i in a prompt, G P + n C + i in a completion."""
    owners: Tensor
    """[3, T] of each token its group, its completion (-1: the prompt) and its position."""
    block_masks: dict[int | None, Any] | None
    """FlexAttention's, by sliding window, made when the first layer asks; None: padded blocks."""

    def block_mask(self, window: int | None) -> Any:
        from torch.nn.attention.flex_attention import create_block_mask

        assert self.block_masks is not None
        if window not in self.block_masks:
            group, completion, position = self.owners

            def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
                mine = (
                    (group[q] == group[k])
                    & ((completion[k] == -1) | (completion[k] == completion[q]))
                    & (q >= k)
                )
                return mine if window is None else mine & (position[q] - position[k] < window)

            size = self.owners.shape[1]
            on_gpu = self.owners.is_cuda  # compiled, it never holds the [T, T] mask
            self.block_masks[window] = create_block_mask(
                sees, None, None, size, size, device=self.owners.device, _compile=on_gpu
            )
        return self.block_masks[window]


def pack(
    rows: Sequence[Row], device: torch.device | str, flex: bool = False
) -> tuple[dict[str, Any], list[int]]:
    """Lay out groups in a row. Returns the arguments of CompletionLogprobs and the completions' lengths.
    flex: for FlexAttention.

    input_ids, position_ids [1, T]; token targets[i] is predicted at [0, positions[i]].
    """
    longest_prompt = max(len(row["prompt_ids"]) for row in rows)
    longest = max(len(ids) for row in rows for ids in row["completion_ids"]) - 1
    num_completions = sum(len(row["completion_ids"]) for row in rows)
    prompts = torch.zeros(len(rows), longest_prompt, dtype=torch.long)
    completions = torch.zeros(num_completions, longest, dtype=torch.long)
    tokens: list[int] = []
    positions: list[int] = []
    place: list[int] = []
    owners: list[tuple[int, int]] = []
    sources: list[int] = []
    targets: list[int] = []
    group: list[int] = []
    lengths: list[int] = []
    for g, row in enumerate(rows):
        prompt, start = row["prompt_ids"], len(tokens)
        prompts[g, : len(prompt)] = torch.arange(start, start + len(prompt))
        tokens += prompt
        positions += range(len(prompt))
        place += range(g * longest_prompt, g * longest_prompt + len(prompt))
        owners += [(g, -1)] * len(prompt)
        for ids in row["completion_ids"]:
            first, size = len(tokens), len(ids) - 1
            completions[len(group), :size] = torch.arange(first, first + size)
            place += range(
                prompts.numel() + len(group) * longest, prompts.numel() + len(group) * longest + size
            )
            tokens += ids[:-1]
            owners += [(g, len(group))] * size
            positions += range(len(prompt), len(prompt) + size)
            sources += [start + len(prompt) - 1, *range(first, first + size)]
            targets += ids
            group.append(g)
            lengths.append(len(ids))
    layout = Layout(
        prompts=prompts.to(device),
        prompt_lengths=torch.tensor([len(row["prompt_ids"]) for row in rows], device=device),
        completions=completions.to(device),
        group=torch.tensor(group, device=device),
        place=torch.tensor(place, device=device),
        owners=torch.tensor([*zip(*owners, strict=True), positions], device=device),
        block_masks={} if flex else None,
    )
    inputs = {
        "input_ids": torch.tensor([tokens], device=device),
        "position_ids": torch.tensor([positions], device=device),
        # four dimensions: passed on as it is, for the layout says it all
        "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        "rows": torch.zeros(len(sources), dtype=torch.long, device=device),
        "positions": torch.tensor(sources, device=device),
        "targets": torch.tensor(targets, device=device),
        "layout": layout,
    }
    return inputs, lengths


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
    """Attention of packed groups: query [1, H, T, D], key and value [1, H_kv, T, D] -> [1, T, H, D].

    Without a layout it is transformers' own SDPA. sliding_window: a token sees itself and so many tokens less
    one before it.
    """
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
    if layout.block_masks is not None:
        mask = layout.block_mask(sliding_window)
        return flex_attention_forward(module, query, key, value, mask, scaling=scaling)[0], None
    longest_prompt = layout.prompts.shape[1]
    num_completions, longest = layout.completions.shape

    def block(states: Tensor, tokens: Tensor) -> Tensor:  # [1, H, T, D], [B, L] -> [B, H, L, D]
        return states[0].index_select(1, tokens.flatten()).unflatten(1, tokens.shape).transpose(0, 1)

    # [B, H, L, D] -> [B L, H, D]
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
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
    # Padding is behind every prompt: no real token of it sees that. The window bites only in longer prompts.
    mask = None
    if sliding_window is not None and longest_prompt > sliding_window:
        age = _ages(
            torch.arange(longest_prompt, device=query.device),
            torch.arange(longest_prompt, device=query.device),
        )
        mask = (age >= 0) & (age < sliding_window)
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
        if sliding_window is not None:
            sees_prompt = sees_prompt & (_ages(own, before) + prompt_lengths < sliding_window)
            sees_own = sees_own & (age_own < sliding_window)
        mask = torch.cat([sees_prompt, sees_own], dim=2)
        # A place behind a completion's end sees its prompt too, so that no softmax is empty; nobody reads
        # what comes of it.
        outputs.append(attend(block(query, layout.completions), keys, values, mask[:, None]))
    return torch.cat(outputs).index_select(0, layout.place)[None], None


def try_gradient(config: Any, layout: Layout, dtype: torch.dtype) -> None:
    """Attention and its backward pass once, on heads like the model's: a kernel may have the one and fail at
    the other.
    """
    heads = config.num_attention_heads
    shapes = [
        (1, number, len(layout.place), getattr(config, "head_dim", None) or config.hidden_size // heads)
        for number in (heads, *[getattr(config, "num_key_value_heads", None) or heads] * 2)
    ]
    states = [
        torch.full(shape, 0.5, dtype=dtype, device=layout.place.device, requires_grad=True)
        for shape in shapes
    ]
    with torch.enable_grad():
        packed_attention(nn.Module().eval(), *states, None, layout=layout)[
            0
        ].float().square().sum().backward()
    if not all(bool(state.grad.isfinite().all()) for state in states):
        raise RuntimeError("its attention's gradient is not finite")


def _ages(queries: Tensor, keys: Tensor) -> Tensor:
    """[1, queries, keys] how far a key is behind a query."""
    return (queries[:, None] - keys[None, :])[None]


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
