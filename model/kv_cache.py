"""Keys and values of the tokens already read, so that each new token costs one position and not
all of them."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.attention import attention, decode
from model.config import ModelConfig


class KVCache:
    """Everything that decoding remembers of one batch of sequences; passed to the model.

    Tensors are written in place and never replaced: a CUDA graph knows only their addresses. Rows
    may hold different numbers of tokens (ragged prompts). A layer with a window keeps a ring of
    `window` slots: the token at position p is in slot p mod slots, so memory stays at the window
    however long the text is.

    keys, values    one (B, K, slots, D) tensor per layer
    longest         tokens of the longest row
    ragged          whether rows may hold fewer than that; equal rows need no masks
    grain           the number of slots that ragged rows read is rounded up to a multiple of it,
                    so that one CUDA graph serves for `grain` tokens
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"):
        K, D = config.kv_heads, config.head_size
        slots = [min(window or capacity, capacity) for window in config.windows]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.keys = [zeros(batch, K, n, D) for n in slots]
        self.values = [zeros(batch, K, n, D) for n in slots]
        # The newest token's key before smearing and rotation: the next smeared key needs it.
        self.last_raw_key = [zeros(batch, K, D) for _ in slots]
        self.windows, self.capacity = config.windows, capacity
        self.longest, self.ragged, self.grain = 0, False, 1
        self._lengths = torch.zeros(batch, dtype=torch.long, device=device)     # if ragged
        # The pass between `begin` and `end`: tokens per row, and how many of them are real.
        self.T: int = 0
        self.new: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Tokens held by each row: (B,)."""
        if self.ragged:
            return self._lengths
        return torch.full_like(self._lengths, self.longest)

    # --- one forward pass ---------------------------------------------------------------------

    def begin(self, T: int, new: Tensor | None = None) -> slice | Tensor:
        """Begin to append T tokens to each row, of which the first `new` (B,) are real and the rest
        is padding. Returns their positions: a slice if all rows are equal, else (B, T).

        Raises ValueError if equal rows do not fit. For ragged rows the caller has to check: a row
        that runs over its capacity overwrites its own beginning.
        """
        self.T, self.new = T, new
        if self.ragged or new is not None:
            return self._query_positions()
        if self.longest + T > self.capacity:
            raise ValueError(f"KVCache: {self.longest} + {T} tokens do not fit a capacity of "
                             f"{self.capacity}")
        return slice(self.longest, self.longest + T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, K, T, D) and attend to all that each query q (B, H, T, D) may see
        → (B, H, T, D)."""
        keys, values = self.keys[layer], self.values[layer]
        T, slots, window = q.shape[2], keys.shape[2], self.windows[layer]
        equal = not self.ragged and self.new is None
        n = self.longest + T
        if equal and n < slots:         # in order, no wrap; n < window, so no mask is needed
            keys[:, :, self.longest:n] = k
            values[:, :, self.longest:n] = v
            return attention(q, keys[:, :, :n], values[:, :, :n])
        if self.longest == 0:                               # prefill: a query never sees padding
            self._store(layer, k, v)
            return attention(q, k, v, window=window)
        if T == 1:
            # One query sees all that the ring holds: its slots so far, or, wrapped, all of them.
            self._store(layer, k, v)
            if equal:
                return attention(q, keys, values)
            n = self.slots_to_read(slots)
            return decode(q, keys[:, :, :n], values[:, :, :n], self.lengths[:, None])
        # Several tokens may overwrite slots that the first of them still has to see. So attend to
        # the slots and to the new tokens first, and store afterwards.
        positions = self._query_positions()                                     # (B, T)
        padding = torch.arange(T, device=q.device) >= self._counts()[:, None]
        key_positions = torch.cat([self._slot_positions(slots, self.lengths),
                                   positions.masked_fill(padding, -1)], 1)      # (B, slots + T)
        z = decode(q, torch.cat([keys, k], 2), torch.cat([values, v], 2), positions,
                   key_positions, window=window)
        self._store(layer, k, v)
        return z

    def previous_raw_keys(self, layer: int, k: Tensor) -> Tensor:
        """For each raw key of k (B, K, T, D), the one a position before it. Remembers the last."""
        last = self.last_raw_key[layer]
        previous = torch.cat([last[:, :, None], k[:, :, :-1]], dim=2)
        new = self._counts()
        index = (new - 1).clamp(min=0)[:, None, None, None].expand(-1, k.shape[1], 1, k.shape[3])
        newest = k.gather(2, index)[:, :, 0]                                    # (B, K, D)
        last.copy_(torch.where((new > 0)[:, None, None], newest, last))
        return previous

    def end(self) -> None:
        """Count the tokens that `attend` has stored in every layer."""
        if self.ragged or self.new is not None:
            self._lengths.copy_(self.lengths + self._counts())
            self.ragged = True
        if self.new is None:
            self.longest = min(self.longest + self.T, self.capacity)
        else:
            self.longest = int(self._lengths.max())

    # --- rows come and go ---------------------------------------------------------------------

    def make_ragged(self) -> None:
        """Treat rows as ragged from here on."""
        self._lengths.copy_(self.lengths)
        self.ragged = True

    def replace_rows(self, rows: Sequence[int], other: "KVCache") -> None:
        """Replace the sequences `rows` by those of another cache of the same capacity."""
        for ours, theirs in zip(self._tensors(), other._tensors()):
            ours[rows] = theirs
        self.make_ragged()
        self._lengths[rows] = other.lengths
        self.longest = int(self._lengths.max())

    def clear_rows(self, rows: Sequence[int]) -> None:
        """Forget the sequences `rows`."""
        self.make_ragged()
        self._lengths[rows] = 0
        self.longest = int(self._lengths.max())

    def select_rows(self, rows: Sequence[int]) -> "KVCache":
        """A new cache that holds the sequences `rows` of this one."""
        cache = copy.copy(self)
        cache.keys = [keys[rows] for keys in self.keys]
        cache.values = [values[rows] for values in self.values]
        cache.last_raw_key = [key[rows] for key in self.last_raw_key]
        cache._lengths = self._lengths[rows]
        if self.ragged:
            cache.longest = int(cache._lengths.max())
        return cache

    def reset(self) -> None:
        """Forget everything."""
        self.longest, self.ragged = 0, False
        for key in self.last_raw_key:
            key.zero_()

    def slots_to_read(self, slots: int) -> int:
        """How many of a layer's slots a step of ragged rows reads: up to the newest token of the
        longest row."""
        return min(slots, (self.longest + self.grain) // self.grain * self.grain)

    # --- positions and slots ------------------------------------------------------------------

    def _tensors(self) -> list[Tensor]:
        return [*self.keys, *self.values, *self.last_raw_key]

    def _counts(self) -> Tensor:
        """How many of the appended tokens are real: (B,)."""
        return torch.full_like(self._lengths, self.T) if self.new is None else self.new

    def _query_positions(self) -> Tensor:
        """(B, T)."""
        return self.lengths[:, None] + torch.arange(self.T, device=self._lengths.device)

    @staticmethod
    def _slot_positions(slots: int, lengths: Tensor) -> Tensor:
        """The position that each slot holds if rows have `lengths` (B,) tokens: (B, slots),
        negative where empty. With 4 slots and 6 tokens: 4, 5, 2, 3."""
        last = lengths[:, None] - 1
        return last - (last - torch.arange(slots, device=lengths.device)) % slots

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys, values, before = self.keys[layer], self.values[layer], self.lengths
        slots = keys.shape[2]
        if k.shape[2] == 1 and self.new is None:            # one token a row: one slot each
            row = torch.arange(len(before), device=k.device)
            keys[row, :, before % slots] = k[:, :, 0]
            values[row, :, before % slots] = v[:, :, 0]
            return
        # For each slot, the index into k of the token that it holds afterwards; negative: keep.
        source = self._slot_positions(slots, before + self._counts()) - before[:, None]
        fresh = (source >= 0)[:, None, :, None]
        index = source.clamp(min=0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        keys.copy_(torch.where(fresh, k.gather(2, index), keys))
        values.copy_(torch.where(fresh, v.gather(2, index), values))
