"""The roofline of decoding (Williams, Waterman and Patterson 2009): what share of the machine's memory bandwidth an engine uses.

To generate a token for one sequence, every weight of the decoder is read once and used once, so that memory, not arithmetic, is
the roof:

    bytes per token = step + once / new tokens + position * mean length + source_position * source length
    share           = tokens/s at batch 1 * bytes per token / bandwidth in bytes/s

with the names of BytesRead, and the mean length of the cache over the steps, prefix + (new tokens - 1) / 2. The bandwidth is that
of the memory that it is served from, a GPU's where it is one. A share above 1 by more than the noise says that the weights were not
read from memory at all: a small model stays in the caches.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BytesRead:
    """What an engine reads to generate for one sequence, in bytes.

    step: weights, for each token. once: weights, once for the whole generation: an encoder's, and those that make the keys and
    values of its output. position: keys and values of one position of the decoder's own text. source_position: those of one
    position of the source that a decoder attends to; 0 without an encoder.
    """

    step: float
    once: float = 0.0
    position: float = 0.0
    source_position: float = 0.0

    def per_token(self, prompt_tokens: int, new_tokens: int) -> float:
        """The mean over a generation. A prompt is the decoder's own prefix, or the source where there is an encoder."""
        prefix = 1 if self.source_position else prompt_tokens
        cache = self.position * (prefix + (new_tokens - 1) / 2) + self.source_position * prompt_tokens
        return self.step + self.once / new_tokens + cache


@dataclass(frozen=True)
class Roofline:
    """Bytes that a token at batch 1 makes the engine read, and the bytes per second that its threads, or its GPU, can read."""

    bytes_per_token: float
    bandwidth_bytes_s: float

    def share(self, tokens_per_s: float) -> float:
        """The share of the bandwidth at that many tokens per second."""
        return tokens_per_s * self.bytes_per_token / self.bandwidth_bytes_s


def cache_position_bytes(layers: int, kv_heads: int, head_dim: int, width: float) -> float:
    """Keys and values of one position in all layers, `width` bytes each."""
    return 2 * layers * kv_heads * head_dim * width
