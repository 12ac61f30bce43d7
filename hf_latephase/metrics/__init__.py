from hf_latephase.metrics.bits_per_character import BitsPerCharacter


__all__ = ["BitsPerCharacter"]
