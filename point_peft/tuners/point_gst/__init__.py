"""PointGST: an adapter beside the MLP that works on the spectrum of the tokens on graphs of where they lie.

D. Liang, T. Feng, X. Zhou, Y. Zhang, Z. Zou, X. Bai: "Parameter-Efficient Fine-Tuning in Spectral Domain for Point
Cloud Learning", TPAMI 2025, https://arxiv.org/abs/2410.08114

The patch tokens of a sample are the nodes of a complete graph, and so are those of each group of 32 that follow one
another on a Z-order curve. The nearer two tokens lie, the heavier the edge between them. The eigenvectors U of a
graph's Laplacian take the place of sine waves: U^T h are the frequencies of features h on the graph. With tokens x
after the attention, at coordinates c, and r channels in the middle:

    W_ij = delta / |c_i - c_j|,  W_ii = 1       delta: the smallest distance in the sample that is not zero
    I - D^-1/2 W D^-1/2 = U diag(lambda) U^T    once per forward; D: the row sums of W
    h = W_down x                                c -> r
    a(z) = z + SiLU(W_a LN(z))                  at every frequency; W_a is the same for both scales, LN is not
    s = sum over scales of U a(U^T h)           patch tokens only
    y <- y + W_up (SiLU(h) + s)                 y: the tokens after the block

W_up and W_a start at zero: a fresh adapter is the backbone. Prefix tokens and their positions are trained too.

What the bases depend on: the coordinates of the sample and nothing else, neither batch mates nor the library that finds
eigenvectors. The sign of an eigenvector and the basis of a repeated eigenvalue (closer than 1e-6) are fixed by inner
products with fixed waves through the cloud; tokens at one place are told apart by their order. Other coordinates give
other bases: a change of 1e-7 moves an eigenvector by about that over the distance to the next eigenvalue, and may turn
the sign of one that is nearly orthogonal to the wave. No rule without such points exists.

When to use it: for classification and part segmentation with up to some hundred tokens a cloud, where there should be
neither prompts nor other clouds. On a CPU the bases of 128 tokens cost less than one block; their cost grows with the
cube of the number of tokens, and GPUs are slow at many small ones.

Deviations from the published code, each with its reason:

- U^T h and then U, the graph Fourier transform. The published code has them exchanged, which its authors say is a
  mistake; `transform="published"` does as it did.
- delta is that of the sample. Published, it is that of the batch, so that a sample's output depended on its batch
  mates; and distances are exact, not expanded, whose rounding gave delta there.
- Tokens at one place have the weight of one and the same. Published, their weight is infinite.
- Signs and bases of repeated eigenvalues are fixed. Published, they are what the machine's library gives.
- A number of tokens that the size of the groups does not divide is cut into groups of nearly equal size.
- Packed tokens (PTv3 and the like) are too many for one graph: their two scales are groups of 32 and of 16.
- Where the prediction is made from the prefix tokens alone, the last block's adapter has no spectral branch: nothing
  would read it.
"""

from __future__ import annotations

from point_peft.tuners.point_gst.config import PointGSTConfig

__all__ = ["PointGSTConfig"]
