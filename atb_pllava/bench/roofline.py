"""How fast a model can be on a machine at best: the larger of bytes over bandwidth and FLOPs over peak, plus the link.

Nothing is measured here. A machine is a line of numbers, from its vendor or from `machine.measure`.
"""

from dataclasses import dataclass

from atb_pllava.model.costs import Cost, Costs


@dataclass(frozen=True)
class Machine:
    """One device: bytes/s of its memory, FLOP/s of 16-bit matrix products, bytes of memory.

    `link` is bytes/s it can send to the others, all together; `hop` the seconds until one of them has a first byte.
    """

    name: str
    bandwidth: float
    flops: float
    memory: float = float("inf")
    link: float = float("inf")
    hop: float = 0.0

    def seconds(self, cost: Cost) -> float:
        """The roofline: memory and arithmetic overlap perfectly, the ranks' messages overlap with neither.

        Every rank reaches every other directly, so a collective waits for two hops: scatter and gather.
        """
        waiting = cost.sent / self.link + cost.messages * 2 * self.hop
        return max(cost.bytes / self.bandwidth, cost.flops / self.flops) + waiting


# Vendors' figures, none measured here. 910B: 64 GB HBM (Atlas 800I A2), 280 to 376 TFLOP/s by grade, HCCS 392 GB/s in
# both directions. 310P: one of the two chips of a 300I Duo (408 GB/s, 140 TFLOP/s, 96 GB a card), PCIe 4.0 x16 between
# them. H200: NVLink 900 GB/s in both directions. Hops are the order of magnitude of such links.
MACHINES = (
    Machine("910B", 1.6e12, 313e12, 64e9, 196e9, 5e-6),
    Machine("310P", 204e9, 70e12, 48e9, 32e9, 15e-6),
    Machine("H200", 4.8e12, 989e12, 141e9, 450e9, 3e-6),
)


@dataclass(frozen=True)
class Prediction:
    """Lower bounds for a batch of equal requests, in seconds, and the bytes a rank must hold."""

    vision: float
    prefill: float
    step: float
    batch: int
    held: float

    @property
    def tokens_per_second(self) -> float:
        """While all are decoding."""
        return self.batch / self.step

    @property
    def ttft(self) -> float:
        """Of a request alone on the machine, from pixels."""
        return self.vision + self.prefill


def predict(costs: Costs, machine: Machine, batch: int, prompt: int, further: int = 0) -> Prediction:
    """Bounds for `batch` videos with prompts of `prompt` tokens, the step when `further` tokens have been generated."""
    contexts = [prompt + further] * batch
    return Prediction(
        vision=machine.seconds(costs.vision(costs.config.num_frames)),
        prefill=machine.seconds(costs.prefill([prompt])),
        step=machine.seconds(costs.decode(contexts)),
        batch=batch,
        held=costs.weight_bytes + sum(contexts) * costs.kv_bytes_per_token,
    )


def largest_batch(costs: Costs, machine: Machine, tokens: int) -> int:
    """Sequences of `tokens` tokens whose KV cache fits beside the weights in nine tenths of the device's memory."""
    room = 0.9 * machine.memory - costs.weight_bytes
    return max(0, int(room // (tokens * costs.kv_bytes_per_token)))
