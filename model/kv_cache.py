"""Keys and values of the tokens already read, so that each new token costs one position and not all of them."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import attention, decode
from model.config import ModelConfig


class KVCache:
    """The memory of one batch of sequences, passed to the model and holding everything that decoding remembers.

    Its tensors are written in place and never replaced, so a step captured on a GPU, which knows only their addresses, stays good.
    Rows may hold different numbers of tokens (ragged prompts). A layer with a window keeps a ring of `window` slots:
    the token at position p lies in slot p mod slots, so memory stays at the window however long the text.

    keys, values   one (B, K, slots, D) tensor per layer
    longest        tokens of its longest row
    ragged         whether rows may hold less than that; equal rows need no masks
    grain          ragged rows read a multiple of so many slots: a step captured on a GPU then serves for that many tokens
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu"):
        shapes = [(batch, config.kv_heads, min(window or capacity, capacity), config.head_size) for window in config.windows]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        # Smeared keys look one raw key back, before positions were applied.
        self.last_raw_key = [torch.zeros(shape[0], shape[1], shape[3], dtype=dtype, device=device) for shape in shapes]
        self.windows, self.capacity = config.windows, capacity
        self.longest, self.ragged, self.grain = 0, False, 1
        self._lengths = torch.zeros(batch, dtype=torch.long, device=device)         # counted once rows are ragged

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens held by each row."""
        return self._lengths if self.ragged else torch.full_like(self._lengths, self.longest)

    def count(self) -> None:
        """Treat rows as ragged from here on."""
        self._lengths.copy_(self.lengths)
        self.ragged = True

    def begin(self, T: int, new: Tensor | None = None) -> slice | Tensor:
        """Make room for T more tokens a row, of which the first `new` (B,) are real and the rest padding.

        Returns their positions: a slice while all rows are equal, and a ValueError when that does not fit; else (B, T).
        Ragged rows are the caller's to count: one that runs over its capacity overwrites its own beginning.
        """
        self.T, self.new = T, new
        if self.ragged or new is not None:
            return self._query_positions()
        if self.longest + T > self.capacity:
            raise ValueError(f"KVCache: {self.longest} + {T} tokens do not fit a capacity of {self.capacity}")
        return slice(self.longest, self.longest + T)

    def end(self) -> None:
        """Count the tokens that `attend` has stored in every layer."""
        if self.ragged or self.new is not None:
            self._lengths.copy_(self.lengths + self._counts())          # in place: a captured step counts where it was captured
            self.ragged = True
        self.longest = min(self.longest + self.T, self.capacity) if self.new is None else int(self._lengths.max())

    def put(self, rows: Sequence[int], other: "KVCache") -> None:
        """Replace the sequences `rows` by those of another cache of the same capacity."""
        for ours, theirs in zip(self._memory(), other._memory()):
            ours[rows] = theirs
        self.count()
        self._lengths[rows] = other.lengths
        self.longest = int(self._lengths.max())

    def reset(self) -> None:
        """Forget everything."""
        self.longest, self.ragged = 0, False
        for key in self.last_raw_key:
            key.zero_()

    def clear(self, rows: Sequence[int]) -> None:
        """Forget what the sequences `rows` hold."""
        self.count()
        self._lengths[rows] = 0
        self.longest = int(self._lengths.max())

    def only(self, rows: Sequence[int]) -> "KVCache":
        """A new cache that holds the sequences `rows` of this one."""
        cache = copy.copy(self)
        cache.keys, cache.values, cache.last_raw_key = ([part[rows] for part in parts] for parts in
                                                        (self.keys, self.values, self.last_raw_key))
        cache._lengths = self._lengths[rows]
        if self.ragged:
            cache.longest = int(cache._lengths.max())
        return cache

    def _memory(self) -> list[Tensor]:
        return [*self.keys, *self.values, *self.last_raw_key]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, K, T, D) and attend to all that each query q (B, H, T, D) may see → (B, H, T, D)."""
        T, slots, window = q.shape[2], self.keys[layer].shape[2], self.windows[layer]
        if not self.ragged and self.new is None and self.longest + T < slots:           # in order, no wrap
            n = self.longest + T
            self.keys[layer][:, :, self.longest:n] = k
            self.values[layer][:, :, self.longest:n] = v
            return attention(q, self.keys[layer][:, :, :n], self.values[layer][:, :, :n])
        if self.longest == 0:                                       # prefill; padding lies behind what a real query sees
            self._store(layer, k, v)
            return attention(q, k, v, window=window)
        if T == 1:                                  # a ring is what one query sees: its slots so far, all of them once it has wrapped
            self._store(layer, k, v)
            if not self.ragged and self.new is None:
                return attention(q, self.keys[layer], self.values[layer])
            n = self.reach(slots)
            return decode(q, self.keys[layer][:, :, :n], self.values[layer][:, :, :n], self.lengths[:, None])
        # Several tokens may overwrite slots that the first of them still has to see: look before storing.
        at, padding = self._query_positions(), torch.arange(T, device=q.device) >= self._counts()[:, None]
        held = self._slot_positions(slots, self.lengths)
        z = decode(q, torch.cat([self.keys[layer], k], 2), torch.cat([self.values[layer], v], 2), at,
                   torch.cat([held, at.masked_fill(padding, -1)], 1), window=window)
        self._store(layer, k, v)
        return z

    def reach(self, slots: int) -> int:
        """How many of a layer's slots a step of ragged rows reads: up to the longest row's newest token."""
        return min(slots, (self.longest + self.grain) // self.grain * self.grain)

    def previous_raw_keys(self, layer: int, k: Tensor) -> Tensor:
        """For each raw key of k (B, K, T, D) the raw key one position before it; remembers the last one."""
        previous = torch.cat([self.last_raw_key[layer][:, :, None], k[:, :, :-1]], dim=2)
        new = self._counts()
        newest = k.gather(2, (new - 1).clamp(min=0)[:, None, None, None].expand(-1, k.shape[1], 1, k.shape[3]))[:, :, 0]
        self.last_raw_key[layer].copy_(torch.where((new > 0)[:, None, None], newest, self.last_raw_key[layer]))
        return previous

    def _counts(self) -> Tensor:
        """(B,) real tokens among those being added."""
        return torch.full_like(self._lengths, self.T) if self.new is None else self.new

    def _query_positions(self) -> Tensor:
        return self.lengths[:, None] + torch.arange(self.T, device=self._lengths.device)            # (B, T)

    @staticmethod
    def _slot_positions(slots: int, lengths: Tensor) -> Tensor:
        """Which position each slot holds when rows have `lengths` (B,) tokens: (B, slots), negative where empty."""
        last = lengths[:, None] - 1
        return last - (last - torch.arange(slots, device=lengths.device)) % slots

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        slots, before = self.keys[layer].shape[2], self.lengths
        if k.shape[2] == 1 and self.new is None:                      # one token a row goes to one slot each
            row = torch.arange(len(before), device=k.device)
            self.keys[layer][row, :, before % slots] = k[:, :, 0]
            self.values[layer][row, :, before % slots] = v[:, :, 0]
            return
        source = self._slot_positions(slots, before + self._counts()) - before[:, None]             # index into k, < 0: keep
        fresh = (source >= 0)[:, None, :, None]
        index = source.clamp(min=0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        self.keys[layer].copy_(torch.where(fresh, k.gather(2, index), self.keys[layer]))
        self.values[layer].copy_(torch.where(fresh, v.gather(2, index), self.values[layer]))
