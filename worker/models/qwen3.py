"""Qwen3, dense: the model as the paper has it, over the tokens of a step.

Pre-norm decoder layers with grouped-query attention, per-head RMSNorm of queries and keys, rotary embeddings and a
SwiGLU feed-forward (Qwen3 Technical Report, arXiv:2505.09388). It knows tokens, not requests: which token belongs to
which sequence is the attention backend's business, through the metadata.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from protocol.model_config import ModelConfig
from worker.attention import AttentionBackend, AttentionMetadata, QueryKeyTransform
from worker.kernels import Ops
from worker.models.rope import cos_sin_table


class Qwen3Layer:
    """One decoder layer. Products that read the same input are stored as one weight: qkv, and gate with up."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        def weight(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        hidden, head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.input_norm = weight(hidden)
        self.qkv_proj = weight(q_size + 2 * kv_size, hidden)
        self.q_norm = weight(head_dim)
        self.k_norm = weight(head_dim)
        self.o_proj = weight(hidden, q_size)
        self.post_attention_norm = weight(hidden)
        self.gate_up_proj = weight(2 * config.intermediate_size, hidden)
        self.down_proj = weight(hidden, config.intermediate_size)
        self._qkv_sizes = [q_size, kv_size, kv_size]

    def checkpoint_layout(self, prefix: str) -> dict[str, Tensor]:
        """Where each tensor of the checkpoint goes: views of the weights above."""
        q, k, v = self.qkv_proj.split(self._qkv_sizes)
        gate, up = self.gate_up_proj.chunk(2)
        return {
            f"{prefix}.input_layernorm.weight": self.input_norm,
            f"{prefix}.self_attn.q_proj.weight": q,
            f"{prefix}.self_attn.k_proj.weight": k,
            f"{prefix}.self_attn.v_proj.weight": v,
            f"{prefix}.self_attn.q_norm.weight": self.q_norm,
            f"{prefix}.self_attn.k_norm.weight": self.k_norm,
            f"{prefix}.self_attn.o_proj.weight": self.o_proj,
            f"{prefix}.post_attention_layernorm.weight": self.post_attention_norm,
            f"{prefix}.mlp.gate_proj.weight": gate,
            f"{prefix}.mlp.up_proj.weight": up,
            f"{prefix}.mlp.down_proj.weight": self.down_proj,
        }


class Qwen3:
    """The decoder stack and its output head."""

    def __init__(
        self, config: ModelConfig, ops: Ops, max_model_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config = config
        self._ops = ops
        self._cos_sin = cos_sin_table(config.rope_theta, config.head_dim, max_model_len, device)
        self.embed_tokens = torch.empty((config.vocab_size, config.hidden_size), device=device, dtype=dtype)
        self.layers = [Qwen3Layer(config, device, dtype) for _ in range(config.num_layers)]
        self.norm = torch.empty(config.hidden_size, device=device, dtype=dtype)
        tied = config.tie_word_embeddings
        self.lm_head = self.embed_tokens if tied else torch.empty_like(self.embed_tokens)

    def checkpoint_layout(self) -> dict[str, Tensor]:
        """Checkpoint tensor name → where it goes. A tied head has no tensor of its own."""
        layout = {"model.embed_tokens.weight": self.embed_tokens, "model.norm.weight": self.norm}
        for index, layer in enumerate(self.layers):
            layout |= layer.checkpoint_layout(f"model.layers.{index}")
        if not self.config.tie_word_embeddings:
            layout["lm_head.weight"] = self.lm_head
        return layout

    def forward(
        self, token_ids: Tensor, kv_cache: Tensor, attention: AttentionBackend, metadata: AttentionMetadata
    ) -> Tensor:
        """Runs the step's tokens through the layers, writing their keys and values to the cache.

        Args:
            token_ids: [tokens] int32.
            kv_cache: [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim], keys then values.
            attention: `attention.prepare(metadata)` was called.

        Returns:
            [tokens, hidden_size], the residual stream after the last layer.
        """
        residual = self.embed(token_ids)
        self.run_layers(residual, kv_cache, attention, metadata, 0, len(self.layers))
        return residual

    def embed(self, token_ids: Tensor) -> Tensor:
        """[tokens] int32 → [tokens, hidden_size], the residual stream before the first layer."""
        return embedding(token_ids, self.embed_tokens)

    def run_layers(
        self,
        residual: Tensor,
        kv_cache: Tensor,
        attention: AttentionBackend,
        metadata: AttentionMetadata,
        first: int,
        count: int,
    ) -> None:
        """Takes the residual stream, in place, through `count` layers from layer `first` on. The rest as `forward`."""
        ops, eps = self._ops, self.config.rms_norm_eps
        for layer, cache in zip(self.layers[first : first + count], kv_cache[first : first + count], strict=True):
            qkv = ops.norm_linear(residual, layer.input_norm, eps, layer.qkv_proj)
            heads = QueryKeyTransform(layer.q_norm, layer.k_norm, eps, self._cos_sin)
            attended = attention.attend(qkv, heads, cache[0], cache[1], metadata)
            ops.linear_add(attended.flatten(1), layer.o_proj, residual)
            activated = ops.norm_linear_silu_mul(residual, layer.post_attention_norm, eps, layer.gate_up_proj)
            ops.linear_add(activated, layer.down_proj, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] of the residual stream → [rows, vocab_size]."""
        return self._ops.norm_linear(hidden, self.norm, self.config.rms_norm_eps, self.lm_head)
