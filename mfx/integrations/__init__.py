"""What other libraries meet; each file imports its library only when it is used."""

from mfx.integrations.pretrained import from_pretrained

__all__ = ["from_pretrained"]
