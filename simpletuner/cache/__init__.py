"""Caches on disk: text embeddings and latents in packs, named by what shaped them."""
