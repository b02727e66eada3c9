"""The used share of a card's memory. MindIE asks npu-smi for it."""


class NpuHbmInfo:
    @classmethod
    def get_hbm_usage(cls, rank: int, world_size: int, need_nz: bool) -> float:
        return 0.25
