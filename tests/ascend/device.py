"""An NPU made of host memory: the real torch_npu on the stand-in libraries, with operators that run on the CPU.

`start()` loads torch_npu and takes over every kernel it registers for the device: torch's own operators run as torch's
CPU kernels, those of `kernels.py` as reference kernels, all others fail. Tensors on `npu:N` are host memory, so that a
CPU tensor over the same bytes (`on_host`) is all a kernel needs. A captured operator is recorded with addresses and
runs at every replay. Its result in the capture becomes NaN. Nothing here knows atb_pllava.
"""

import ctypes
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIBRARIES = (
    "ascendcl",
    "hccl",
    "acl_op_compiler",
    "ge_runner",
    "graph",
    "acl_tdt_channel",
    "fmk_parser",
    "ascend_protobuf",
    "atb",
)
# the requests of cann.c, with the numbers of its enum
CAPTURE_BEGIN = 1
CAPTURE_END = 2
EXECUTE = 3
GROUP_BEGIN = 4
GROUP_END = 5
UPDATE_BEGIN = 6
UPDATE_END = 7
ALL_REDUCE = 8
ALL_GATHER = 9
BROADCAST = 10
_ND = 2
_BASE_FORMATS = (0, _ND, 30)  # NCHW, ND, NCDHW: memory in the order of the axes
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long, ctypes.c_long
)


def load_libraries(directory: Path, devices: int, soc: str) -> ctypes.CDLL:
    """Make the stand-in the CANN that torch_npu finds. Must run before torch is imported."""
    os.environ.update(STAND_IN_DEVICES=str(devices), STAND_IN_SOC=soc, TASK_QUEUE_ENABLE="0")
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    loaded = [ctypes.CDLL(str(directory / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL) for name in LIBRARIES]
    return loaded[0]


def start(library: ctypes.CDLL) -> "Machine":
    """Import torch_npu and give its device its operators."""
    global machine
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    import torch
    import torch_npu

    machine = Machine(library, torch, torch_npu)
    machine.take_over()
    return machine


@dataclass(frozen=True)
class Address:
    """A tensor of the device as a recording knows it: bytes at an address, not an object."""

    storage: int
    size_bytes: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any
    device_format: int


@dataclass
class Recording:
    """A captured graph: the operators of a replay, in order. An update may replace the operators of a task group."""

    tasks: list[Any] = field(default_factory=list)
    outputs: list[Address] = field(default_factory=list)


class Machine:
    """The device of this process.

    `ran` counts what has run: reference kernels by name, replays, collectives.
    `launched` counts every operator that the host launches, torch's own included, by name. Views and empty tensors
    launch nothing.
    """

    def __init__(self, library: ctypes.CDLL, torch: Any, torch_npu: Any) -> None:
        self.torch = torch
        self.torch_npu = torch_npu
        self.recordings: dict[int, Recording] = {}
        self.groups: dict[int, list[Any]] = {}
        self.recording: Recording | None = None
        self.group: list[Any] | None = None
        self.updating = False
        self.can_capture = True
        self.ran: Counter[str] = Counter()
        self.launched: Counter[str] = Counter()
        self._hook = _HOOK(self._called)
        library.stand_in_set_hook(self._hook)
        self._libraries: list[Any] = []

    # What the C library tells us.

    def _called(self, what: int, first: int, second: int, a: int, b: int, c: int) -> int:
        try:
            self._answer(what, first, second, a, b, c)
        except BaseException:
            traceback.print_exc()  # C code is in between: the caller learns that it failed, not why
            return 507000
        return 0

    def _answer(self, what: int, first: int, second: int, a: int, b: int, c: int) -> None:
        if what == CAPTURE_BEGIN:
            if not self.can_capture:
                raise RuntimeError("this machine was told not to capture")
            self.recording = Recording()
        elif what == CAPTURE_END:
            assert self.recording is not None
            for address in self.recording.outputs:
                self._spoil(address)  # a captured operator has not run
            self.recordings[first] = self.recording
            self.recording = None
        elif what == EXECUTE:
            self.ran["replay"] += 1
            self._replay(self.recordings[first])
        elif what == GROUP_BEGIN:
            self.group = []
        elif what == GROUP_END:
            assert self.recording is not None and self.group is not None
            self.groups[first] = self.group
            self.recording.tasks.append(self.group)
            self.group = None
        elif what == UPDATE_BEGIN:
            self.group = self.groups[first]
            self.updating = True
            self.group.clear()
        elif what == UPDATE_END:
            self.group = None
            self.updating = False
        else:
            self._collective(what, first, second, a, b, c)

    def _replay(self, recording: Recording) -> None:
        for task in recording.tasks:
            for operator in task if isinstance(task, list) else [task]:
                operator()

    def _collective(self, what: int, source: int, target: int, count: int, kind: int, extra: int) -> None:
        # HcclDataType, of which these travel.
        kinds = {2: "int32", 3: "float16", 4: "float32", 5: "int64", 7: "uint8", 11: "bfloat16"}
        torch_dtype = getattr(self.torch, kinds[kind])
        assert count > 0, "a collective of nothing"

        def run() -> None:
            import torch.distributed as dist

            self.ran["collective"] += 1
            group = dist.distributed_c10d._get_default_group()
            gloo = group._get_backend(self.torch.device("cpu"))
            data = self._bytes_at(source, count * torch_dtype.itemsize).view(torch_dtype)
            if what == ALL_REDUCE:
                assert extra == 0, "only sums are needed"
                total = data.float()
                gloo.allreduce([total]).wait()
                self._bytes_at(target, count * torch_dtype.itemsize).view(torch_dtype).copy_(total)
            elif what == ALL_GATHER:
                parts = [self.torch.empty_like(data) for _ in range(group.size())]
                gloo.allgather([parts], [data.clone()]).wait()
                whole = self._bytes_at(target, group.size() * count * torch_dtype.itemsize).view(torch_dtype)
                whole.copy_(self.torch.cat(parts))
            else:
                options = dist.BroadcastOptions()
                options.rootRank = extra
                gloo.broadcast([data], options).wait()

        if self.recording is not None:
            self.recording.tasks.append(run)
        run()

    # Tensors.

    def _bytes_at(self, address: int, size: int) -> Any:
        return self.torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=self.torch.uint8)

    def address(self, tensor: Any) -> Address:
        storage = tensor.untyped_storage()
        stored_as = int(self.torch_npu.get_npu_format(tensor))
        return Address(
            storage.data_ptr(),
            storage.nbytes(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tuple(tensor.stride()),
            tensor.dtype,
            _ND if stored_as in _BASE_FORMATS else stored_as,
        )

    def on_host(self, address: Address) -> Any:
        """A CPU tensor over the same memory, which knows that it lies on the device, and in which format."""
        if address.size_bytes == 0 or 0 in address.shape:
            host = self.torch.empty(address.shape, dtype=address.dtype)
        else:
            storage = self._bytes_at(address.storage, address.size_bytes).untyped_storage()
            host = self.torch.empty(0, dtype=address.dtype)
            host.set_(storage, address.offset, address.shape, address.strides)
        host.device_format = address.device_format
        return host

    def _spoil(self, address: Address) -> None:
        host = self.on_host(address)
        host.fill_(float("nan") if host.dtype.is_floating_point else 0)

    # Operators.

    def call(self, kernel: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run or record a kernel on device tensors. An argument that the kernel returns stays the same tensor."""
        self.launched[kernel.__name__] += 1
        tree = self.torch.utils._pytree
        leaves, spec = tree.tree_flatten((args, kwargs))
        found = [self.address(x) if self._on_device(x) else x for x in leaves]

        def run() -> Any:
            hosts = [self.on_host(x) if isinstance(x, Address) else x for x in found]
            host_args, host_kwargs = tree.tree_unflatten(hosts, spec)
            return hosts, kernel(*host_args, **host_kwargs)

        if self.updating:  # the inputs are not computed yet, and the operator writes into them
            self.group.append(run)
            return tuple(kwargs["out"])
        hosts, result = run()  # in a capture too, for shapes and refusals: it follows a step with the same inputs
        outs, out_spec = tree.tree_flatten(result)
        devices = []
        places = []
        for out in outs:
            if not isinstance(out, self.torch.Tensor):
                devices.append(out)
                places.append(None)
                continue
            source = next((i for i, h in enumerate(hosts) if h is out), None)
            if source is not None:
                devices.append(leaves[source])
                places.append(None)
                continue
            device = self._new(out)
            devices.append(device)
            places.append(self.address(device))
        if self.recording is not None:
            self._record(run, out_spec, places)
        return tree.tree_unflatten(devices, out_spec)

    def _record(self, run: Callable[[], Any], out_spec: Any, places: list[Address | None]) -> None:
        tree = self.torch.utils._pytree

        def task() -> None:
            outs = tree.tree_flatten(run()[1])[0]
            for out, place in zip(outs, places, strict=True):
                if place is not None:
                    self.on_host(place).copy_(out)

        self.recording.outputs += [place for place in places if place is not None]
        target = self.group if self.group is not None else self.recording.tasks
        target.append(task)

    def _new(self, host: Any) -> Any:
        """A device tensor with a kernel's result."""
        nz = getattr(host, "device_format", None) == 29
        if nz:
            device = self.torch_npu.empty_with_format(tuple(host.shape), dtype=host.dtype, device="npu", acl_format=29)
        else:
            device = self.torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="npu")
        if host.numel():
            self.on_host(self.address(device)).copy_(host)
        return device

    def _on_device(self, x: Any) -> bool:
        return isinstance(x, self.torch.Tensor) and x.device.type == "npu"

    def take_over(self) -> None:
        """Replace every kernel of torch's operators, then install the reference kernels."""
        import kernels

        torch = self.torch
        libraries: dict[str, Any] = {n: torch.library.Library(n, "IMPL") for n in ("aten", "npu", "atb")}
        self._libraries = list(libraries.values())
        self.torch_npu.op_plugin.atb._atb_ops._register_atb_extensions()
        soc = self.torch_npu._C._npu_get_soc_version()
        self._guards = kernels.guards(torch, soc)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
                space, _, rest = name.partition("::")
                operator = _overload(torch, space, rest) if space == "aten" else None
                if operator is not None and not _is_native(operator):
                    libraries["aten"].impl(rest, self._torch_kernel(operator), "PrivateUse1")
            for name, kernel in kernels.for_soc(torch, soc).items():
                space, _, rest = name.partition("::")
                libraries[space].impl(rest, self._reference_kernel(kernel), "PrivateUse1")

    def _torch_kernel(self, operator: Any) -> Callable[..., Any]:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            kwargs = {k: self.torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
            return operator(*args, **kwargs)

        kernel.__name__ = operator._schema.name.split("::")[1]
        special = {"copy_": self._copy, "_to_copy": self._to_copy}
        if kernel.__name__ in special:
            return special[kernel.__name__]
        if kernel.__name__ == "_local_scalar_dense":
            kernel = self._refuse_in_capture(kernel)
        guard = self._guards.get(kernel.__name__)

        def checked(*args: Any, **kwargs: Any) -> Any:
            if guard is not None:
                guard(*args, **kwargs)
            for x in self.torch.utils._pytree.tree_leaves((args, kwargs)):
                if isinstance(x, self.torch.Tensor) and x.dim() > 0 and not self._on_device(x):
                    raise RuntimeError(f"{kernel.__name__}: all tensors must be on one device, got one on {x.device}")
            return self.call(kernel, args, kwargs)

        return checked

    def _copy(self, target: Any, source: Any, non_blocking: bool = False) -> Any:
        """copy_ between any two devices."""
        across = target.device.type != source.device.type
        if across and self.recording is not None:
            raise RuntimeError("a copy between host and device cannot be captured")
        if not self._on_device(target):
            target.copy_(self.on_host(self.address(source)))
            return target
        return self.call(copy, (target, source), {})

    def _to_copy(
        self, source: Any, *, dtype: Any = None, device: Any = None, memory_format: Any = None, **_: Any
    ) -> Any:
        """Another type or another device: a new tensor and a copy."""
        dtype = dtype or source.dtype
        device = source.device if device is None else device
        if memory_format in (None, self.torch.preserve_format) and _is_dense(source):
            target = self.torch.empty_strided(source.shape, source.stride(), dtype=dtype, device=device)
        else:
            target = self.torch.empty(source.shape, dtype=dtype, device=device)
        if self.recording is not None:
            self.recording.outputs.append(self.address(target))
        return self._copy(target, source)

    def _refuse_in_capture(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if self.recording is not None:
                raise RuntimeError("reading a value on the host cannot be captured")
            return kernel(*args, **kwargs)

        refuse.__name__ = kernel.__name__
        return refuse

    def _reference_kernel(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.ran[kernel.__name__] += 1
            return kernel(*args, **kwargs)

        counted.__name__ = kernel.__name__
        return lambda *args, **kwargs: self.call(counted, args, kwargs)


machine: Machine | None = None


def _is_dense(tensor: Any) -> bool:
    """Whether the elements fill their memory without gaps, in any order of axes."""
    wanted = 1
    for stride, size in sorted((st, n) for st, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != wanted:
            return False
        wanted *= size
    return True


def copy(target: Any, source: Any) -> Any:
    return target.copy_(source)


def _overload(torch: Any, space: str, name: str) -> Any:
    packet, _, overload = name.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, space), packet), overload or "default")
    except AttributeError:
        return None


_NATIVE = {
    "empty", "empty_strided", "empty_like", "resize_", "set_", "record_stream", "is_pinned", "_pin_memory",
    "as_strided", "view", "_reshape_alias", "unfold", "view_as_real", "view_as_complex", "_unsafe_view", "contiguous",
    "is_set_to", "_has_compatible_shallow_copy_type", "reshape",
}  # fmt: skip


def _is_native(operator: Any) -> bool:
    """Operators that only make tensors and views: torch_npu's own work without a kernel."""
    schema = operator._schema
    name = schema.name.split("::")[1]
    is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    return name in _NATIVE or is_view
