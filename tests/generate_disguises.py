"""Attention that is not the attention it looks like: right to rewrite or not, the result must be right."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from generate import SIZES
from generate_lookalikes import numerics


# Seen logits, written tensors.
@numerics
def logits_returned(w, q, k, v, m, _):
    s = w.logits(q, k, m)
    return w.mix(w.weights(s), v), s


@numerics
def logits_used_twice(w, q, k, v, m, _):
    s = w.logits(q, k, m)
    return w.mix(w.weights(s), v) + w.mix(w.weights(s * 2), v)


@numerics
def logits_written_after(w, q, k, v, m, _):
    s = w.scaled(w.raw(q, k))
    p = w.weights(s)
    s.add_(1.0)
    return w.mix(p, v), s


@numerics
def logits_written_before(w, q, k, v, m, pairs):
    s = w.scaled(w.raw(q, k)).clone()
    s[:, :, :, 1].mul_(3.0)
    return w.mix(w.weights(s), v)


@numerics
def weights_written_after(w, q, k, v, m, _):
    p = w.p(q, k, m)
    out = w.mix(p, v)
    p.zero_()
    return out


@numerics
def output_written(w, q, k, v, m, _):
    out = w.mix(w.p(q, k, m), v)
    out[:, :, 0].zero_()
    return out * 2


@numerics
def keys_written_after_the_logits(w, q, k, v, m, _):
    s = w.logits(q, k, m)
    k.mul_(2.0)
    return w.mix(w.weights(s), v), k + 0


@numerics
def keys_written_after_the_softmax(w, q, k, v, m, _):
    p = w.p(q, k, m)
    k[:, :, 0].zero_()
    return w.mix(p, v)


@numerics
def queries_written_after_the_logits(w, q, k, v, m, _):
    s = w.logits(q, k, m)
    q.neg_()
    return w.mix(w.weights(s), v)


@numerics
def values_written_after_the_softmax(w, q, k, v, m, _):
    p = w.p(q, k, m)
    v.mul_(2.0)
    return w.mix(p, v)


@numerics
def values_written_through_a_view(w, q, k, v, m, _):
    p = w.p(q, k, m)
    v.transpose(1, 2)[:, 1].fill_(0.5)
    return w.mix(p, v)


@numerics
def mask_written_after_use(w, q, k, v, m, _):
    s = w.raw(q, k).masked_fill(~m[:, None, None, :], -math.inf)
    m.fill_(True)
    return w.mix(w.weights(s), v), m.sum()


@numerics
def mask_written_before_use(w, q, k, v, m, _):
    keep = m | False
    keep[:, 1:3].fill_(False)
    return w.mix(w.weights(w.raw(q, k).masked_fill(~keep[:, None, None, :], -math.inf)), v)


@numerics
def values_are_overwritten_by_the_output(w, q, k, v, m, _):
    v.copy_(w.mix(w.p(q, k, m), v))
    return v + 0


# Other logits than q k^T.
@numerics
def disentangled(w, q, k, v, m, other):
    return w.mix(w.weights(w.scaled(w.raw(q, k) + w.raw(q, other))), v)


@numerics
def logits_of_the_last_attention(w, q, k, v, m, _):
    s = w.logits(q, k)
    return w.mix(w.weights(w.logits(w.mix(w.weights(s), v), k) + s), v)


@numerics
def row_temperature(w, q, k, v, m, row):
    return w.mix(w.weights(w.raw(q, k) * row), v)


@numerics
def row_temperature_divided(w, q, k, v, m, row):
    return w.mix(w.weights(w.logits(q, k, m) / row), v)


@numerics
def column_temperature(w, q, k, v, m, col):
    return w.mix(w.weights(w.raw(q, k) * col), v)


@numerics
def head_temperature(w, q, k, v, m, heads):
    return w.mix(w.weights(w.raw(q, k) * heads[:, None, None]), v)


@numerics
def last_axis_temperature(w, q, k, v, m, heads):
    return w.mix(w.weights(w.raw(q, k) * heads), v)


@numerics
def one_runtime_temperature(w, q, k, v, m, one):
    return w.mix(w.weights(w.raw(q, k) * one), v)


@numerics
def logits_normalised(w, q, k, v, m, _):
    s = w.scaled(w.raw(q, k))
    return w.mix(w.weights(s / (s.std(-1, keepdim=True) + 0.1)), v)


@numerics
def pairwise_temperature(w, q, k, v, m, pairs):
    return w.mix(w.weights(w.raw(q, k) * pairs), v)


@numerics
def row_bias(w, q, k, v, m, row):
    return w.mix(w.weights(w.logits(q, k, m) + row), v)


@numerics
def column_bias(w, q, k, v, m, col):
    return w.mix(w.weights(w.logits(q, k, m) + col), v)


@numerics
def head_bias_on_the_last_axis(w, q, k, v, m, heads):
    return w.mix(w.weights(w.raw(q, k) + heads), v)


@numerics
def scale_twice(w, q, k, v, m, _):
    return w.mix(w.weights(w.logits(q * 0.5, k / 2.0, m) * 3.0), v)


@numerics
def negative_scale(w, q, k, v, m, _):
    return w.mix(w.weights(-w.scaled(w.raw(q, k))), v)


@numerics
def divided_by_the_logits(w, q, k, v, m, _):
    return w.mix(w.weights(3.0 / (w.raw(q, k).abs() + 1.0)), v)


@numerics
def subtracted_from_a_bias(w, q, k, v, m, pairs):
    return w.mix(w.weights(pairs - w.scaled(w.raw(q, k))), v)


@numerics
def add_with_alpha(w, q, k, v, m, pairs):
    return w.mix(w.weights(torch.add(w.raw(q, k), pairs, alpha=3)), v)


@numerics
def rsub_with_alpha(w, q, k, v, m, pairs):
    return w.mix(w.weights(torch.sub(pairs, w.raw(q, k), alpha=-2)), v)


@numerics
def baddbmm_beta(w, q, k, v, m, pairs):
    s = torch.baddbmm(pairs.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT, beta=2.0, alpha=0.5)
    return w.mix(w.weights(s.view(pairs.shape)), v)


@numerics
def floor_division(w, q, k, v, m, _):
    return w.mix(w.weights(w.raw(q, k) // 2), v)


@numerics
def truncated_division(w, q, k, v, m, _):
    return w.mix(w.weights(torch.div(w.raw(q, k), 0.5, rounding_mode="trunc")), v)


@numerics
def tanh_without_cap(w, q, k, v, m, _):
    return w.mix(w.weights(w.raw(q, k).tanh() * 4), v)


@numerics
def mask_before_the_cap(w, q, k, v, m, _):
    s = w.raw(q, k).masked_fill(~m[:, None, None, :], -math.inf)
    return w.mix(w.weights(2 * torch.tanh(s / 2)), v)


@numerics
def cosine(w, q, k, v, m, _):
    return w.mix(w.p(F.normalize(q, dim=-1), F.normalize(k, dim=-1), m), v)


@numerics
def distances(w, q, k, v, m, _):
    s = 2 * w.raw(q, k) - q.square().sum(-1, keepdim=True) - k.square().sum(-1)[:, :, None, :]
    return w.mix(w.weights(s), v)


@numerics
def cdist(w, q, k, v, m, _):
    return w.mix(w.weights(-torch.cdist(q, k)), v)


@numerics
def logits_rounded(w, q, k, v, m, _):
    return w.mix(w.weights(w.logits(q, k, m).bfloat16().float()), v)


@numerics
def weights_rounded(w, q, k, v, m, _):
    return w.mix(F.softmax(w.logits(q, k, m), -1, dtype=torch.bfloat16).float(), v)


# Other masks than they seem.
@numerics
def masked_with_zero(w, q, k, v, m, _):
    return w.mix(w.weights(w.raw(q, k).masked_fill(~m[:, None, None, :], 0.0)), v)


@numerics
def multiplied_with_the_mask(w, q, k, v, m, _):
    return w.mix(w.weights(w.raw(q, k) * m[:, None, None, :]), v)


@numerics
def mildly_masked(w, q, k, v, m, _):
    return w.mix(w.weights(w.raw(q, k).masked_fill(~m[:, None, None, :], -3.0)), v)


@numerics
def mask_scaled_down(w, q, k, v, m, _):
    bias = torch.zeros_like(m, dtype=torch.float32).masked_fill(~m, -10.0)
    return w.mix(w.weights((w.raw(q, k) + bias[:, None, None, :]) * 0.1), v)


@numerics
def ones_and_zeros_added(w, q, k, v, m, _):
    return w.mix(w.weights(w.raw(q, k) + m[:, None, None, :]), v)


@numerics
def queries_padded(w, q, k, v, m, _):
    return w.mix(w.weights(w.raw(q, k).masked_fill(~m[:, None, :, None], -1e9)), v)


@numerics
def mask_by_the_wrong_axis(w, q, k, v, m, _):
    return w.mix(w.weights(w.raw(q, k).masked_fill(~m, -math.inf).nan_to_num(neginf=-1e9)), v)


@numerics
def mask_by_head(w, q, k, v, m, _):
    return w.mix(w.weights(w.raw(q, k).masked_fill(~m[None, :, None, :], -1e9)), v)


@numerics
def the_mask_the_other_way_round(w, q, k, v, m, _):
    return w.mix(w.weights(w.raw(q, k).masked_fill(m[:, None, None, :], -1e9)), v)


@numerics
def causal_the_other_way_round(w, q, k, v, m, _):
    i = torch.arange(q.shape[2])
    return w.mix(w.weights(torch.where(i[:, None] <= i, w.raw(q, k), -math.inf)), v)


@numerics
def no_key_at_all(w, q, k, v, m, _):
    i = torch.arange(q.shape[2])
    return w.mix(w.weights(w.raw(q, k).masked_fill(i >= i[:, None], torch.finfo(torch.float32).min)), v)


@numerics
def no_key_at_all_added(w, q, k, v, m, _):
    i = torch.arange(q.shape[2])
    return w.mix(w.weights(w.raw(q, k) + torch.where(i >= i[:, None], -1e9, 0.0)), v)


@numerics
def masked_for_one_head(w, q, k, v, m, _):
    s = w.raw(q, k)
    s[:, 0].masked_fill_(~m[:, None, :], -math.inf)
    return w.mix(w.weights(s), v)


# Other normalisations.
@numerics
def by_hand(w, q, k, v, m, _):
    e = (w.logits(q, k, m) * 0.3).exp()
    return w.mix(e / e.sum(-1, keepdim=True), v)


@numerics
def by_hand_with_max(w, q, k, v, m, _):
    s = w.logits(q, k, m)
    e = torch.exp(s - s.amax(-1, keepdim=True))
    return w.mix(e / e.sum(dim=-1, keepdim=True), v)


@numerics
def by_hand_normalised_late(w, q, k, v, m, _):
    e = (w.logits(q, k, m) * 0.3).exp()
    return w.mix(e, v) / e.sum(-1, keepdim=True)


@numerics
def by_hand_over_the_wrong_axis(w, q, k, v, m, _):
    e = (w.scaled(w.raw(q, k)) * 0.3).exp()
    return w.mix(e / e.sum(-2, keepdim=True), v)


@numerics
def softmax_plus_one(w, q, k, v, m, _):
    e = (w.logits(q, k, m) * 0.3).exp()
    return w.mix(e / (e.sum(-1, keepdim=True) + 1), v)


@numerics
def sink(w, q, k, v, m, heads):
    s = w.logits(q, k, m)
    column = heads.view(1, -1, 1, 1).expand(s.shape[0], -1, s.shape[2], 1)
    return w.mix(w.weights(torch.cat([s, column], -1))[..., :-1], v)


@numerics
def the_last_key_dropped(w, q, k, v, m, _):
    return w.p(q, k, m)[..., :-1] @ v[:, :, :-1]


@numerics
def the_query_max_subtracted(w, q, k, v, m, _):
    s = w.scaled(w.raw(q, k))
    return w.mix(w.weights(s - s.amax(-2, keepdim=True)), v)


@numerics
def weights_halved(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m) * 0.5, v)


# Other layouts and orders.
@numerics
def channels(w, q, k, v, m, _):
    p = w.weights(w.scaled(q.mT @ k))
    return (p @ v.mT).mT


@numerics
def channels_over_equal_sizes(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(q.transpose(-1, -2) @ k)), v)


@numerics
def keys_not_transposed(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(q @ k)), v)


@numerics
def keys_transposed_twice(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(w.raw(q, k.permute(0, 1, 3, 2).transpose(2, 3)))), v)


@numerics
def keys_viewed_not_transposed(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(q @ k.reshape(k.shape[0], k.shape[1], k.shape[3], k.shape[2]))), v)


@numerics
def values_transposed(w, q, k, v, m, _):
    return w.p(q, k, m) @ v.mT


@numerics
def values_of_other_heads(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m), v.flip(1))


@numerics
def values_of_other_batches(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m), v.flip(0))


@numerics
def keys_of_other_heads(w, q, k, v, m, _):
    return w.mix(w.p(q, k.roll(1, 1), m), v)


@numerics
def values_rolled(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m), v.roll(1, 2))


@numerics
def weights_rolled(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m).roll(1, -1), v)


@numerics
def weights_of_other_heads(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m).flip(1), v)


@numerics
def weights_of_other_queries(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m).flip(-2), v)


@numerics
def batch_and_heads_swapped(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m), v.transpose(0, 1))


@numerics
def batch_and_heads_swapped_by_einsum(w, q, k, v, m, _):
    return torch.einsum("bhqk,hbkd->bhqd", w.p(q, k, m), v)


@numerics
def heads_and_length_swapped(w, q, k, v, m, _):
    return w.mix(w.p(q, k, m), v.transpose(1, 2))


@numerics
def keys_seen_as_heads(w, q, k, v, m, _):
    return torch.einsum("bhqk,bkhd->bhqd", w.p(q, k, m), v)


@numerics
def attention_over_heads(w, q, k, v, m, _):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return w.mix(w.weights(w.scaled(w.raw(q, k))), v)


@numerics
def heads_not_moved(w, q, k, v, m, _):
    b, h, n, d = SIZES[w.sizes]
    q, k, v = (x.transpose(1, 2).reshape(x.shape[0], h, x.shape[2], d) for x in (q, k, v))
    return w.mix(w.weights(w.scaled(w.raw(q, k))), v)


@numerics
def written_the_other_way_round(w, q, k, v, m, _):
    s = w.scaled(torch.einsum("bhqd,bhkd->bhkq", q, k))
    return torch.einsum("bhkq,bhkd->bhqd", w.weights(s, -2), v)


@numerics
def output_transposed(w, q, k, v, m, _):
    return torch.einsum("bhqk,bhkd->bhdq", w.p(q, k, m), v)


@numerics
def heads_contracted(w, q, k, v, m, _):
    s = torch.einsum("bhqd,bhkd->bqk", q, k) * 0.3
    return torch.einsum("bqk,bhkd->bhqd", w.weights(s), v)


@numerics
def heads_contracted_in_the_values(w, q, k, v, m, _):
    return torch.einsum("bhqk,bhkd->bqd", w.p(q, k, m), v)


@numerics
def one_weight_for_all_features(w, q, k, v, m, _):
    s = torch.einsum("bhqd,bhkd->bhqkd", q, k)
    return torch.einsum("bhqkd,bhkd->bhqd", w.weights(s, 3), v)


@numerics
def batch_contracted(w, q, k, v, m, _):
    return torch.einsum("bhqk,chkd->bhqd", w.p(q, k, m), v)


@numerics
def repeated_diagonal(w, q, k, v, m, _):
    return torch.einsum("bhqd,bhqd->bhq", q, k).softmax(-1)[..., None] * v


@numerics
def tiled_not_interleaved(w, q, k, v, m, _):
    h = SIZES[w.sizes][1] // 2
    return w.mix(w.p(q, k[:, :h].repeat(1, 2, 1, 1), m), v[:, :h].repeat(1, 2, 1, 1))


@numerics
def keys_tiled_values_interleaved(w, q, k, v, m, _):
    h = SIZES[w.sizes][1] // 2
    return w.mix(w.p(q, torch.cat([k[:, :h], k[:, :h]], 1), m), v[:, :h].repeat_interleave(2, 1))


@numerics
def tiled_by_expand(w, q, k, v, m, _):
    h = SIZES[w.sizes][1] // 2
    k, v = (x[:, :h].unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2) for x in (k, v))
    return w.mix(w.p(q, k, m), v)


@numerics
def interleaved_and_written(w, q, k, v, m, _):
    h = SIZES[w.sizes][1] // 2
    k, v = (x[:, :h].repeat_interleave(2, 1) for x in (k, v))
    k[:, 0].zero_()
    return w.mix(w.p(q, k, m), v)


@numerics
def grouped_the_wrong_way(w, q, k, v, m, _):
    h = SIZES[w.sizes][1] // 2
    g = q.unflatten(1, (2, h))
    s = torch.einsum("bghqd,bhkd->bghqk", g, k[:, :h]) * 0.3
    return torch.einsum("bghqk,bhkd->bghqd", w.weights(s), v[:, :h]).flatten(1, 2)


@numerics
def keys_repeated_along_the_length(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(w.raw(q, k.repeat_interleave(2, 2)))), v.repeat_interleave(2, 2))


@numerics
def all_from_one(w, q, k, v, m, _):
    return w.mix(w.p(q, q, m), q)


@numerics
def one_key(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(w.raw(q, k[:, :, :1]))), v[:, :, :1])


@numerics
def one_query(w, q, k, v, m, _):
    return w.mix(w.weights(w.scaled(w.raw(q[:, :, -1:], k))), v)


@numerics
def values_depend_on_the_logits(w, q, k, v, m, _):
    s = w.scaled(w.raw(q, k))
    return w.mix(w.weights(s), v + s.mean(-1, keepdim=True))


@numerics
def the_mask_depends_on_an_attention(w, q, k, v, m, _):
    first = w.mix(w.p(q, k), v)
    keep = first.sum(-1) > 0
    return w.mix(w.weights(w.raw(first, k).masked_fill(~keep[:, :, None, :], -1e9)), v)
