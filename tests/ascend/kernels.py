"""Reference kernels for the operators of torch_npu and ATB, by their documents, for the chip they run on.

Each one refuses what the documents refuse on that chip (types, layouts, contiguity, formats, which lengths lie on the
host and which on the device, shapes of masks, sizes of blocks), with `Refused`, and computes the rest in float32.
Sources: the docstrings of the torch-npu 2.13 wheel, op-plugin's and ascend-transformer-boost's parameter checks. The
kernels get CPU tensors. Tensors of the device have the attribute `device_format`. Nothing here knows atb_pllava.
"""

from collections.abc import Callable
from typing import Any

ND = 2
FRACTAL_NZ = 29
A2 = (*range(220, 226), *range(250, 256))
P310 = tuple(range(200, 206))


class Refused(RuntimeError):
    """What the device would not accept."""


def need(condition: bool, text: str) -> None:
    if not condition:
        raise Refused(text)


def for_soc(torch: Any, soc: int) -> dict[str, Callable[..., Any]]:
    """Kernels by the name of their operator."""
    need(soc in (*A2, *P310), f"SoC version {soc} is not modelled")
    rules = Rules(torch, soc in P310)
    return {
        "npu::npu_rms_norm": rules.rms_norm,
        "npu::npu_add_rms_norm": rules.add_rms_norm,
        "npu::npu_apply_rotary_pos_emb": rules.apply_rotary_pos_emb,
        "npu::npu_rotary_mul": rules.rotary_mul,
        "npu::npu_swiglu": rules.swiglu,
        "npu::npu_fast_gelu": rules.fast_gelu,
        "npu::npu_weight_quant_batchmatmul": rules.weight_quant_batchmatmul,
        "npu::npu_fused_infer_attention_score": rules.fused_infer_attention,
        "npu::npu_fused_infer_attention_score.out": rules.fused_infer_attention_out,
        "npu::_npu_fused_infer_attention_score_get_max_workspace": rules.fused_workspace,
        "npu::_npu_fused_infer_attention_score_infer_output": rules.fused_output,
        "npu::npu_format_cast": rules.format_cast,
        "atb::_npu_reshape_and_cache": rules.reshape_and_cache,
        "atb::_npu_paged_attention": rules.paged_attention,
        "atb::_npu_flash_attention": rules.flash_attention,
        "atb::_npu_flash_attention_v3": rules.flash_attention_v3,
        "atb::_npu_flash_attention_unpad": rules.flash_attention_unpad,
        "atb::_npu_paged_attention_splitfuse": rules.paged_attention_splitfuse,
        "atb::_npu_paged_attention_splitfuse_v2": rules.paged_attention_splitfuse_v2,
    }


def guards(torch: Any, soc: int) -> dict[str, Callable[..., None]]:
    """What the device refuses of torch's own operators, by their name, without overload."""
    limited = {"_adaptive_avg_pool3d", "adaptive_avg_pool3d", "avg_pool3d"} | ({"conv3d"} if soc in P310 else set())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise Refused("3-D pooling is limited to an output of 1x1x1, or not there, on some chips and versions of CANN")

    def cube(*args: Any, **kwargs: Any) -> None:
        kinds = {x.dtype for x in args if isinstance(x, torch.Tensor)}
        need(kinds == {torch.float16}, f"the matrix unit of 310P multiplies float16, got {kinds}")

    products = ("mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "convolution", "_convolution", "conv2d")
    return {**dict.fromkeys(limited, refuse), **(dict.fromkeys(products, cube) if soc in P310 else {})}


class Rules:
    """The kernels of one chip: 310P, or 910B (Atlas A2)."""

    def __init__(self, torch: Any, is_310p: bool) -> None:
        self.torch = torch
        self.is_310p = is_310p
        self.half = {torch.float16} if is_310p else {torch.float16, torch.bfloat16}

    # Checks.

    def on_device(self, name: str, *tensors: Any) -> None:
        for x in tensors:
            need(hasattr(x, "device_format"), f"{name} must be on the NPU")

    def on_host(self, name: str, x: Any) -> None:
        need(not hasattr(x, "device_format"), f"{name} must be on the host")
        need(x.dtype == self.torch.int32 and x.dim() == 1, f"{name} must be a list of int32, got {x.dtype}")

    def lengths_on_device(self, name: str, x: Any) -> None:
        self.on_device(name, x)
        need(x.dtype == self.torch.int32 and x.dim() == 1, f"{name} must be int32 [B], got {x.dtype}")

    def kinds(self, what: str, allowed: set[Any], *tensors: Any) -> None:
        found = {x.dtype for x in tensors}
        need(len(found) == 1 and found <= allowed, f"{what}: types {found}, allowed is one of {allowed}")

    def only_a2(self, name: str) -> None:
        need(not self.is_310p, f"{name} does not exist on 310P")

    def only_310p(self, name: str) -> None:
        need(self.is_310p, f"{name} is modelled for 310P only")

    # Element-wise and linear.

    def rms_norm(self, input: Any, gamma: Any, epsilon: float = 1e-6) -> Any:
        torch = self.torch
        allowed = {torch.float16, torch.float32} if self.is_310p else {*self.half, torch.float32}
        self.on_device("npu_rms_norm: input and gamma", input, gamma)
        self.kinds("npu_rms_norm", allowed, input, gamma)
        need(input.numel() > 0, "npu_rms_norm of nothing")
        need(gamma.shape == input.shape[-1:], f"gamma is {tuple(gamma.shape)} for {tuple(input.shape)}")
        need(input.shape[-1] * input.element_size() >= 32, "the last axis must have 32 bytes")
        wide = input.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        return (wide * rstd * gamma.float()).to(input.dtype), rstd

    def add_rms_norm(self, x1: Any, x2: Any, gamma: Any, epsilon: float = 1e-6) -> Any:
        """aclnnAddRmsNorm. The kernel rounds the sum before the norm (add_rms_norm_merge_n.h)."""
        torch = self.torch
        self.on_device("npu_add_rms_norm: x1, x2 and gamma", x1, x2, gamma)
        self.kinds("npu_add_rms_norm", {*self.half, torch.float32}, x1, x2, gamma)
        need(x1.shape == x2.shape and 1 <= x1.dim() <= 8, f"x1 is {tuple(x1.shape)}, x2 {tuple(x2.shape)}")
        need(x1.numel() > 0, "npu_add_rms_norm of nothing")
        need(gamma.shape == x1.shape[-1:], f"gamma is {tuple(gamma.shape)} for {tuple(x1.shape)}")
        need(epsilon >= 0, "epsilon must not be negative")
        total = x1 + x2
        wide = total.float()
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        normed = (wide * rstd).to(x1.dtype) * gamma
        return normed, rstd.fill_(float("nan")) if self.is_310p else rstd, total

    def apply_rotary_pos_emb(
        self, query: Any, key: Any, cos: Any, sin: Any, layout: str = "BSND", rotary_mode: str = "half"
    ) -> Any:
        """In place, whatever the schema says. float16 is computed in float16, bfloat16 in float32, as the kernel does.

        Sources: torch_npu's docstring, aclnnApplyRotaryPosEmb's document for the unified buffer, the kernel.
        """
        torch = self.torch
        tensors = (query, key, cos, sin)
        self.on_device("npu_apply_rotary_pos_emb: inputs", *tensors)
        self.kinds("npu_apply_rotary_pos_emb", {*self.half, torch.float32}, *tensors)
        need(layout in ("BSND", "BSH") and rotary_mode == "half", "only layout BSND and mode half are modelled")
        need(all(x.dim() == 4 and x.numel() > 0 for x in tensors), "inputs must be 4-D and not empty")
        need(len({x.shape[:2] for x in tensors}) == 1, f"B and S differ: {[tuple(x.shape) for x in tensors]}")
        need(cos.shape == sin.shape and cos.shape[2] == 1, f"cos is {tuple(cos.shape)}, its third axis must be 1")
        dim = query.shape[3]
        need(dim in (64, 128) and {x.shape[3] for x in tensors} == {dim}, f"D is {dim}; it must be 64 or 128")
        heads = query.shape[2] + key.shape[2]
        need(heads <= 255, f"{heads} heads; the operator takes 255")
        is_cast = query.dtype == torch.bfloat16
        size = 4 if is_cast else query.element_size()
        used = 5 * heads * dim * size + 4 * dim * query.element_size() + is_cast * 2 * dim * 4
        room = 261888 if self.is_310p else 196352
        need(used <= room, f"the heads of a token take {used} bytes of a unified buffer of {room}")
        computed = torch.float32 if is_cast else query.dtype
        for x in (query, key):
            first, second = x.chunk(2, -1)
            turned = torch.cat((-second, first), -1).to(computed) * sin.to(computed)
            x.copy_(turned + x.to(computed) * cos.to(computed))
        return query, key

    def fast_gelu(self, input: Any) -> Any:
        """aclnnFastGelu: x / (1 + exp(-1.702 x)). Its document excludes 310P."""
        self.only_a2("npu_fast_gelu")
        self.on_device("npu_fast_gelu: input", input)
        self.kinds("npu_fast_gelu", {*self.half, self.torch.float32}, input)
        wide = input.float()
        return (wide / (1 + (-1.702 * wide).exp())).to(input.dtype)

    def rotary_mul(self, input: Any, r1: Any, r2: Any, rotary_mode: str = "half", rotate: Any = None) -> Any:
        torch = self.torch
        self.only_a2("npu_rotary_mul without jit_compile")
        self.on_device("npu_rotary_mul: inputs", input, r1, r2)
        self.kinds("npu_rotary_mul", {*self.half, torch.float32}, input, r1, r2)
        need(input.dim() == 4 and r1.shape == r2.shape, "npu_rotary_mul: input must be 4-D, r1 and r2 alike")
        batch, length, heads, dim = input.shape
        need(tuple(r1.shape) == (1, length, 1, dim), f"r1 is {tuple(r1.shape)}; layout BSND wants 1S1D")
        need(dim % 2 == 0 and dim < 896 and batch < 1000 and heads < 1000, "npu_rotary_mul: D < 896, B, N < 1000")
        need(rotary_mode == "half" and rotate is None, "npu_rotary_mul: only mode half is modelled")
        first, second = input.float().chunk(2, -1)
        return (input.float() * r1.float() + torch.cat((-second, first), -1) * r2.float()).to(input.dtype)

    def swiglu(self, input: Any, dim: int = -1) -> Any:
        self.only_a2("npu_swiglu")
        self.on_device("npu_swiglu: input", input)
        self.kinds("npu_swiglu", {*self.half, self.torch.float32}, input)
        need(input.is_contiguous() and input.shape[dim] % 2 == 0, "npu_swiglu: contiguous, even axis")
        gate, up = input.float().chunk(2, dim)
        return (gate * self.torch.sigmoid(gate) * up).to(input.dtype)

    def weight_quant_batchmatmul(
        self,
        x: Any,
        weight: Any,
        antiquant_scale: Any,
        antiquant_offset: Any = None,
        quant_scale: Any = None,
        quant_offset: Any = None,
        bias: Any = None,
        antiquant_group_size: int = 0,
        inner_precise: int = 0,
        weight_dtype: Any = None,
    ) -> Any:
        torch = self.torch
        scale = antiquant_scale
        offset = antiquant_offset
        group = antiquant_group_size
        self.on_device("npu_weight_quant_batchmatmul: x, weight and scale", x, weight, scale)
        self.kinds("x and antiquant_scale", self.half, x, scale)
        need(weight.dtype == torch.int8 and weight.device_format == ND, "weight must be int8 in format ND")
        need(weight.is_contiguous() or weight.t().is_contiguous(), "weight must be contiguous or a transpose of that")
        need(x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[0], "x is [M, K], weight [K, N]")
        columns, rows = weight.shape
        need(1 <= columns <= 65535 and 1 <= rows <= 65535 and x.shape[0] > 0, "K and N are 1 to 65535, M is not 0")
        if group:
            need(not self.is_310p, "310P has no antiquant_group_size")
            need(group % 32 == 0 and 32 <= group <= columns - 1, f"antiquant_group_size {group} with K {columns}")
            need(tuple(scale.shape) == (-(-columns // group), rows), f"scale is {tuple(scale.shape)} for groups")
            scale = scale.repeat_interleave(group, 0)[:columns]
        else:
            need(tuple(scale.shape) in ((rows,), (1, rows)), f"antiquant_scale is {tuple(scale.shape)} for N {rows}")
        if offset is not None:
            self.on_device("antiquant_offset", offset)
            self.kinds("antiquant_offset as antiquant_scale", self.half, offset, antiquant_scale)
            need(offset.shape == antiquant_scale.shape, "antiquant_offset must have antiquant_scale's shape")
            offset = offset.repeat_interleave(group, 0)[:columns] if group else offset
        need(quant_scale is None and quant_offset is None and inner_precise == 0, "not modelled")
        real = weight.to(x.dtype) if offset is None else weight.to(x.dtype) + offset
        out = x.float() @ (real * scale).float()
        if bias is not None:
            self.on_device("bias", bias)
            wanted = torch.float32 if x.dtype == torch.bfloat16 else torch.float16
            need(bias.dtype == wanted and tuple(bias.shape) in ((rows,), (1, rows)), f"bias must be {wanted} [N]")
            out = out + bias.float()
        return out.to(x.dtype)

    def format_cast(self, input: Any, acl_format: int, customize_dtype: Any = None, input_dtype: Any = None) -> Any:
        self.on_device("npu_format_cast: input", input)
        need(acl_format == FRACTAL_NZ, f"format {acl_format} is not modelled")
        need(input.dtype == self.torch.float16 and input.is_contiguous(), "NZ is for contiguous float16")
        need(input.dim() == 4 and input.shape[3] == 16, "NZ is modelled for [1, S / 16, S, 16]")
        cast = input.clone()
        cast.device_format = FRACTAL_NZ
        return cast

    # The KV cache.

    def cache_kind(self, key_cache: Any, value_cache: Any, heads: int, dim: int) -> int:
        """Block size of a valid cache."""
        self.on_device("the cache", key_cache, value_cache)
        self.kinds("the cache", self.half, key_cache, value_cache)
        need(key_cache.shape == value_cache.shape and key_cache.dim() == 4, "the caches must be 4-D and alike")
        need(key_cache.is_contiguous() and value_cache.is_contiguous(), "the caches must be contiguous")
        formats = {key_cache.device_format, value_cache.device_format}
        if self.is_310p:
            need(formats == {FRACTAL_NZ}, f"310P: caches must be stored as FRACTAL_NZ, got formats {formats}")
            _, width, block, sixteen = key_cache.shape
            need(sixteen == 16 and width * 16 == heads * dim, f"310P: cache {tuple(key_cache.shape)}")
        else:
            need(formats == {ND}, f"910B: caches must be ND, got formats {formats}")
            block = key_cache.shape[1]
            need(tuple(key_cache.shape[2:]) == (heads, dim), f"910B: cache {tuple(key_cache.shape)}")
        need(block % 16 == 0, f"block size {block} is no multiple of 16")
        return int(block)

    def tokens(self, cache: Any, table: Any, count: int, heads: int, dim: int) -> Any:
        """[count, heads, dim] float32 of a sequence, from its blocks."""
        block = cache.shape[2] if self.is_310p else cache.shape[1]
        blocks = table[: -(-count // block)].tolist()
        need(all(0 <= b < cache.shape[0] for b in blocks), f"block numbers {blocks} of {cache.shape[0]}")
        picked = cache[blocks]  # [n, block, heads, dim], NZ: [n, heads * dim / 16, block, 16]
        if self.is_310p:
            picked = picked.transpose(1, 2)
        return picked.reshape(-1, heads, dim)[:count].float()

    def reshape_and_cache(self, key: Any, value: Any, key_cache: Any, value_cache: Any, slot_indices: Any) -> None:
        self.on_device("key, value and slot_indices", key, value, slot_indices)
        need(key.dim() == 3 and key.shape == value.shape, "key and value are [T, heads, dim]")
        block = self.cache_kind(key_cache, value_cache, *key.shape[1:])
        self.kinds("key, value and cache", self.half, key, value, key_cache)
        need(slot_indices.dtype == self.torch.int32, f"slot_indices must be int32, got {slot_indices.dtype}")
        need(tuple(slot_indices.shape) == (len(key),), "slot_indices must have one slot for each token")
        stored = [(i, slot) for i, slot in enumerate(slot_indices.tolist()) if slot >= 0]  # below 0: skipped
        need(all(slot < key_cache.shape[0] * block for _, slot in stored), "a slot lies behind the cache")
        need(len({slot for _, slot in stored}) == len(stored), "two tokens for one slot")
        for cache, new in ((key_cache, key), (value_cache, value)):
            for i, slot in stored:
                if self.is_310p:
                    cache[slot // block, :, slot % block] = new[i].reshape(-1, 16)
                else:
                    cache[slot // block, slot % block] = new[i]

    def attend(self, query: Any, keys: Any, values: Any, scale: float, mask: Any = None) -> Any:
        """query [L, H, D], keys, values [C, K, D] float32. The mask [L, C] is added to the scores."""
        groups = query.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
        scores = self.torch.einsum("lhd,chd->hlc", query.float(), keys) * scale
        scores = scores if mask is None else scores + mask
        return self.torch.einsum("hlc,chd->lhd", scores.softmax(-1), values)

    def causal(self, length: int, context: int, cached: int | None = None) -> Any:
        """0 and -inf [length, context]: aligned at the last query and key, or behind `cached` keys."""
        cached = context - length if cached is None else cached
        hidden = self.torch.ones(length, context).triu(cached + 1).bool()
        return self.torch.zeros(length, context).masked_fill(hidden, float("-inf"))

    # 910B: fused attention.

    def fused_infer_attention(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        out = self.torch.zeros_like(query)
        self._fused(out, query, key, value, **options)
        return out, self.torch.zeros(1)

    def fused_infer_attention_out(
        self, query: Any, key: Any, value: Any, *, workspace: Any = None, out: Any, **options: Any
    ) -> Any:
        need(workspace is not None, "a captured operator needs a workspace of its own")
        need(out[0].shape == query.shape and out[0].is_contiguous(), "out must be like the query")
        out[0].zero_()
        self._fused(out[0], query, key, value, **options)
        return out[0], out[1]

    def fused_workspace(self, query: Any, key: Any, value: Any, **options: Any) -> Any:
        return self.torch.empty(1024, dtype=self.torch.uint8)

    def fused_output(self, query: Any, value: Any, **options: Any) -> Any:
        return self.torch.empty_like(query), self.torch.zeros(1)

    def _fused(
        self,
        out: Any,
        query: Any,
        key: Any,
        value: Any,
        *,
        atten_mask: Any = None,
        actual_seq_lengths: Any = None,
        actual_seq_lengths_kv: Any = None,
        block_table: Any = None,
        num_heads: int = 1,
        scale: float = 1.0,
        pre_tokens: int = 2**31 - 1,
        next_tokens: int = 2**31 - 1,
        input_layout: str = "BSH",
        num_key_value_heads: int = 0,
        sparse_mode: int = 0,
        inner_precise: int = 0,
        block_size: int = 0,
        **others: Any,
    ) -> None:
        torch = self.torch
        self.only_a2("npu_fused_infer_attention_score")
        need(all(v is None or v in (0, False) for v in others.values()), f"{sorted(others)} are not modelled")
        self.on_device("query, key and value", query, key, value)
        self.kinds("query, key and value", self.half, query, key, value)
        need(all(x.is_contiguous() and x.device_format == ND for x in (query, key, value)), "q, k, v: contiguous, ND")
        need(input_layout == "BSH" and query.dim() == 3, "only layout BSH is modelled: query [B, S, H]")
        batch, length, width = query.shape
        heads = num_heads
        kv_heads = num_key_value_heads or num_heads
        need(width % heads == 0 and heads % kv_heads == 0 and heads // kv_heads <= 64, f"{heads} heads of {width}")
        dim = width // heads
        need(dim <= 512 and dim % 16 == 0 and width < 65535 and heads <= 256, f"head dimension {dim}, width {width}")
        need(key.shape == value.shape and key.dim() == 3 and key.shape[2] == kv_heads * dim, f"key {tuple(key.shape)}")
        paged = block_table is not None
        if paged:
            contexts = self._check_paged(key, block_table, block_size, actual_seq_lengths_kv, batch, length)
        else:
            need(len(key) == batch, "keys of another batch")
            contexts = list(actual_seq_lengths_kv or [key.shape[1]] * batch)
        lengths = [length] * batch if length == 1 else list(actual_seq_lengths or [length] * batch)
        need(len(lengths) == batch == len(contexts) and max(lengths) <= length, f"lengths {lengths}, {contexts}")
        self._check_mask(atten_mask, sparse_mode, length)
        cached = {2: 0, 3: None}.get(sparse_mode)  # left-up and right-down causal
        for b, (rows, context) in enumerate(zip(lengths, contexts, strict=True)):
            if context == 0:
                continue
            if paged:
                keys, values = (self._paged_rows(x, block_table[b], context) for x in (key, value))
            else:
                keys = key[b, :context]
                values = value[b, :context]
            keys, values = (x.float().reshape(context, kv_heads, dim) for x in (keys, values))
            mask = self.causal(rows, context, cached) if sparse_mode and length > 1 else None
            attended = self.attend(query[b, :rows].reshape(rows, heads, dim), keys, values, scale, mask)
            out[b, :rows] = attended.reshape(rows, width).to(torch.float32).to(query.dtype)

    def _check_paged(self, key: Any, table: Any, block_size: int, contexts: Any, batch: int, length: int) -> list[int]:
        self.on_device("block_table", table)
        need(table.dtype == self.torch.int32 and table.dim() == 2, f"block_table must be int32 2-D, got {table.dtype}")
        need(table.is_contiguous() and len(table) == batch, f"block_table {tuple(table.shape)} for batch {batch}")
        need(contexts is not None and len(contexts) == batch, "a paged cache needs actual_seq_lengths_kv")
        need(block_size == key.shape[1], f"block_size {block_size} for a cache of {key.shape[1]}")
        step = 16 if length == 1 else 128
        need(block_size % step == 0 and step <= block_size <= 512, f"block_size {block_size} with {length} rows")
        counts = [-(-c // block_size) for c in contexts]
        need(min(contexts) >= 0 and max(counts) <= table.shape[1], "block_table has too few columns")
        need(len(key) >= sum(counts), "the cache has fewer blocks than its sequences")
        need(key.numel() < 2**31, "the cache's elements are counted in 32 bits")
        return list(contexts)

    def _paged_rows(self, cache: Any, table: Any, context: int) -> Any:
        blocks = table[: -(-context // cache.shape[1])].tolist()
        need(all(0 <= b < len(cache) for b in blocks), f"block numbers {blocks} of {len(cache)}")
        return cache[blocks].flatten(0, 1)[:context]

    def _check_mask(self, mask: Any, sparse_mode: int, length: int) -> None:
        torch = self.torch
        if length == 1 or sparse_mode == 0:
            need(mask is None, "a mask is modelled for sparse_mode 2 and 3 and more than one row")
            return
        need(sparse_mode in (2, 3), f"sparse_mode {sparse_mode} is not modelled")
        need(mask is not None, f"sparse_mode {sparse_mode} needs a mask")
        self.on_device("atten_mask", mask)
        need(mask.dtype in (torch.bool, torch.int8, torch.uint8), f"atten_mask must be bool or int8, got {mask.dtype}")
        need(mask.shape[-2:] == (2048, 2048) and mask.is_contiguous(), f"atten_mask {tuple(mask.shape)}")
        hidden = torch.ones(2048, 2048).triu(1).bool()
        need(torch.equal(mask.bool(), hidden), "1 hides, and hides everything above the diagonal")

    # ATB.

    def _check_heads(self, query: Any, num_heads: int, num_kv_heads: int, out: Any) -> int:
        """The head dimension."""
        self.on_device("query and out", query, out)
        self.kinds("query and out", self.half, query, out)
        need(len(query) > 0, "attention of nothing")
        need(query.dim() == 3 and query.shape[1] == num_heads, f"query {tuple(query.shape)} of {num_heads} heads")
        need(out.shape == query.shape and out.is_contiguous(), "out must be contiguous and like the query")
        need(num_kv_heads > 0 and num_heads % num_kv_heads == 0, f"{num_heads} heads, {num_kv_heads} KV heads")
        dim = int(query.shape[2])
        need(0 < dim <= 256 and (dim % 16 == 0 or not self.is_310p), f"head dimension {dim}")
        return dim

    def _check_table(self, table: Any, batch: int) -> None:
        self.on_device("block_table", table)
        need(table.dtype == self.torch.int32 and table.dim() == 2, f"block_table must be int32 2-D, got {table.dtype}")
        need(len(table) == batch, f"block_table {tuple(table.shape)} for batch {batch}")

    def paged_attention(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        num_kv_heads: int,
        num_heads: int,
        scale_value: float,
        block_table: Any,
        context_lens: Any,
        out: Any,
        workspace: Any = None,
    ) -> None:
        dim = self._check_heads(query, num_heads, num_kv_heads, out)
        block = self.cache_kind(key_cache, value_cache, num_kv_heads, dim)
        need(block <= 128 and block * dim <= 128 * 128, f"block size {block}, head dimension {dim}")
        self._check_table(block_table, len(query))
        if self.is_310p:
            self.lengths_on_device("310P: context_lens", context_lens)
            need(len(query) <= 2048, "batch over 2048")
        else:
            self.on_host("910B: context_lens", context_lens)
        need(tuple(context_lens.shape) == (len(query),) and int(context_lens.min()) > 0, f"context_lens {context_lens}")
        for b, context in enumerate(context_lens.tolist()):
            keys, values = (
                self.tokens(x, block_table[b], context, num_kv_heads, dim) for x in (key_cache, value_cache)
            )
            out[b] = self.attend(query[b][None], keys, values, scale_value)[0].to(out.dtype)

    def _check_packed(
        self, query: Any, key: Any, value: Any, seq_len: Any, num_heads: int, num_kv_heads: int, out: Any
    ) -> list[int]:
        """Lengths of packed sequences of queries and keys."""
        dim = self._check_heads(query, num_heads, num_kv_heads, out)
        self.on_device("key and value", key, value)
        self.kinds("query, key and value", self.half, query, key, value)
        wanted = (len(query), num_kv_heads, dim)
        need(tuple(key.shape) == tuple(value.shape) == wanted, f"key is {tuple(key.shape)}, not {wanted}")
        self.on_host("seq_len", seq_len)
        lengths = seq_len.tolist()
        need(0 < len(lengths) <= 2000 and min(lengths) > 0, f"seq_len {lengths}")
        need(sum(lengths) == len(query), f"sequences of {sum(lengths)} rows in {len(query)}")
        need(not self.is_310p or len(query) % 16 == 0, f"310P: {len(query)} rows are no multiple of 16")
        return lengths

    def _attend_packed(
        self, query: Any, key: Any, value: Any, lengths: list[int], scale: float, mask_of: Callable[..., Any], out: Any
    ) -> None:
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            part = self.attend(query[rows], key[rows].float(), value[rows].float(), scale, mask_of(length))
            out[rows] = part.to(out.dtype)
            start += length

    def flash_attention_unpad(
        self,
        query: Any,
        key: Any,
        value: Any,
        seq_len: Any,
        scale_value: float,
        num_heads: int,
        num_kv_heads: int,
        out: Any,
    ) -> None:
        lengths = self._check_packed(query, key, value, seq_len, num_heads, num_kv_heads, out)
        self._attend_packed(query, key, value, lengths, scale_value, lambda length: None, out)

    def flash_attention(
        self,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        seq_len: Any,
        scale_value: float,
        num_heads: int,
        num_kv_heads: int,
        out: Any,
    ) -> None:
        self.only_310p("_npu_flash_attention")
        lengths = self._check_packed(query, key, value, seq_len, num_heads, num_kv_heads, out)
        full = self._from_nz("mask", mask)
        need(full.shape[0] == full.shape[1] >= max(lengths), f"mask {tuple(full.shape)} for {max(lengths)} tokens")
        self._attend_packed(query, key, value, lengths, scale_value, lambda n: full[:n, :n].float(), out)

    def flash_attention_v3(
        self,
        query: Any,
        key: Any,
        value: Any,
        mask: Any,
        seq_len: Any,
        scale_value: float,
        num_heads: int,
        num_kv_heads: int,
        mask_type: Any = 3,
        *,
        out: Any,
    ) -> None:
        self.only_310p("_npu_flash_attention_v3")
        lengths = self._check_packed(query, key, value, seq_len, num_heads, num_kv_heads, out)
        need(mask_type == 3, "only MASK_TYPE_NORM_COMPRESS is accepted")
        need(tuple(mask.shape) in ((1, 128, 2048, 16), (1, 8, 128, 16)), f"mask {tuple(mask.shape)}")
        full = self._from_nz("mask", mask)
        need(self.torch.equal(full.float(), self.causal(*full.shape)), "the mask is -inf above the diagonal")
        self._attend_packed(query, key, value, lengths, scale_value, lambda n: self.causal(n, n), out)

    def _from_nz(self, name: str, mask: Any) -> Any:
        """[rows, columns] of fractals [1, columns / 16, rows, 16]."""
        self.on_device(name, mask)
        need(mask.dtype == self.torch.float16 and mask.device_format == FRACTAL_NZ, f"{name} must be float16 in NZ")
        need(mask.dim() == 4 and mask.shape[0] == 1 and mask.shape[3] == 16, f"{name} {tuple(mask.shape)}")
        need(mask.shape[2] % 16 == 0, f"{name}: rows must be a multiple of 16")
        return mask[0].transpose(0, 1).flatten(1)

    def _splitfuse(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        block_table: Any,
        context_lens: Any,
        seq_len: Any,
        num_kv_heads: int,
        num_heads: int,
        scale_value: float,
        out: Any,
        mask_of: Callable[[int, int, int], Any],
    ) -> None:
        dim = self._check_heads(query, num_heads, num_kv_heads, out)
        block = self.cache_kind(key_cache, value_cache, num_kv_heads, dim)
        need(block <= 128 and block * dim <= 128 * 128, f"block size {block}, head dimension {dim}")
        self.on_host("seq_len", seq_len)
        self.lengths_on_device("context_lens", context_lens)
        self._check_table(block_table, len(seq_len))
        lengths = seq_len.tolist()
        contexts = context_lens.tolist()
        need(len(contexts) == len(lengths) and sum(lengths) == len(query), f"lengths {lengths}, {contexts}")
        start = 0
        for b, (length, context) in enumerate(zip(lengths, contexts, strict=True)):
            need(0 < length <= context, f"{length} new tokens of {context}")
            keys, values = (
                self.tokens(x, block_table[b], context, num_kv_heads, dim) for x in (key_cache, value_cache)
            )
            rows = slice(start, start + length)
            mask = mask_of(start, length, context)
            out[rows] = self.attend(query[rows], keys, values, scale_value, mask).to(out.dtype)
            start += length

    def paged_attention_splitfuse(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        block_table: Any,
        context_lens: Any,
        mask: Any,
        seq_len: Any,
        num_kv_heads: int,
        num_heads: int,
        scale_value: float,
        out: Any,
    ) -> None:
        self.only_310p("_npu_paged_attention_splitfuse")
        full = self._from_nz("mask", mask)
        need(len(full) == -(-len(query) // 16) * 16, f"the mask has {len(full)} rows for {len(query)} queries")
        need(full.shape[1] >= int(context_lens.max()), f"the mask has {full.shape[1]} columns")
        self._splitfuse(
            query,
            key_cache,
            value_cache,
            block_table,
            context_lens,
            seq_len,
            num_kv_heads,
            num_heads,
            scale_value,
            out,
            lambda start, n, context: full[start : start + n, :context].float(),
        )

    def paged_attention_splitfuse_v2(
        self,
        query: Any,
        key_cache: Any,
        value_cache: Any,
        block_table: Any,
        context_lens: Any,
        mask: Any,
        seq_len: Any,
        num_kv_heads: int,
        num_heads: int,
        scale_value: float,
        mask_type: Any = 5,
        *,
        out: Any,
    ) -> None:
        torch = self.torch
        self.only_310p("_npu_paged_attention_splitfuse_v2")
        self.on_device("mask", mask)
        need(mask_type == 5, "only the compressed mask of paged attention is accepted")
        need(mask.dtype == torch.float16 and mask.device_format == ND, "mask must be float16 in ND")
        wanted = torch.ones(2048, 2048).triu(1) * -10000.0
        need(tuple(mask.shape) == (2048, 2048) and torch.equal(mask.float(), wanted), "mask: -10000 above the diagonal")
        self._splitfuse(
            query,
            key_cache,
            value_cache,
            block_table,
            context_lens,
            seq_len,
            num_kv_heads,
            num_heads,
            scale_value,
            out,
            lambda start, n, context: self.causal(n, context),
        )
