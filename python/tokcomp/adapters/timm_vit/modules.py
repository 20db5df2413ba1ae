"""The mixins that turn timm's VisionTransformer, Block and Attention into compressing ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tokcomp.adapters.images import check_images, refuse_symbols
from tokcomp.adapters.swap import Swapped
from tokcomp.adapters.timm_vit import fast
from tokcomp.blocks.attention import attend
from tokcomp.blocks.state import BlockState
from tokcomp.fastpath import Products, has_hooks
from tokcomp.methods.base import Method
from tokcomp_kernels.product_types import unless_emulated, widened

#: Attribute of a feature tensor that carries its tokens' sizes from forward_features to forward_head.
_SIZE_ATTRIBUTE = "_tokcomp_size"


def split_heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, D] of timm's Attention for tokens x [B, N, C]: views of the packed product where it can be."""
    batch, num_tokens, _ = x.shape
    qkv = attn.qkv(x).reshape(batch, num_tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv.unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if q.dtype != v.dtype:  # a norm that stays in float32 under autocast
        q, k = q.to(v.dtype), k.to(v.dtype)
    return q, k, v


def join_heads(attn: Any, out: Tensor, x: Tensor) -> Tensor:
    """What timm's Attention makes of its heads' outputs [B, H, N, D], for its input x [B, N, C]."""
    out = out.transpose(1, 2).reshape(x.shape[0], x.shape[1], attn.num_heads * attn.head_dim)
    if hasattr(attn, "norm"):
        out = attn.norm(out)
    gate = getattr(attn, "gate", None)
    if gate is not None:
        out = out * gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out))


class CompressedAttention(Swapped):
    """timm's Attention that takes sizes into account and leaves evidence in the block's state."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, state: BlockState | None = None
    ) -> Tensor:
        state = _require_state(state, attn_mask, is_causal)
        q, k, v = split_heads(self, x)
        out, state.evidence = attend(
            q,
            k,
            v,
            scale=self.scale,
            size=state.attention_size,
            needs=state.needs,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return join_heads(self, out, x)


class CompressedBlock(Swapped):
    """timm's Block with the tokens reduced between attention and MLP."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, state: BlockState | None = None
    ) -> Tensor:
        state = _require_state(state, attn_mask, is_causal)
        if state.products is not None:
            return fast.run_block(self, x, state, state.products)
        x = self.attention_half(x, state)
        x = state.reduce(x)
        return self.mlp_half(x)

    def attention_half(self, x: Tensor, state: BlockState) -> Tensor:
        """x + attention: the block up to where the tokens are reduced. Leaves the evidence in ``state``."""
        return x + self.drop_path1(self.ls1(self.attn(self.norm1(x), state=state)))

    def mlp_half(self, x: Tensor) -> Tensor:
        """x + MLP: the block once the tokens are reduced."""
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class CompressedModel(Swapped):
    """timm's VisionTransformer that compresses its tokens by ``_tokcomp_method``."""

    _tokcomp_method: Method

    def tokens(self, images: Tensor, sources: list[Tensor | None] | None = None) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, M, C] after the last block, their sizes [B, M]; ``sources`` collects each block's source map."""
        check_images(self.patch_embed, images)
        with unless_emulated(images.device.type):
            return self._tokens(images, sources)

    def _tokens(self, images: Tensor, sources: list[Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
        products = fast.products_of(self, images)
        x = self.embed(images, products)
        if products is None or sources is not None or has_hooks(self.blocks):
            return self._run_blocks(x, products, sources)
        parts = [self._run_blocks(part, products) for part in fast.split(x, products)]
        if len(parts) == 1:
            return parts[0]
        tokens, sizes = zip(*parts, strict=True)
        return torch.cat(tokens), None if sizes[0] is None else torch.cat(sizes)

    def embed(self, images: Tensor, products: Products | None) -> Tensor:
        """Tokens [B, N, C] that enter block 0; ``products`` is what fast.products_of returned for these images."""
        if products is not None and self.patch_embed.proj in products:
            x = fast.embed_patches(self.patch_embed, images, products)
        else:
            with widened(images):
                x = self.patch_embed(images)
        x = self._pos_embed(x)
        self._tokcomp_method.check_tokens(x.shape[1], self.num_prefix_tokens)
        return self.norm_pre(self.patch_drop(x))

    def _run_blocks(
        self, x: Tensor, products: Products | None, sources: list[Tensor | None] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        dtype = x.dtype
        state: BlockState | None = None
        watched = has_hooks(self.blocks)
        for index, block in enumerate(self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, state = checkpoint(self._run_block, block, index, x, state, dtype, products, use_reentrant=False)
            else:
                # A hook may change what leaves a block, so nothing is computed of that beforehand.
                x, state = self._run_block(block, index, x, state, dtype, products, ahead=not watched)
            if sources is not None:
                sources.append(state.source)
        return x.to(dtype), None if state is None else state.size

    def _run_block(
        self,
        block: Any,
        index: int,
        x: Tensor,
        before: BlockState | None,
        dtype: torch.dtype,
        products: Products | None,
        *,
        ahead: bool = False,
    ) -> tuple[Tensor, BlockState]:
        """One block after the one whose state is ``before``; ``ahead``: it may apply the next block's first norm."""
        if products is not None:
            products = products if fast.has_products(block, products) else None
            x = x.to(products.dtype if products is not None else dtype)
        size = None if before is None else before.size
        state = BlockState(self._tokcomp_method, index, x.shape[1], self.num_prefix_tokens, size, products)
        if products is not None and ahead:
            if before is not None:
                state.normalized = before.normalized
            if index + 1 < len(self.blocks) and fast.has_products(self.blocks[index + 1], products):
                state.following = fast.as_norm(self.blocks[index + 1]._modules["norm1"], x)
        with widened(x):
            return block(x, state=state), state

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        refuse_symbols(x)
        refuse_mask(attn_mask, is_causal)
        x, size = self.tokens(x)
        return self.logits(x, size)

    def logits(self, x: Tensor, size: Tensor | None) -> Tensor:
        """What follows the last block: x [B, M, C] and the tokens' sizes [B, M] to logits."""
        with widened(x):
            return self._head(self.norm(x), size)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Normalised tokens [B, M, C] after the last block."""
        refuse_mask(attn_mask, is_causal)
        x, size = self.tokens(x)
        x = self.norm(x)
        if not torch.compiler.is_compiling():
            setattr(x, _SIZE_ATTRIBUTE, size)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of what :meth:`forward_features` returned.

        Raises:
            RuntimeError: this model pools over patch tokens and x does not carry their sizes.
        """
        if self.global_pool in ("avg", "avgmax", "map") and not hasattr(x, _SIZE_ATTRIBUTE):
            raise RuntimeError(
                f"global_pool={self.global_pool!r} needs the tokens' sizes: pass the very tensor that forward_features "
                "returned, or call the model"
            )
        with widened(x):
            return self._head(x, getattr(x, _SIZE_ATTRIBUTE, None), pre_logits)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "a compressed model has no token per position, so it has no intermediate feature maps; use tokcomp.trace "
            "and torch.ops.tokcomp.unmerge, or tokcomp.restore the model first"
        )

    def _head(self, x: Tensor, size: Tensor | None, pre_logits: bool = False) -> Tensor:
        if size is None or self.global_pool not in ("avg", "avgmax", "map"):
            return super().forward_head(x, pre_logits=pre_logits)  # type: ignore[misc]
        if not getattr(self, "pool_include_prefix", False):
            x, size = x[:, self.num_prefix_tokens :], size[:, self.num_prefix_tokens :]
        if self.global_pool == "map":
            pooled = self.attn_pool(x, attn_mask=size.log().to(x.dtype)[:, None, None])
        else:
            weights = (size / size.sum(1, keepdim=True)).to(x.dtype)
            pooled = (x * weights.unsqueeze(-1)).sum(1)
            if self.global_pool == "avgmax":
                pooled = 0.5 * (x.amax(1) + pooled)
        pooled = self.head_drop(self.fc_norm(pooled))
        return pooled if pre_logits else self.head(pooled)


def refuse_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal cannot be used with a compressed model: its tokens are re-ordered")


def _require_state(state: BlockState | None, attn_mask: Tensor | None, is_causal: bool) -> BlockState:
    refuse_mask(attn_mask, is_causal)
    if state is None:
        raise RuntimeError("a block of a compressed model cannot run on its own: call the model, or tokcomp.restore it")
    return state
