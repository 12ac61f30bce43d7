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


__all__ = [
    "BYTE_OFFSET",
    "BYTE_VOCAB_SIZE",
    "ByteSplits",
    "ByteWindows",
    "decode_ids",
    "encode_bytes",
    "load_bytes",
    "split_bytes",
]
