"""The embedded engine's KV cache and its attention: a prompt's keys and values exist once for all its samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorl.policy.attention import Rule

_FIRST_COLUMNS = 32


@dataclass(slots=True)
class _LayerCache:
    prompt_k: Tensor  # [G, K, P, D], padded to the longest prompt
    prompt_v: Tensor
    own_k: Tensor  # [B, K, C, D], the sampled tokens of each row
    own_v: Tensor


class DecodeCache:
    """Keys and values of B rows in G groups, and attention of one new token a row over them.

    Each group's queries meet its prompt in one matrix product, whatever the number of samples. Rows come (`admit`),
    fork and go (`keep`) between steps; within a step the layout is fixed.

    Shapes: B rows, G groups, K key-value heads, H query heads, P longest prompt, C columns for sampled tokens, D head
    size.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layers: dict[int, _LayerCache] = {}
        self._prompt_lengths = torch.zeros(0, dtype=torch.int64, device=device)  # [G]
        self._group = torch.zeros(0, dtype=torch.int64, device=device)  # [B], not decreasing
        self._lengths = torch.zeros(0, dtype=torch.int64, device=device)  # [B], own tokens cached
        self._biases: dict[int | None, tuple[Tensor, Tensor]] = {}

    @property
    def positions(self) -> Tensor:
        """int64[B]: the position of each row's next token."""
        return self._prompt_lengths[self._group] + self._lengths

    def admit(self, recorded: dict[int, tuple[Tensor, Tensor]], paths: list[Tensor]) -> None:
        """Adds a group of one row for each prompt whose keys and values lie in `recorded` (layer -> ([K, T, D], same)).

        `paths` (int64[P_g] each) says where each prompt's tokens lie among the T.
        """
        groups = self._prompt_lengths.numel()
        new_rows = torch.arange(len(paths), device=self._device)
        self._group = torch.cat([self._group, new_rows + groups])
        self._lengths = torch.cat([self._lengths, torch.zeros_like(new_rows)])
        lengths = torch.tensor([len(path) for path in paths], device=self._device)
        self._prompt_lengths = torch.cat([self._prompt_lengths, lengths])
        index = torch.nn.utils.rnn.pad_sequence(paths, batch_first=True).to(self._device)  # [G, P], padding is masked
        for layer, (key, value) in recorded.items():
            prompt_k, prompt_v = (x[:, index].transpose(0, 1).contiguous() for x in (key, value))
            old = self._layers.get(layer)
            if old is None:
                own = key.new_zeros(len(new_rows), key.shape[0], _FIRST_COLUMNS, key.shape[-1])
                self._layers[layer] = _LayerCache(prompt_k, prompt_v, own, torch.zeros_like(own))
                continue
            own = old.own_k.new_zeros(len(new_rows), *old.own_k.shape[1:])
            self._layers[layer] = _LayerCache(
                _stack_padded(old.prompt_k, prompt_k),
                _stack_padded(old.prompt_v, prompt_v),
                torch.cat([old.own_k, own]),
                torch.cat([old.own_v, own]),
            )

    def keep(self, rows: Tensor) -> None:
        """Makes `rows` (int64, not decreasing) the cache's rows: one named twice forks, one left out is dropped, and so
        are groups that have none left."""
        group = self._group[rows]
        groups, self._group = torch.unique_consecutive(group, return_inverse=True)
        whole = groups.numel() == self._prompt_lengths.numel()
        self._lengths = self._lengths[rows]
        self._prompt_lengths = self._prompt_lengths[groups]
        longest = int(self._prompt_lengths.max()) if groups.numel() else 0
        for layer, old in self._layers.items():
            prompt_k, prompt_v = old.prompt_k, old.prompt_v
            if not whole:
                prompt_k, prompt_v = (x[groups, :, :longest] for x in (prompt_k, prompt_v))
            self._layers[layer] = _LayerCache(prompt_k, prompt_v, old.own_k[rows], old.own_v[rows])

    def begin(self) -> None:
        """Prepares the step in which each row's next token is computed."""
        self._biases.clear()
        used = int(self._lengths.max()) + 1
        self._columns = used
        for cache in self._layers.values():
            if cache.own_k.shape[2] < used:
                cache.own_k, cache.own_v = (_widen(x) for x in (cache.own_k, cache.own_v))
        counts = torch.bincount(self._group, minlength=self._prompt_lengths.numel())
        starts = counts.cumsum(0) - counts
        widest = int(counts.max())
        column = torch.arange(self._group.numel(), device=self._device) - starts[self._group]
        self._slot = self._group * widest + column  # [B], each row's place in the [G, widest] grid
        self._grid = torch.zeros(counts.numel() * widest, dtype=torch.int64, device=self._device)
        self._grid[self._slot] = torch.arange(self._group.numel(), device=self._device)
        self._rows = torch.arange(self._group.numel(), device=self._device)

    def end(self) -> None:
        """The step's tokens are in the cache."""
        self._lengths = self._lengths + 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        """One token a row: query [H, B, D], key and value [K, B, D] -> [H, B, D]; see `attention.Layout`."""
        cache = self._layers[layer]
        heads, batch, size = query.shape
        kv_heads = key.shape[0]
        cache.own_k[self._rows, :, self._lengths] = key.transpose(0, 1)
        cache.own_v[self._rows, :, self._lengths] = value.transpose(0, 1)
        q = query.view(kv_heads, heads // kv_heads, batch, size).permute(2, 0, 1, 3)  # [B, K, R, D]
        own_k, own_v = (x[:, :, : self._columns] for x in (cache.own_k, cache.own_v))
        own_bias, prompt_bias = self._bias(rule.window, q.dtype)
        own = rule.scores(q @ own_k.transpose(-1, -2)).add_(own_bias)  # [B, K, R, C]
        prompt = rule.scores(self._over_prompts(q, cache.prompt_k.transpose(-1, -2))).add_(prompt_bias)
        weights = torch.softmax(torch.cat([prompt, own], dim=-1).float(), dim=-1).to(q.dtype)
        to_prompt, to_own = weights.split([prompt.shape[-1], own.shape[-1]], dim=-1)
        out = self._over_prompts(to_prompt, cache.prompt_v) + to_own @ own_v  # [B, K, R, D]
        return out.permute(1, 2, 0, 3).reshape(heads, batch, size)

    def _over_prompts(self, rows: Tensor, prompts: Tensor) -> Tensor:
        """rows [B, K, R, X] @ prompts [G, K, X, Y], each row with its group's -> [B, K, R, Y]; one product a group."""
        groups, kv_heads, _, width = prompts.shape
        repeat = rows.shape[2]
        grid = rows[self._grid].view(groups, -1, kv_heads, repeat, rows.shape[-1]).transpose(1, 2)
        out = grid.reshape(groups, kv_heads, -1, rows.shape[-1]) @ prompts
        out = out.view(groups, kv_heads, -1, repeat, width).transpose(1, 2)
        return out.reshape(-1, kv_heads, repeat, width)[self._slot]

    def _bias(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """0 where a row may look, -inf elsewhere: over own columns [B, 1, 1, C] and over its prompt [B, 1, 1, P]."""
        if window not in self._biases:
            prompt_length = self._prompt_lengths[self._group, None]
            column = torch.arange(self._columns, device=self._device)
            place = torch.arange(next(iter(self._layers.values())).prompt_k.shape[2], device=self._device)
            own, prompt = column <= self._lengths[:, None], place < prompt_length
            if window is not None:
                oldest = self.positions[:, None] - window  # exclusive
                own, prompt = own & (prompt_length + column > oldest), prompt & (place > oldest)
            self._biases[window] = tuple(  # type: ignore[assignment]
                torch.zeros(seen.shape, dtype=dtype, device=self._device).masked_fill_(~seen, -torch.inf)[:, None, None]
                for seen in (own, prompt)
            )
        return self._biases[window]


def _stack_padded(old: Tensor, new: Tensor) -> Tensor:
    longest = max(old.shape[2], new.shape[2])
    return torch.cat([torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[2])) for x in (old, new)])


def _widen(x: Tensor) -> Tensor:
    return torch.cat([x, torch.zeros_like(x)], dim=2)
