from hf_latephase.data.enwik8 import (
    BYTE_OFFSET,
    BYTE_VOCAB_SIZE,
    ByteSplits,
    ByteWindows,
    decode_ids,
    encode_bytes,
    load_bytes,
    split_bytes,
)
from hf_latephase.data.windows import TokenWindows


__all__ = [
    "BYTE_OFFSET",
    "BYTE_VOCAB_SIZE",
    "ByteSplits",
    "ByteWindows",
    "TokenWindows",
    "decode_ids",
    "encode_bytes",
    "load_bytes",
    "split_bytes",
]
