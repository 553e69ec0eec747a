"""Records, shards, sources and tokenizers, which all stages share. Imports no jax and no torch."""

from ipt_jax.corpus.records import Document, Pair, Parent, Segment, SynthGroup, TokenDocument
from ipt_jax.corpus.shards import read_documents

__all__ = ["Document", "Pair", "Parent", "Segment", "SynthGroup", "TokenDocument", "read_documents"]
