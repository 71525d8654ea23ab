"""The distance of the relations between tokens in two models, from their queries and keys."""

from kdkernels.ops.relation_match.op import Pair, relation_match, relation_match_rows, unsupported
from kdkernels.ops.relation_match.spec import Kind, Spec

__all__ = ["Kind", "Pair", "Spec", "relation_match", "relation_match_rows", "unsupported"]
