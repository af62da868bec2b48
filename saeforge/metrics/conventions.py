"""What each number means, kept beside the numbers in every result: the field's definitions differ under equal names.

x is an activation, x_hat its reconstruction, r = x - x_hat, in raw units; sums run over all evaluated tokens. A key
names the figures that it defines, separated by commas.
"""

from __future__ import annotations

#: Of `Reconstruction`.
RECONSTRUCTION = {
    "tokens": "documents of the named split only; special tokens and padding are not in the dataset",
    "l0_mean, l0_p5, l0_p50, l0_p95": "latents != 0 of a token; mean and 5th, 50th, 95th percentile (nearest rank)",
    "l1": "mean over tokens of sum |f_i| |W_dec_i|, each latent by the norm of its decoder row",
    "fvu": "sum |r|^2 / sum |x - mu|^2, mu the mean over all evaluated tokens",
    "mse": "mean over tokens of |r|^2, summed over dimensions, raw units",
    "mse_per_dim": "mse / d, as OpenAI's sparse_autoencoder and NVIDIA's sae report it",
    "cosine": "mean over tokens of cos(x, x_hat); a token of norm 0 counts as 0, here and in the other means of ratios",
    "l2_ratio": "mean over tokens of |x_hat| / |x|",
    "reconstruction_bias": "sum |x_hat|^2 / sum x.x_hat (Rajamanoharan et al. 2024, eq. 10); below 1 is shrinkage",
    "ev_legacy": "mean over tokens of 1 - |r|^2 / |x - m|^2: explained_variance_legacy of SAELens and SAEBench, with m "
    "the mean of the train split where they take the batch's",
    "ev_centered": "1 - sum Var(r) / sum Var(x), variances by dimension: dictionary_learning, NVIDIA's sae; blind to a "
    "constant bias of the reconstruction",
    "nmse_raw": "mean over tokens of |r|^2 / |x|^2: OpenAI's sparse_autoencoder; relative to zero, not to the mean",
    "nmse_global": "mse_per_dim / variance of all scalars of x: NVIDIA's sae, mlsae; the denominator includes the "
    "differences between dimensions' means",
    "dead": "latents that fired on no evaluated token",
    "rare_1e_5, rare_1e_6": "latents that fired on less than that share of tokens, dead ones included; with fewer "
    "tokens than 1 / share these are the dead ones",
    "dense_1pct, dense_10pct": "latents that fired on more than 1% and 10% of the evaluated tokens",
    "firing_share_1pct, firing_share_10pct": "their share of all firings",
}

#: Of `Firing`.
FIRING = {
    "tokens": "evaluated",
    "documents": "that these tokens came from; null where the dataset does not say",
    "dead": "latents that fired on no evaluated token",
    "dead_bound": "3 / documents: a dead latent fires in less than this share of documents, with 95% confidence (rule "
    "of three; documents and not tokens, which are not independent)",
    "log10_edges, latents": "histogram over latents of log10(share of tokens on which one fires); a bin has its left "
    "edge, the first also what is below, the last also 1; dead latents are in none",
    "l0_edges, l0_tokens": "histogram over tokens of their L0; a bin has its left edge and not its right one; all bins "
    "are of one whole width",
}

#: Of `WeightFigures`: each with mean, p5, p50, p95 (nearest rank) over latents.
WEIGHTS = {
    "latents": "of the SAE",
    "sampled": "latents, drawn at random, whose nearest other was looked for among all",
    "decoder_norm, encoder_norm": "norm of a latent's row, raw units",
    "decoder_nearest, encoder_nearest": "greatest cosine of a latent's row with that of any other latent",
    "decoder_twins": "share of latents with decoder_nearest of at least 0.9",
    "encoder_bias": "b_enc of the saved SAE, decoder bias folded in",
    "encoder_decoder": "cosine of a latent's encoder row with its decoder row; null where widths differ",
}

#: Of `Agreement`.
AGREEMENT = {
    "latents_a, latents_b": "latents compared; of the evaluated SAE those that fired, of the other one all",
    "method": "hungarian: the one-to-one assignment with the greatest sum of cosines (up to 8,192 latents); mutual: "
    "the pairs that are each other's nearest latent",
    "pairs": "latents paired",
    "cosine": "of the pairs' decoder rows, signed; its mean is what others call MCC, which takes |cosine|",
    "shared": "pairs with a cosine of at least 0.7, as a share of the smaller SAE's latents",
    "nearest_a, nearest_b": "greatest cosine of a latent with any latent of the other SAE; its mean is called MMCS",
    "chance": "mean of nearest_a with as many random directions in the other SAE's place",
}


def names(conventions: dict[str, str]) -> set[str]:
    """The figures that some conventions define."""
    return {name.strip() for key in conventions for name in key.split(",")}
