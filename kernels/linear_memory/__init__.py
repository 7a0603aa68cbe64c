"""What ``linear_attention`` and ``delta_rule`` share: one recurrence over chunks, which differs in what a token writes.

    W_t = a_t W_{t-1} + k_tᵀ w_t        w_t = v_t (linear attention), or β_t e_t with the error
    o_t = s q_t W_t                     e_t = v_t − k_t (a_t W_{t-1}) (delta rule)

In a chunk of C tokens that begins with the state S, with G the cumulative log decay since its start:

    O  = s (Q ⊙ exp G) S + s tril(Q Kᵀ ⊙ Γ) W           Γ_ij = exp(G_i − G_j)
    S' = exp(G_C) S + (K ⊙ exp(G_C − G))ᵀ W
    E  = N (V − (K ⊙ exp G) S)                          N = (I + tril(K Kᵀ ⊙ Γ, −1) diag β)⁻¹, W = diag(β) E

Only differences G_i − G_j with j ≤ i are ever exponentiated, so that no decay is too strong.
"""
