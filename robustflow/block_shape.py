"""What the layers of one block have in common, and the operators that a regime builds them from."""

from __future__ import annotations

from dataclasses import dataclass

from robustflow.errors import UserError
from robustflow.fields import Operator
from robustflow.operators import Convolution, PatchConvolution


@dataclass(frozen=True)
class BlockShape:
    """What the layers of one block have in common."""

    channels: int
    image_size: tuple[int, int]
    kernel: str
    kernel_size: int = 3
    patch: int = 2
    hidden_ratio: float = 1.0

    def hidden(self, dimensions: int) -> int:
        """Hidden units of a gradient step on so many dimensions."""
        return max(1, round(self.hidden_ratio * dimensions))

    def spectral(self, index: int) -> Operator:
        """A kernel of norm 1: a convolution, or (orthonormal) patches where the network is built from patches."""
        return self.convolution(self.kernel_size) if self.kernel == "convolution" else self.orthonormal(index)

    def convolution(self, kernel_size: int) -> Convolution:
        """A zero-padded convolution of norm 1 to the hidden units of a step."""
        return Convolution(self.channels, self.hidden(self.channels), kernel_size, image_size=self.image_size)

    def orthonormal(self, index: int) -> PatchConvolution:
        """Rows of an orthogonal matrix on patches; every other layer works on a grid shifted by half a patch."""
        patch = self.patch
        if self.image_size[0] % patch or self.image_size[1] % patch:
            raise UserError(
                f"{self.image_size[0]}×{self.image_size[1]} images cannot be cut into {patch}×{patch} patches: "
                "choose another patch size or fewer blocks"
            )
        shift = 0 if self.image_size == (patch, patch) else (index % 2) * (patch // 2)
        return PatchConvolution(self.channels, self.hidden(self.channels * patch * patch), patch, shift)

    @property
    def reach(self) -> int:
        """The size of a zero-padded or circular kernel: on a single pixel, the matrix in its middle is all there is."""
        return 1 if self.image_size == (1, 1) else self.kernel_size

    def free(self) -> Operator:
        return Convolution(self.channels, self.channels, self.kernel_size)
