"""GPUs by name: what their makers' data sheets say."""

from dataclasses import dataclass

from lit_llmers.errors import unknown

USABLE = 0.9  # of a card's memory: the rest goes to the driver's context, to libraries and to gaps between blocks
KERNEL = 10e-6  # seconds that an operation takes at least when it is started from Python: what bounds small models


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        memory: GiB.
        half: dense TFLOP/s of matrix products in bfloat16, or float16 where that is all it has.
        single: TFLOP/s in float32, without TF32, which PyTorch does not use by default.
        watts: thermal design power.
        bfloat16: whether its matrix units know it; else `half` is of float16.
        source: the data sheet.
    """

    memory: float
    half: float
    single: float
    watts: int
    source: str
    bfloat16: bool = True

    @property
    def usable(self) -> float:
        """Bytes that a process may fill."""
        return USABLE * self.memory * 2**30

    def peak(self, precision: str) -> float:
        """FLOP/s of matrix products in the Trainer's precision."""
        if precision.startswith("bf16"):
            return 1e12 * (self.half if self.bfloat16 else self.single)
        return 1e12 * (self.half if precision.startswith("16") else self.single)


CARDS = {
    "h200-141gb": Card(141, 989, 67, 700, "NVIDIA H200 data sheet, SXM"),
    "h100-80gb": Card(80, 989, 67, 700, "NVIDIA H100 data sheet, SXM"),
    "h100-pcie-80gb": Card(80, 756, 51, 350, "NVIDIA H100 data sheet, PCIe"),
    "a100-80gb": Card(80, 312, 19.5, 400, "NVIDIA A100 data sheet, SXM"),
    "a100-40gb": Card(40, 312, 19.5, 400, "NVIDIA A100 data sheet, SXM"),
    "l40s-48gb": Card(48, 362, 91.6, 350, "NVIDIA L40S data sheet"),
    "l4-24gb": Card(24, 121, 30.3, 72, "NVIDIA L4 data sheet"),
    "a10-24gb": Card(24, 125, 31.2, 150, "NVIDIA A10 data sheet"),
    "a6000-48gb": Card(48, 154.8, 38.7, 300, "NVIDIA RTX A6000 data sheet"),
    "v100-32gb": Card(32, 125, 15.7, 300, "NVIDIA V100 data sheet, SXM2", bfloat16=False),
    "v100-16gb": Card(16, 125, 15.7, 300, "NVIDIA V100 data sheet, SXM2", bfloat16=False),
    "t4-16gb": Card(16, 65, 8.1, 70, "NVIDIA T4 data sheet", bfloat16=False),
    "rtx4090-24gb": Card(24, 165.2, 82.6, 450, "NVIDIA Ada GPU architecture whitepaper"),
    "rtx3090-24gb": Card(24, 71, 35.6, 350, "NVIDIA Ampere GA102 whitepaper"),
    "mi300x-192gb": Card(192, 1307, 163.4, 750, "AMD Instinct MI300X data sheet"),
}


def card(name: str) -> Card:
    """The card of that name.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if name not in CARDS:
        raise unknown("card (gpu)", name, CARDS)
    return CARDS[name]
