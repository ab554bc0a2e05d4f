"""A make-believe GPU, so that what is written for one runs in every test.

    with PretendCuda() as gpu:
        x = torch.rand(8, device="cuda")     # says that it is on cuda:0, and is computed by the CPU
        x.sum().item()                       # raises `HostWaits`; with strict=False it is noted in `gpu.waits`

It knows the rules of a GPU: what makes the host wait, what may not be mixed, what is launched. It is none: there are no
streams and no order of execution but the host's, autocast has no effect, nothing is compiled, fastai's tensor types are
dropped, numbers are the CPU's, and what an operation launches is counted as one."""

import sys
from collections import Counter, namedtuple
from contextlib import ExitStack, contextmanager
from time import perf_counter

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
Wait = namedtuple("Wait", "kind where")
VIEWS = set(
    """view as_strided slice select detach alias unsqueeze squeeze permute transpose expand _unsafe_view t reshape
    unbind split split_with_sizes movedim _reshape_alias lift_fresh empty empty_like empty_strided new_empty resize_
    unfold view_as""".split()
)
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}
READS |= {"bincount", "histc", "nonzero_numpy"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
active = []


class HostWaits(RuntimeError):
    "The host would wait for the device, or read what is not there yet"


class TwoDevices(RuntimeError):
    "Tensors of two devices in one operation"


class OnGpu(torch.Tensor):
    "A tensor that says it is on the GPU; `host` is what it holds"

    __slots__ = ["host"]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host):
        like = dict(strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype, layout=host.layout)
        new = torch.Tensor._make_wrapper_subclass(cls, host.size(), device=host.device, **like)
        new.host = host
        return new

    device = property(lambda self: CUDA)
    is_cpu = property(lambda self: False)
    is_cuda = property(lambda self: True)

    def get_device(self):
        return 0

    def as_subclass(self, cls):
        return self

    def __repr__(self):
        return f"OnGpu({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return active[-1].dispatch.__torch_dispatch__(func, types, args, kwargs)  # some calls look past the modes


class Arrives(torch.autograd.Function):
    "A copy to the GPU that gradients pass through"

    @staticmethod
    def forward(ctx, x):
        return OnGpu(x.detach().clone())

    @staticmethod
    def backward(ctx, g):
        return g.host


class GpuGenerator(torch.Generator):
    "A generator whose state has 16 bytes, as on CUDA"

    states = []
    device = property(lambda self: CUDA)

    def __new__(cls):
        return super().__new__(cls, "cpu")

    def get_state(self):
        self.states.append(torch.Generator.get_state(self))
        return torch.tensor([len(self.states) - 1, 0]).view(torch.uint8)

    def set_state(self, state):
        if isinstance(state, OnGpu):
            raise TypeError("RNG state must be a torch.ByteTensor")
        if state.numel() != 16:
            raise RuntimeError("RNG state is wrong size")
        torch.Generator.set_state(self, self.states[int(state.clone().view(torch.long)[0])])
        return self


def means_gpu(device):
    return isinstance(device, str | torch.device) and torch.device(device).type == "cuda"


def where():
    "file:line of the innermost frame outside of torch and of this file"
    f, own = sys._getframe(1), (torch.__path__[0], __file__)
    while f and (f.f_code.co_filename.startswith(own) or "contextlib" in f.f_code.co_filename):
        f = f.f_back
    return f"{'/'.join(f.f_code.co_filename.split('/')[-2:])}:{f.f_lineno}" if f else "?"


class Dispatch(TorchDispatchMode):
    "Sees each operation: counts it, looks whether it waits, computes it on the CPU"

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        mine = [t for t in given if isinstance(t, OnGpu)]
        if not (mine or (not given and self.gpu.making)):
            return func(*args, **kwargs)
        self.gpu.ops.append(func._schema.name.split("::")[1])
        if mine:
            self.look(func, args, kwargs, given, self.gpu.ops[-1])
        here_args, here_kwargs = tree_map_only(OnGpu, lambda t: t.host, (args, kwargs))
        out = func(*here_args, **here_kwargs)
        if any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
            return self.written_to(func, args, kwargs)
        return tree_map_only(torch.Tensor, lambda t: t if isinstance(t, OnGpu) else OnGpu(t), out)

    def look(self, func, args, kwargs, given, name):
        wait, others = self.gpu.wait, [t for t in given if not isinstance(t, OnGpu)]
        by = [i for i in args[1] if i is not None] if name in INDEXING else []
        if others and name not in ("copy_", "_to_copy"):
            numbers = torch.Tag.pointwise in func.tags and all(t.dim() == 0 for t in others)
            if isinstance(args[0], OnGpu) and any(not isinstance(i, OnGpu) for i in by):
                wait("copy to device")
            elif not numbers and not by:
                raise TwoDevices(f"{func} at {where()}")
        if name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            wait(name)
        if any(i.dtype in (torch.bool, torch.uint8) for i in by):
            wait("boolean mask")
        if name == "copy_":
            to, from_ = (isinstance(t, OnGpu) for t in args[:2])
            at_leisure = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if to != from_ and not (to and at_leisure):
                wait("copy to device" if to else "copy to host")

    def written_to(self, func, args, kwargs):
        "What an operation writes to comes back as the very object"
        named = {}
        for i, a in enumerate(func._schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write:
                named[frozenset(a.alias_info.before_set)] = kwargs[a.name] if a.name in kwargs else args[i]
        res = [named[frozenset(r.alias_info.before_set)] for r in func._schema.returns]
        return res[0] if len(res) == 1 else tuple(res)


class Function(TorchFunctionMode):
    "Sees each call: those that name a device, or bring a tensor to another one"

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        gpu, kwargs, name = self.gpu, dict(kwargs or {}), getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        mine, device = isinstance(x, OnGpu), kwargs.get("device")
        if name == "_parse_to":  # it makes nothing
            return func(*args, **kwargs)
        if name in ("to", "cpu", "cuda") and x is not None:
            return self.to(name, x, list(args[1:]), kwargs)
        if mine and name in ("numpy", "__array__", "tolist", "__str__"):
            gpu.wait("copy to host")
            return x.host.tolist() if name == "tolist" else x.host.detach().numpy() if name != "__str__" else repr(x)
        if name == "pin_memory" and x is not None and not mine:
            pinned = x.clone()
            pinned.pinned = True
            return pinned
        there = means_gpu(device)
        generator = kwargs.get("generator")
        if generator is not None and device is not None and isinstance(generator, GpuGenerator) != there:
            raise RuntimeError(f"Expected a generator for {device} but found one for {generator.device}")
        if there and name in ("tensor", "as_tensor", "asarray") and not mine:
            gpu.wait("copy to device")
            return OnGpu(func(*args, **{**kwargs, "device": "cpu"}).clone())
        if there:
            kwargs["device"] = "cpu"
        if name in ("as_tensor", "asarray") and mine:
            kwargs.pop("device", None)
        beside = device is None and any(isinstance(t, OnGpu) for t in tree_flatten((args, kwargs))[0])
        with gpu.makes(there or beside):
            return func(*args, **kwargs)

    def to(self, name, x, args, kwargs):
        "`x.to(...)`, `x.cpu()`, `x.cuda()`"
        gpu, mine, device = self.gpu, isinstance(x, OnGpu), kwargs.pop("device", None)
        at_leisure = kwargs.pop("non_blocking", False) or any(a is True for a in args[1:2])
        if name != "to":
            device = "cpu" if name == "cpu" else CUDA
        for a in args:
            if isinstance(a, torch.Tensor):
                device, kwargs["dtype"] = a.device, a.dtype
            elif isinstance(a, torch.dtype):
                kwargs["dtype"] = a
            elif isinstance(a, str | torch.device):
                device = a
        there = means_gpu(device)

        def cast(t):
            return torch.Tensor.to(t, **kwargs) if any(v not in (None, False) for v in kwargs.values()) else t

        if device is None or there == mine:
            with gpu.makes(mine):
                return cast(x)
        if there:
            if not (at_leisure and getattr(x, "pinned", False)):  # what is not pinned is copied before the call is over
                gpu.wait("copy to device")
            gpu.ops.append("copy_")
            with gpu.makes(False):
                y = Arrives.apply(x) if x.requires_grad and torch.is_grad_enabled() else OnGpu(x.detach().clone())
            with gpu.makes(True):
                return cast(y)
        gpu.wait("a read before the copy is there" if at_leisure else "copy to host")
        with gpu.makes(False):
            return cast(x.host.detach().clone())


class Event:
    def __init__(self, enable_timing=False, **kwargs):
        self.t = None

    def record(self, stream=None):
        self.t = perf_counter()

    def synchronize(self):
        active[-1].wait("event.synchronize")

    def elapsed_time(self, other):
        return (other.t - self.t) * 1000

    def query(self):
        return True


class PretendCuda:
    "The make-believe GPU, while the context lasts"

    def __init__(self, strict=True):
        self.strict, self.waits, self.ops, self.making, self.may_wait = strict, [], [], False, False
        self.moved = {}  # parameter: what it became on the GPU

    @contextmanager
    def _with(self, **attrs):
        old = {k: getattr(self, k) for k in attrs}
        vars(self).update(attrs)
        try:
            yield
        finally:
            vars(self).update(old)

    def makes(self, on_gpu):
        "Are tensors that are made from nothing on the GPU?"
        return self._with(making=on_gpu)

    def allowed(self):
        "A context in which the host may wait"
        return self._with(may_wait=True)

    def wait(self, kind):
        if self.may_wait:
            return
        self.waits.append(Wait(kind, where()))
        if self.strict:
            raise HostWaits(f"{kind} at {self.waits[-1].where}")

    @property
    def launches(self):
        "How often each operation was launched"
        return Counter(op for op in self.ops if op not in VIEWS)

    def put(self, batch):
        "A tensor, or a tuple of them, on the GPU; nobody waits"
        return OnGpu(batch.clone()) if isinstance(batch, torch.Tensor) else tuple(self.put(t) for t in batch)

    def _module_to(self, old_to):
        "Parameters are replaced, since `.data =` would not change their type"

        def to(module, *args, **kwargs):
            device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            held = [*module.parameters(), *module.buffers()]
            if device is not None and dtype is None and all(means_gpu(device) == isinstance(p, OnGpu) for p in held):
                return module
            before = dict(module.named_parameters())
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            try:
                with torch.no_grad(), self.allowed():
                    old_to(module, *args, **kwargs)
            finally:
                torch.__future__.set_overwrite_module_params_on_conversion(False)
            self.moved.update({before[n]: p for n, p in module.named_parameters() if before[n] is not p})
            return module

        return to

    def _follow(self, opt, args, kwargs):
        "A real GPU keeps the parameter and changes what is in it"
        for group in opt.param_groups:
            group["params"] = [self.moved.get(p, p) for p in group["params"]]
        for p in [p for p in opt.state if p in self.moved]:
            opt.state[self.moved[p]] = opt.state.pop(p)

    def _stand_ins(self):
        real, stream = torch.Generator, type("Stream", (), dict(is_capturing=lambda self: False))()

        class Generator(real):
            def __new__(cls, device="cpu"):
                return GpuGenerator() if means_gpu(device) else real(device)

        yield torch, "Generator", Generator
        yield nn.Module, "to", self._module_to(nn.Module.to)
        yield torch.accelerator, "current_stream", lambda device=None: stream
        for name, value in dict(
            Event=Event,
            current_stream=lambda device=None: stream,
            synchronize=lambda device=None: self.wait("synchronize"),
            set_sync_debug_mode=lambda mode: setattr(self, "strict", mode == "error"),
            current_device=lambda: 0,
            get_rng_state=lambda device=None: torch.zeros(16, dtype=torch.uint8),
            set_rng_state=lambda state, device=None: None,
            get_rng_state_all=lambda: [],
            is_available=lambda: True,
            device_count=lambda: 1,
            is_current_stream_capturing=lambda: False,
            is_bf16_supported=lambda *args, **kwargs: True,
        ).items():
            yield torch.cuda, name, value

    def __enter__(self):
        self._stack = stack = ExitStack()
        as_subclass = torch._C.TensorBase.as_subclass
        torch.Tensor.as_subclass = lambda t, cls: t if cls is OnGpu else as_subclass(t, cls)  # fastai's `retain_type`
        stack.callback(lambda: delattr(torch.Tensor, "as_subclass"))
        stack.callback(register_optimizer_step_pre_hook(self._follow).remove)
        for owner, name, value in [*self._stand_ins()]:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        active.append(self)
        stack.callback(active.remove, self)
        self.dispatch = stack.enter_context(Dispatch(self))
        stack.enter_context(Function(self))
        return self

    def __exit__(self, *exc):
        return self._stack.__exit__(*exc)
