"""Why a site is kept exact: one code each, with what the user can do. docs/reasons.md prints this."""

from __future__ import annotations

REASONS = {
    "too_short": "Fewer keys than min_seq_len. Lower min_seq_len to rewrite it all the same.",
    "not_faster": "The cost model expects no gain at this length. Set only_if_faster=False to insist, "
    "or choose a plan with fewer routes or rows.",
    "excluded": "include or exclude leaves this module path out.",
    "not_in_plan": "The plan file does not know this site: it was made for another model, or for this one inside of "
    "something else. Calibrate what is compiled.",
    "plan_exact": "The plan file leaves this site exact.",
    "dropout": "Attention dropout is on. Call model.eval(), or train without attention dropout.",
    "opaque_mask": "The mask is not a closed form of batch, head, query and key indices. Build it from "
    "aranges and comparisons inside the compiled region, or pass is_causal=True. On a CPU tensors that are there "
    "are read as they come, without gradients.",
    "unsupported_mask": "The mask was understood (the reason prints it) but is not taken: a CPU's kernels take "
    "causality, valid keys and bands (sliding windows, chunks), a GPU's what docs/triton.md lists. On a CPU "
    "tensors that are there are read as they come, without gradients.",
    "additive_mask": "The mask is a float tensor whose sum with the logits is not just 0 or -inf. "
    "Use a boolean mask where one says the same.",
    "causal_misaligned": "Causal attention over q_len != k_len keys: is_causal=True aligns the first query "
    "with the first key there, which is seldom meant.",
    "cross_attention": "Queries and keys have different lengths, so no window is near a query.",
    "unsupported_rank": "Query, key and value must have the same rank, 3 or more.",
    "unsupported_dtype": "Query, key and value must all be float32, bfloat16 or float16.",
    "function_transform": "Inside torch.func (grad, vmap, ...) or forward-mode AD, with which the operators' "
    "gradients do not compose.",
    "sharded": "The tensors are DTensors, and the operators have no sharding rules. Compile the part that runs on "
    "local tensors.",
    "unsupported_device": "There are kernels for CPUs and, through Triton, for NVIDIA GPUs of compute capability 8.0 "
    "or newer and AMD's Instinct GPUs.",
    "no_compiler": "The CPU kernels need a C++ compiler: install g++ or clang++, or set CXX.",
    "unsupported_heads": "Query heads are not a multiple of key/value heads, or keys and values differ in heads.",
    "unsupported_head_dim": "Heads of more than 256 features.",
    "broadcast_query": "Query and key have different batch sizes, so that one query meets several sets of keys. "
    "Expand the query.",
    "broadcast_value": "Key and value differ in batch or heads. Expand both alike.",
    "weights_observed": "The attention weights (or their log-sum-exp) are returned or used. Do not ask for "
    "them: output_attentions=False, need_weights=False.",
    "composite_call": "The attention is inside one call (the kind names it) that is not looked into.",
    "flex_attention": "FlexAttention is left to its own compiler, which already skips what its mask forbids.",
    "weights_changed": "Between softmax and value, something is done to the weights (the reason names it).",
    "unsupported_logits": "The logits go through an operator that is not a scale, mask, bias, cast or softcap.",
    "extra_logits": "The softmax also runs over logits of something else, not of one learned sink after the keys.",
    "softcap": "The logits are capped by tanh, which a plan with centroids or a residual does not take.",
    "wrong_axis": "It looks like attention, but softmax and products do not run over one key axis.",
    "unproved_axes": "It looks like attention, but which axes are batch, head, query, key and feature is not proved.",
    "modified_in_place": "A tensor of the attention is written to in place. Write it out of place.",
    "empty": "A dimension is 0.",
    "invalid_call": "The call itself is not valid (is_causal with attn_mask); torch reports it.",
}
