"""The roofline: the least time that a model's bytes, FLOPs and messages take on a machine. Nothing is measured here.

A machine is a line of numbers, from its vendor or from `machine.measure`.
"""

from dataclasses import dataclass

from atb_pllava.model.costs import Cost, Costs


@dataclass(frozen=True)
class Machine:
    """One device: memory bandwidth in bytes/s, FLOP/s of 16-bit matrix products, bytes of memory.

    `link` is the bytes/s that the device can send to all others together. `hop` is the latency of one message in
    seconds.
    """

    name: str
    bandwidth: float
    flops: float
    memory: float = float("inf")
    link: float = float("inf")
    hop: float = 0.0

    def seconds(self, cost: Cost) -> float:
        """Seconds for some work when memory and arithmetic overlap perfectly and messages overlap with neither.

        Ranks are connected directly with each other, so a collective takes two hops: scatter and gather.
        """
        waiting = cost.sent / self.link + cost.messages * 2 * self.hop
        return max(cost.bytes / self.bandwidth, cost.flops / self.flops) + waiting


# Vendors' figures, not measured here. 910B: 64 GB HBM (Atlas 800I A2), 280 to 376 TFLOP/s by grade, HCCS 392 GB/s in
# both directions. 310P: one of the two chips of a 300I Duo (408 GB/s, 140 TFLOP/s, 96 GB a card), PCIe 4.0 x16 between
# them. H200: NVLink 900 GB/s in both directions. Hops are guesses of the order of magnitude.
MACHINES = (
    Machine("910B", 1.6e12, 313e12, 64e9, 196e9, 5e-6),
    Machine("310P", 204e9, 70e12, 48e9, 32e9, 15e-6),
    Machine("H200", 4.8e12, 989e12, 141e9, 450e9, 3e-6),
)


@dataclass(frozen=True)
class Prediction:
    """Lower bounds in seconds for a batch of equal requests, and the bytes that a rank holds."""

    vision: float
    prefill: float
    step: float
    batch: int
    held: float

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second of the whole batch while it decodes."""
        return self.batch / self.step

    @property
    def ttft(self) -> float:
        """Time to first token of a request that runs alone, from pixels."""
        return self.vision + self.prefill


def predict(costs: Costs, machine: Machine, batch: int, prompt: int, further: int = 0) -> Prediction:
    """Bounds for `batch` requests of `prompt` tokens. The decode step is the one after `further` generated tokens."""
    contexts = [prompt + further] * batch
    return Prediction(
        vision=machine.seconds(costs.vision(costs.config.num_frames)),
        prefill=machine.seconds(costs.prefill([prompt])),
        step=machine.seconds(costs.decode(contexts)),
        batch=batch,
        held=costs.weight_bytes + sum(contexts) * costs.kv_bytes_per_token,
    )


def largest_batch(costs: Costs, machine: Machine, tokens: int) -> int:
    """How many sequences of `tokens` tokens fit, with the weights, into nine tenths of the device's memory."""
    room = 0.9 * machine.memory - costs.weight_bytes
    return max(0, int(room // (tokens * costs.kv_bytes_per_token)))
