"""What every stage shares: records, shards, sources, tokenizers, settings. Imports no jax and no torch."""

from ipt_jax.corpus.records import Document, Pair, Parent, Segment, SynthGroup, TokenDocument
from ipt_jax.corpus.shards import read_documents

__all__ = ["Document", "Pair", "Parent", "Segment", "SynthGroup", "TokenDocument", "read_documents"]
