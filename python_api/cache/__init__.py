"""What a teacher said, kept on disk: per token its k most probable next tokens.

``writer`` stores examples, ``reader`` finds them again by id and content, ``codec`` packs the rows,
``shards`` are the files, ``manifest`` says what was stored, ``build`` runs a model over a text.
NumPy and safetensors are imported when a cache is used, not before.
"""

from kdkernels.api.cache.codec import TopKCodec, estimate_bytes
from kdkernels.api.cache.manifest import Manifest, tokenizer_hash
from kdkernels.api.cache.reader import MissingExampleError, TeacherCache
from kdkernels.api.cache.writer import TeacherCacheWriter

__all__ = [
    "Manifest",
    "MissingExampleError",
    "TeacherCache",
    "TeacherCacheWriter",
    "TopKCodec",
    "estimate_bytes",
    "tokenizer_hash",
]
