"""What a decoder is made of: sizes, and the options in which the families of language models differ."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from jaxrl_llm.models.rotary import Rope

Activation = Literal["silu", "gelu", "gelu_tanh"]
QueryKeyNorm = Literal["head", "full"]
NormPlacement = Literal["pre", "post", "both"]
Remat = Literal["none", "full", "dots"]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and options of a decoder. An option that is off costs nothing.

    `layer_windows` and `layer_ropes` have an entry for each layer: how many tokens a query sees, itself included (None:
    all before it), and the layer's rotary positions (None: none, as in the NoPE layers of SmolLM3). `long_context`
    takes the divisors of LongRoPE for sequences beyond the first training's context, for all tokens of all sequences:
    transformers switches on the longest position in a batch, which changes the keys of a sequence under way.

    `scan_layers` changes no number, but how long a program takes to compile: the layers of each kind are stacked,
    `layers.0.attention.query.kernel [L, D, N]`, and a loop runs over them, so that a program is as large as one
    `period` of layers. It is for accelerators and deep models; a CPU is faster without. `models.stack_layers` and
    `unstack_layers` convert parameters. A gradient through a cache keeps what it needs of each layer, whatever `remat`
    says.

    Raises:
      ValueError: heads do not divide evenly among key/value heads, a head's width is odd, an option has no such value,
        a tuple has not an entry for each layer, or `scan_layers` finds no layers that are alike.
    """

    vocab_size: int
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int | None = None  # width / num_heads if not given
    ffn_width: int = 512
    rope_theta: float = 10_000.0  # of every layer, unless layer_ropes is given
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    attention_bias: bool = False  # on queries, keys and values, as in Qwen2
    attention_out_bias: bool = False
    ffn_bias: bool = False
    activation: Activation = "silu"
    qk_norm: QueryKeyNorm | None = None  # of queries and keys: each head (Qwen3), or all heads together (OLMo 2)
    norm_placement: NormPlacement = "pre"  # of attention and feed-forward; OLMo 2 norms their outputs, Gemma both
    norm_offset: bool = False  # norms multiply by 1 + scale (Gemma)
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # of the scores; head_dim**-0.5 if not given
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    layer_windows: tuple[int | None, ...] | None = None
    layer_ropes: tuple[Rope | None, ...] | None = None
    long_context: bool = False
    num_experts: int = 0  # 0: one feed-forward network a layer
    experts_per_token: int = 2
    expert_width: int | None = None  # ffn_width if not given
    normalize_experts: bool = True  # the weights of a token's experts sum to 1
    dense_layers: tuple[int, ...] = ()  # layers without experts
    remat: Remat = "none"  # a layer is computed again in the backward pass: all of it, or all but products with weights
    scan_layers: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim is None:
            if self.width % self.num_heads:
                raise ValueError(
                    f"width={self.width} must be a multiple of num_heads={self.num_heads}, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.width // self.num_heads)
        if self.head_dim % 2:  # type: ignore[operator]  # set above
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of dimensions")
        self._check_options()
        self._check_layers()

    def _check_options(self) -> None:
        choices: dict[str, tuple[str | None, ...]] = {
            "activation": get_args(Activation),
            "qk_norm": (None, *get_args(QueryKeyNorm)),
            "norm_placement": get_args(NormPlacement),
            "remat": get_args(Remat),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}")
        for name in ("attention_softcap", "logit_softcap", "attention_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be positive; for none, leave it None")
        if self.num_experts and not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must lie between 1 and num_experts={self.num_experts}"
            )

    def _check_layers(self) -> None:
        for name in ("layer_windows", "layer_ropes"):
            entries = getattr(self, name)
            if entries is not None and len(entries) != self.num_layers:
                raise ValueError(f"{name} has {len(entries)} entries, but there are num_layers={self.num_layers}")
        for window in self.layer_windows or ():
            if window is not None and window < 1:
                raise ValueError(f"layer_windows={self.layer_windows}: a window must be at least 1; None sees all")
        for layer in self.dense_layers:
            if not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"dense_layers={self.dense_layers} must name layers below num_layers={self.num_layers}"
                )
        head_dim: int = self.head_dim  # type: ignore[assignment]  # set before
        for rope in self.layer_ropes or ():
            if rope is None:
                continue
            turned = head_dim if rope.rotary_dim is None else rope.rotary_dim
            if turned % 2 or not 0 < turned <= head_dim:
                raise ValueError(f"rotary_dim={turned} must be even, positive and at most head_dim={head_dim}")
            for name in ("divisors", "long_divisors"):
                found = len(getattr(rope, name))
                if found not in (0, turned // 2):
                    raise ValueError(f"{name} has {found} numbers, but {turned} dimensions turn in {turned // 2} pairs")
        if self.scan_layers and self.period == self.num_layers > 1:
            raise ValueError(
                f"scan_layers=True, but no group of layers comes again and again in these num_layers={self.num_layers} "
                "(layer_windows, layer_ropes, dense_layers): leave scan_layers False"
            )

    def window(self, layer: int) -> int | None:
        """How many tokens a query of the layer sees, itself included; None: all before it."""
        return None if self.layer_windows is None else self.layer_windows[layer]

    def rope(self, layer: int) -> Rope | None:
        """Rotary positions of the layer, with `divisors` as `long_context` wants them; None: none."""
        rope = Rope(self.rope_theta) if self.layer_ropes is None else self.layer_ropes[layer]
        if rope is not None and self.long_context and rope.long_divisors:
            return rope._replace(divisors=rope.long_divisors)
        return rope

    @property
    def period(self) -> int:
        """The smallest number of layers that the decoder is a repetition of, each with its window, its rotary
        positions and experts or none."""
        kinds = [(self.window(i), self.rope(i), self.has_experts(i)) for i in range(self.num_layers)]
        sizes = (size for size in range(1, self.num_layers) if self.num_layers % size == 0)
        return next((size for size in sizes if kinds[size:] == kinds[:-size]), self.num_layers)

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's feed-forward network is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_layers
