"""The rule by which image files are read: which way up, and what becomes of their alpha."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

ORIENTATIONS = ("exif", "stored")
ALPHAS = ("drop", "white")


@dataclass(frozen=True)
class ImageRule:
    """The rule by which image files are read; by default as transformers does where a processor is given a
    path.

    Attributes:
        orientation: ``exif``, turned as the file says; ``stored``, as the pixels lie in it.
        alpha: ``drop``, the colours behind an alpha channel alone; ``white``, on white as far as they are
            transparent.
    """

    orientation: str = "exif"
    alpha: str = "drop"

    def but(self, orientation: Optional[str], alpha: Optional[str]) -> ImageRule:
        """Return the rule with what is given in place of its own."""
        return ImageRule(orientation or self.orientation, alpha or self.alpha)

    def __str__(self) -> str:
        return f"--image-orientation {self.orientation} --image-alpha {self.alpha}"


LOADED = ImageRule()
FIRST_RULE = ImageRule("stored", "white")  # of runs whose saved config has no rule
