"""Block-causal attention in Triton: squared, feature and FLuRKA attention. `autograd.py` calls the kernels in order.

NOTATION, for the kernels here and in `interval/`:

    B T H Hkv   sequences, tokens, query heads, key-value heads; `group` = H / Hkv query heads share a key-value head
    D Dv        width of q and k, width of v and o; DV in kernels
    r R         width of the sketch a, b; R is r rounded up to whole groups of 8
    F           features: rows of the state's numerator, [F, Dv]
    c N ℓ       tokens of a block (`block_size`), blocks, blocks with exact weights (`local_blocks`)
    t s         positions of a query and of a key
    local       the exact part: keys of the last ℓ blocks, one tile of scores at a time
    state       everything earlier: one product of φ(a_t) with the state of the blocks before
    value_state Σ φ(b_s) v_sᵀ, the numerator's state [N, Hkv, F, Dv]
    denom_state Σ φ(b_s), the denominator's state [N, Hkv, M]: a Gram matrix, a sum and a count (`state_layout.py`)
    m_i         running maximum of a row's exponents to the base 2, m_new its update, alpha = 2^{m_i − m_new} the
                rescale: as in FlashAttention-2; the operator saves it for each row as `row_max` [B, H, T]. 0 without an
                exponential
    l_i         running denominator of a row, over 2^{m_i}; saved as `denominator` [B, H, T], ∞ where it is 0
    acc         running numerator of a row, [BM, Dv], over 2^{m_i}; o = acc / l_i
    reciprocal  1 / l_t [B, H, T], 0 where l_t is 0
    delta       δ_t = −do_t·o_t, so that [do_t, δ_t] / l_t is the gradient of [numerator, denominator]
    gate_cumsum, gate_rev_cumsum    sums of the log gate within a block: from its first token to t, and from s + 1 to
                its last token
    X_PAD       X rounded up to a power of two that a tile can have
"""
