"""Keys and values of the tokens already read, so that each new token costs one position and not all of them."""

import torch
from torch import Tensor

from kernels.attention import attention, decode
from model.config import ModelConfig


class KVCache:
    """The memory of one batch of sequences, passed to the model and holding everything that decoding remembers.

    Rows may hold different numbers of tokens (ragged prompts). A layer with a window keeps a ring of `window` slots:
    the token at position p lies in slot p mod slots, so memory stays at the window however long the text.

    keys, values   one (B, K, slots, D) tensor per layer
    lengths        (B,) tokens held by each row
    start          the same as a plain int while all rows are equal, else None: equal rows need no mask
    """

    def __init__(self, config: ModelConfig, batch: int, capacity: int, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu"):
        shapes = [(batch, config.kv_heads, min(window or capacity, capacity), config.head_size) for window in config.windows]
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
        self.windows = config.windows
        self.capacity = capacity
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.start: int | None = 0
        self.empty = True
        # Smeared keys look one raw key back, before positions were applied.
        self.last_raw_key = [torch.zeros(shape[0], shape[1], shape[3], dtype=dtype, device=device) for shape in shapes]

    def begin(self, T: int, new_lengths: Tensor | None = None) -> None:
        """Make room for T more tokens a row, of which the first `new_lengths` (B,) are real and the rest padding."""
        self.new = new_lengths if new_lengths is not None else torch.full_like(self.lengths, T)
        self.ragged = new_lengths is not None
        self.positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)        # (B, T)
        if self.start is not None and not self.ragged and self.start + T > self.capacity:
            raise ValueError(f"KVCache: {self.start} + {T} tokens do not fit a capacity of {self.capacity}")

    def end(self, T: int) -> None:
        """Count the tokens that `attend` has stored in every layer."""
        self.lengths = self.lengths + self.new
        self.start = None if self.ragged or self.start is None else self.start + T
        self.empty = False

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k, v (B, K, T, D) and attend to all that each query q (B, H, T, D) may see → (B, H, T, D)."""
        T, slots, window = q.shape[2], self.keys[layer].shape[2], self.windows[layer]
        if self.start is not None and not self.ragged and self.start + T <= slots:      # in order, no wrap
            n = self.start + T
            self.keys[layer][:, :, self.start:n] = k
            self.values[layer][:, :, self.start:n] = v
            return attention(q, self.keys[layer][:, :, :n], self.values[layer][:, :, :n])
        if self.empty:                                              # prefill; padding lies behind what a real query sees
            self._store(layer, k, v)
            return attention(q, k, v, window=window)
        if T == 1:                                                  # a ring of `window` slots is exactly what one query sees
            self._store(layer, k, v)
            return decode(q, self.keys[layer], self.values[layer], self.positions,
                          self._slot_positions(slots, self.lengths + self.new), window=window)
        # Several tokens may overwrite slots that the first of them still has to see: look before storing.
        padding = torch.arange(T, device=q.device) >= self.new[:, None]
        held = self._slot_positions(slots, self.lengths)
        z = decode(q, torch.cat([self.keys[layer], k], 2), torch.cat([self.values[layer], v], 2), self.positions,
                   torch.cat([held, self.positions.masked_fill(padding, -1)], 1), window=window)
        self._store(layer, k, v)
        return z

    def previous_raw_keys(self, layer: int, k: Tensor) -> Tensor:
        """For each raw key of k (B, K, T, D) the raw key one position before it; remembers the last one."""
        previous = torch.cat([self.last_raw_key[layer][:, :, None], k[:, :, :-1]], dim=2)
        last = (self.new - 1).clamp(min=0)[:, None, None, None].expand(-1, k.shape[1], 1, k.shape[3])
        newest = k.gather(2, last)[:, :, 0]
        self.last_raw_key[layer] = torch.where((self.new > 0)[:, None, None], newest, self.last_raw_key[layer])
        return previous

    @staticmethod
    def _slot_positions(slots: int, lengths: Tensor) -> Tensor:
        """Which position each slot holds when rows have `lengths` (B,) tokens: (B, slots), negative where empty."""
        last = lengths[:, None] - 1
        return last - (last - torch.arange(slots, device=lengths.device)) % slots

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        slots = self.keys[layer].shape[2]
        if k.shape[2] == 1 and not self.ragged:
            row = torch.arange(len(self.lengths), device=k.device)
            self.keys[layer][row, :, self.lengths % slots] = k[:, :, 0]
            self.values[layer][row, :, self.lengths % slots] = v[:, :, 0]
            return
        source = self._slot_positions(slots, self.lengths + self.new) - self.lengths[:, None]   # index into k, < 0: keep
        fresh = (source >= 0)[:, None, :, None]
        index = source.clamp(min=0)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
        self.keys[layer] = torch.where(fresh, k.gather(2, index), self.keys[layer])
        self.values[layer] = torch.where(fresh, v.gather(2, index), self.values[layer])
