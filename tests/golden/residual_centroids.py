# centroids: written by prescore_compile.kernels.triton; do not edit.
# plan: method=peak chunk=128 window=0 sinks=1 keep=0 threshold=0.0 centroids=0 cluster=32
#   clustering=pca_tree routes=12 spread=1.0 share=0.0 group_routes=False residual=True coarse=0
#   seed=0
# stage: attend, the centroids of clusters

import triton
import triton.language as tl


@triton.jit
def centroids(
    key, value, order, rest_key, rest_value, rest_bias, key_b, key_h, key_n, value_b, value_h,
    value_n, kv_heads, places,
):
    # Below 2^31; where no bound is known, a compiler passes 64 bits, and variables of loops would change type.
    kv_heads = tl.cast(kv_heads, tl.int32)
    places = tl.cast(places, tl.int32)
    DIM: tl.constexpr = 64
    VALUE_DIM: tl.constexpr = 64
    CLUSTER: tl.constexpr = 32
    CLUSTERS: tl.constexpr = 2
    program = tl.program_id(0)
    clusters = places // CLUSTER
    blocks = tl.cdiv(clusters, CLUSTERS)
    pair = (program // blocks).to(tl.int64)  # of batch and KV head
    own = program % blocks * CLUSTERS + tl.arange(0, CLUSTERS)
    inside = own < clusters
    place = own[:, None] * CLUSTER + tl.arange(0, CLUSTER)[None, :]
    at = tl.load(order + pair * places + place, mask=inside[:, None], other=-1)
    here = at >= 0
    count = tl.sum(here.to(tl.float32), 1)
    share = 1.0 / tl.maximum(count, 1.0)
    to = pair * clusters + own
    feature = tl.arange(0, 64)
    members = tl.load(
        key + pair // kv_heads * key_b + pair % kv_heads * key_h
        + at.to(tl.int64)[:, :, None] * key_n + feature[None, None, :],
        mask=here[:, :, None] & (feature < DIM)[None, None, :],
        other=0.0,
    )
    mean = tl.sum(members.to(tl.float32), 1) * share[:, None]
    finite = tl.abs(mean) < float("inf")
    finite_key = tl.min(finite.to(tl.int32), 1) != 0
    mean = tl.where(finite, mean, 0.0).to(rest_key.dtype.element_ty)
    wanted = inside[:, None] & (feature < DIM)[None, :]
    tl.store(rest_key + to[:, None] * DIM + feature[None, :], mean, mask=wanted)
    feature = tl.arange(0, 64)
    members = tl.load(
        value + pair // kv_heads * value_b + pair % kv_heads * value_h
        + at.to(tl.int64)[:, :, None] * value_n + feature[None, None, :],
        mask=here[:, :, None] & (feature < VALUE_DIM)[None, None, :],
        other=0.0,
    )
    mean = tl.sum(members.to(tl.float32), 1) * share[:, None]
    finite = tl.abs(mean) < float("inf")
    finite_value = tl.min(finite.to(tl.int32), 1) != 0
    mean = tl.where(finite, mean, 0.0).to(rest_value.dtype.element_ty)
    wanted = inside[:, None] & (feature < VALUE_DIM)[None, :]
    tl.store(rest_value + to[:, None] * VALUE_DIM + feature[None, :], mean, mask=wanted)
    # A mean that is not finite reaches those that attend it by its bias: no other row reads it.
    finite = finite_key & finite_value
    row_logit = tl.where(finite, tl.log(tl.maximum(count, 1.0)), float("nan"))
    tl.store(rest_bias + to, tl.where(count > 0.0, row_logit, float("-inf")), mask=inside)
