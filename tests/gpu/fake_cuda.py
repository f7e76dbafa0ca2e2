"""CUDA without a GPU: tensors that carry a device, a dtype and a shape but no numbers, and what a run does with them.

Inside `fake_cuda()` a tensor on the CPU is real and a tensor on "cuda:0" is fake (torch's `FakeTensorMode`). So real batches
can be collated and moved, and the model of a paper takes no memory at its full size. Observed are

* operations on two devices: they raise;
* waits for the device: a number or a shape that the host asks for, and copies that block;
* live bytes of the device (its allocator's blocks of 512; without what kernels need for themselves, or fragmentation);
* floating-point operations by dtype, which shows whether autocast is in force.

autograd's engine refuses a device without a driver, so `backward` walks the graph in Python. Attention is taken to run in
the kernels that a GPU would choose: flash for half precision without a mask, else memory-efficient. Not reached this way:
NCCL, DistributedDataParallel's buckets, pinned memory, torch.compile, and whether the numbers are right.
"""

import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

DEVICE = torch.device("cuda", 0)
HALF = (torch.float16, torch.bfloat16)
aten = torch.ops.aten
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
_SHAPES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
_BLOCK = 512
_attention = F.scaled_dot_product_attention


class FakeCuda(TorchDispatchMode):
    """What happened on the device so far.

    Attributes:
        waits: "what, at which line" -> how often the host waited for the device.
        live: bytes that are alive.
        peak: most of them at a time.
        flops: dtype of the first operand -> floating-point operations of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.live = self.peak = 0
        self.flops: Counter[torch.dtype] = Counter()
        self._storages: dict[int, weakref.ref] = {}

    def start(self) -> None:
        """Count waits, operations and the peak anew."""
        self.waits.clear()
        self.flops.clear()
        self.peak = self.live

    @property
    def half_share(self) -> float:
        """Share of the operations that are computed in half precision."""
        return sum(self.flops[dtype] for dtype in HALF) / max(1, sum(self.flops.values()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        device = kwargs.get("device")
        to_device = device is not None and torch.device(device).type == "cuda"
        if not to_device and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            kwargs.pop("pin_memory", None)
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        args, found = self._look(func, args, kwargs, device)
        if found is not None:
            return found
        out = func(*args, **kwargs)
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        packet = getattr(func, "_overloadpacket", None)
        if packet in flop_registry and tensors:
            self.flops[tensors[0].dtype] += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def _look(self, func: Any, args: Any, kwargs: Any, device: Any) -> tuple[Any, Any]:
        """Note waits. Returns the arguments to go on with, and the result where no kernel can give one."""
        if func is aten._local_scalar_dense.default:
            self._wait("a number is read")
            dtype = args[0].dtype
            return args, 0.0 if dtype.is_floating_point else True if dtype == torch.bool else 0
        if func is aten._to_copy.default and device is not None and torch.device(device).type != args[0].device.type:
            if args[0].numel() and not kwargs.get("non_blocking"):
                self._wait(f"{args[0].device.type} -> {torch.device(device).type} blocks")
            if torch.device(device).type == "cpu":
                with unset_fake_temporarily():
                    return args, torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and args[0].device.type != args[1].device.type:
            if args[0].numel() and not (kwargs.get("non_blocking") or args[2:3] == (True,)):
                self._wait(f"{args[1].device.type} -> {args[0].device.type} blocks")
            return args, args[0]
        if func in _SHAPES:
            self._wait(f"{func.__name__.split('.')[0]} asks for a shape")
            assert func is aten.nonzero.default, func
            return args, torch.zeros(0, args[0].dim(), dtype=torch.int64, device=args[0].device)
        if func in _INDEXING:
            return (args[0], self._indices(args[0], args[1]), *args[2:]), None
        return args, None

    def _indices(self, indexed: Tensor, indices: Any) -> list[Any]:
        """Indices without boolean masks, each of which is taken to hold one true element."""
        result = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
                self._wait("a boolean mask asks for a shape")
                result += [torch.zeros(1, dtype=torch.int64, device=indexed.device) for _ in range(index.dim())]
            else:
                if isinstance(index, Tensor) and index.device != indexed.device and index.dim():
                    self._wait(f"an index on {index.device.type} is copied")
                result.append(index)
        return result

    def _wait(self, what: str) -> None:
        frames = [
            frame
            for frame in traceback.extract_stack()
            if "/torch/" not in frame.filename and frame.filename != __file__
        ]
        where = [
            f"{frame.filename.rpartition('/src/')[2].split('site-packages/')[-1]}:{frame.lineno}" for frame in frames
        ]
        self.waits[f"{what}, at {' < '.join(where[:-4:-1])}"] += 1

    def _note(self, tensor: Tensor) -> None:
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self.live += size
        self.peak = max(self.peak, self.live)
        self._storages[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key: int, size: int) -> None:
        self.live -= size
        self._storages.pop(key, None)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *more: Any, **options: Any) -> Tensor:
    """`scaled_dot_product_attention` by the kernel that a GPU would choose; the choice itself needs a driver."""
    if not query.is_cuda:
        return _attention(query, key, value, attn_mask, *more, **options)
    return _attend_on_device(query, key, value, attn_mask, *more, **options)


def _attend_on_device(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for part in (key, value))
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (part.to(dtype) for part in (query, key, value))
    if attn_mask is None and query.dtype in HALF:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


class _Saved:
    """A tensor that a node of the graph keeps until it has been used."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor


class _Walk:
    """`backward` in Python, in the engine's order. What a node has saved is released when it is done."""

    def __init__(self) -> None:
        self._used: list[_Saved] = []

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(_Saved, self._unpack)

    def _unpack(self, saved: _Saved) -> Tensor:
        self._used.append(saved)
        assert saved.tensor is not None, "a second backward pass"
        return saved.tensor

    @torch.no_grad()
    def backward(self, loss: Tensor) -> None:
        root = loss.grad_fn
        waiting, seen, stack = Counter[Any](), {root}, [root]
        while stack:
            for following, _number in stack.pop().next_functions:
                if following is not None:
                    waiting[following] += 1
                    if following not in seen:
                        seen.add(following)
                        stack.append(following)
        del seen
        grads: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss)}}
        ready = [root]
        while ready:
            ready.sort(key=lambda node: node._sequence_nr())
            node = ready.pop()
            given = grads.pop(node, {})
            outs = self._run(node, given)
            for (following, number), grad in zip(node.next_functions, outs):
                if following is None:
                    continue
                if grad is not None:
                    slot = grads.setdefault(following, {})
                    like = following.variable if hasattr(following, "variable") else following._input_metadata[number]
                    grad = _fitted(grad, like)
                    slot[number] = slot[number] + grad if number in slot else grad
                waiting[following] -= 1
                if not waiting[following]:
                    ready.append(following)

    def _run(self, node: Any, given: dict[int, Tensor]) -> tuple[Any, ...]:
        if hasattr(node, "variable"):  # a leaf
            if 0 in given:
                node.variable.grad = given[0] if node.variable.grad is None else node.variable.grad + given[0]
            return ()
        if not given:
            return (None,) * len(node.next_functions)
        gradients = [
            _fitted(given[number], like) if number in given else None
            for number, like in enumerate(node._input_metadata)
        ]
        call = node.apply if hasattr(node, "apply") and not callable(node) else node
        outs = call(*gradients)
        for saved in self._used:
            saved.tensor = None
        self._used.clear()
        return outs if isinstance(outs, tuple) else (outs,)


def _fitted(grad: Tensor, like: Any) -> Tensor:
    """As the engine: summed to the shape and cast to the dtype of what it belongs to."""
    if tuple(grad.shape) != tuple(like.shape):
        grad = grad.sum_to_size(tuple(like.shape))
    assert grad.device == like.device, f"a gradient on {grad.device} for a tensor on {like.device}"
    return grad if grad.dtype == like.dtype else grad.to(like.dtype)


def _apply(self: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` with new parameters: torch's own exchanges the data of the old ones, which fakes refuse."""
    memo: dict[int, nn.Parameter] = {}
    for module in self.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in memo:
                    with torch.no_grad():
                        changed = change(parameter)
                    same = changed is parameter
                    memo[id(parameter)] = parameter if same else nn.Parameter(changed, parameter.requires_grad)
                    memo[id(memo[id(parameter)])] = memo[id(parameter)]
                module._parameters[name] = memo[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
    return self


def on_device(module: nn.Module) -> Any:
    """A module that was built on the meta device, with fake parameters and buffers on the GPU."""
    return _apply(module, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE))


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Context in which "cuda:0" exists."""
    found, walk = FakeCuda(), _Walk()
    with ExitStack() as stack:
        for target, name, value in (
            (torch.Tensor, "backward", lambda loss, *_, **__: walk.backward(loss)),
            (nn.Module, "_apply", _apply),
            (F, "scaled_dot_product_attention", _attend),
            # Without CUDA autocast and GradScaler turn themselves off.
            (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
            (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
            (torch.cuda, "mem_get_info", lambda *_: (8 << 30, 80 << 30)),
            # Recomputation of activations keeps its results for one task of the engine.
            (torch._C, "_current_graph_task_id", lambda: 1),
            # In inference mode operations arrive before they are taken apart.
            (torch, "inference_mode", lambda mode=True: torch.no_grad() if mode else nullcontext()),
            # Its joint kernel of a whole attention layer has no known number of operations.
            (torch.backends.mha, "_is_fastpath_enabled", False),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(found)
        stack.enter_context(walk.hooks())
        yield found
