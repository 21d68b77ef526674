"""Adapters of the vectors of vector quantisation."""

import jax.numpy as jnp
import numpy as np

from jaxkd.sparsity import vq


def compress_vq_assign(v):
    kernel, size = v["w"], int(v.numpy("m"))
    vectors = vq.to_vectors(kernel, size)
    codebook, temperature = v["codebook"], float(v.numpy("dkm_tau"))
    codes = vq.nearest(vectors, codebook)
    shares = vq.attention(vectors, codebook, temperature)
    softly = vq.softly_moved(vectors, codebook, temperature)

    projection, low = v["proj"], v["codes_low"]
    represented = vectors @ projection.T
    codes_low = vq.nearest(represented, low)
    quantizer = vq.Quantizer(size=size, dim=len(projection), clusters=len(low))
    error = jnp.linalg.norm(vectors - represented @ projection)
    return {
        "vectors": vectors,
        "assign": codes,
        "codebook_update": vq.moved(vectors, codes, codebook),
        "reconstructed": vq.decode(codebook[codes], None, kernel.shape),
        "dkm_attention": shares,
        "dkm_codebook": softly,
        "dkm_reconstruction": shares @ softly,
        "assign_low": codes_low,
        "recon_low": vq.decode(low[codes_low], projection, kernel.shape),
        "svd_error": error,
        "bits_full": np.array(32 * kernel.size),
        "bits_compressed": quantizer.bits(kernel.shape),
    }
