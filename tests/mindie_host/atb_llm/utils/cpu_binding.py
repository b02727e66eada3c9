"""How much memory of a card is in use, which the host asks npu-smi for."""


class NpuHbmInfo:
    @classmethod
    def get_hbm_usage(cls, rank: int, world_size: int, need_nz: bool) -> float:
        return 0.25
