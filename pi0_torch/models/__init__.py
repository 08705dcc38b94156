"""The models, which mirror those of `pi0_jax.models`."""
