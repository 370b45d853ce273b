"""What a run will need, from its real architecture without weights and without a device.

The denoiser is built on the ``meta`` device and takes one training step there; what it keeps alive
is counted tensor by tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpletuner.adapters.method import attach
from simpletuner.adapters.settings import STARTS
from simpletuner.cache.controls import encoded_beside
from simpletuner.core.seeds import Seeds
from simpletuner.core.types import Batch, Geometry, ParamGroup, Place, Sample
from simpletuner.diffusion.objective import objective_of
from simpletuner.models.control import PICTURE
from simpletuner.models.encoders import TextEncoders
from simpletuner.optim.build import build_optimizer
from simpletuner.optim.optimizers import OPTIMIZERS
from simpletuner.precision.dtypes import run_dtype
from simpletuner.precision.fit import fit
from simpletuner.precision.offload import groups_of
from simpletuner.precision.plan import PlanRow
from simpletuner.precision.quantise import Quantised, Quantiser, foreseen
from simpletuner.training.held import held_in
from simpletuner.training.precision_plan import precision_plan

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.adapters.method import Trainable
    from simpletuner.config.root import Config
    from simpletuner.data.source import DataSource
    from simpletuner.models.family import Family

_META = torch.device("meta")


@dataclass(frozen=True)
class Estimate:
    """Bytes, by what they are for; `weights` and `trained` count weights.

    Args:
        weights: Of the denoiser.
        trained: Those that train.
        base: What holds the denoiser's weights, but for those that train beside adapters.
        waiting: Those of them that are in the computer's memory at any one time.
        encoders: What holds text encoders that stay loaded because some of them train.
        adapters: What holds trained weights apart from that; 0 for full fine-tuning.
        gradients: Of what trains.
        optimizer: What the optimizer remembers.
        average: The EMA's copy, on the device or beside the CPU as ema_device says.
        average_on_device: True if it takes the device's memory.
        activations: What a step holds besides, at most: for the largest batch, gradients aside.
        cache: Of latents and captions on the disk.
        width: The largest batch's pictures, px.
        height: The same.
        batch: Samples in it.
        plan: What each part is held in.
    """

    weights: int
    trained: int
    base: int
    waiting: int
    encoders: int
    adapters: int
    gradients: int
    optimizer: int
    average: int
    average_on_device: bool
    activations: int
    cache: int
    width: int
    height: int
    batch: int
    plan: tuple[PlanRow, ...]

    @property
    def device(self) -> int:
        """All that a training step holds on the device."""
        held = self.base - self.waiting + self.encoders + self.adapters + self.gradients
        held += self.optimizer + self.activations
        return held + self.average * self.average_on_device


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that were made under it and are still there.

    Attributes:
        now: Bytes alive.
        peak: The most there were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._held: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run `func` and count what it made."""
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._held:
            return
        self._held[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._held.pop(key)


class _Fused(torch.autograd.Function):
    """Attention as the fused kernels keep it: inputs, output and one fp32 number a row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = query.new_empty(*query.shape[:-1], value.shape[-1])
        rows = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, answer, rows)
        return answer

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        query, key, value, _, _ = ctx.saved_tensors
        return tuple(torch.empty_like(each) for each in (query, key, value))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Off a device torch knows attention only with its matrix of all pairs, which no kernel keeps.

    A function mode would not do: it is off while gradients are computed, so recomputed blocks would
    take the other way.
    """

    def fused(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        return _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]

    functional = torch.nn.functional
    stock = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = fused  # diffusers looks it up at each call
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock


def estimate(
    config: Config,
    family: Family,
    sources: Sequence[DataSource],
    beside: Sequence[DataSource] = (),
) -> Estimate:
    """What the run of `config` needs.

    Args:
        config: The settings.
        family: With a checkpoint whose configs are here.
        sources: What is trained on.
        beside: What is only cached: sets to measure by.
    """
    dtype = run_dtype(config.precision)
    held = held_in(config)
    denoiser = family.blueprint(held)
    own = {id(p): p.numel() for p in denoiser.parameters()}
    weights = sum(own.values())
    whole = config.adapter.trains == "full"
    waiting = _waiting(denoiser, config)
    shrunk = foreseen(denoiser, family.denoiser, config.precision.base_model_precision)
    # where adapters start costs nothing, and needs weights
    chosen = config.adapter.model_copy(update={"lora_init_type": "default", "init_lora": None})
    trains_text = config.adapter.train_text_encoder
    encoders = TextEncoders.blueprint(family, Place(_META, dtype)) if trains_text else None
    told = {family.denoiser: shrunk, **_encoders_foreseen(config, encoders)}
    trainable = attach(denoiser, family, chosen, encoders)
    plan = precision_plan(config, family, trainable, told, unopened="not counted")
    for module in trainable.modules:
        Module.to(module, _META, dtype)
    all_there = {"enable_group_offload": False, "musubi_blocks_to_swap": 0}
    fit(trainable.modules, config.precision.model_copy(update=all_there), _META)
    count = sum(p.numel() for p in trainable.parameters().values())
    named = 0 if whole else sum(own.get(id(p), 0) for p in trainable.parameters().values())
    nets = [m for m in trainable.modules if m is not denoiser] if not encoders else []
    net = sum(t.numel() for each in nets for t in (*each.parameters(), *each.buffers()))
    wide = held.itemsize if whole else 4
    width, height = _largest(sources)
    activations = _activations(config, family, trainable, dtype, width, height)
    if dtype != torch.float32:  # autocast keeps a copy of each weight it casts
        activations += (weights * (whole and held != dtype) + net + named) * dtype.itemsize
    return Estimate(
        weights=weights,
        trained=count,
        base=shrunk.after - named * held.itemsize,
        waiting=waiting * shrunk.after // max(shrunk.before, 1),
        encoders=sum(each.after for part, each in told.items() if part != family.denoiser),
        adapters=0 if whole else net * 4 or _adapters(config, count, named),
        gradients=count * (4 if config.optimizer.gradient_precision == "fp32" else wide),
        optimizer=_remembered(config, trainable, held if whole else torch.float32),
        average=count * 4 if config.adapter.use_ema else 0,
        average_on_device=config.adapter.ema_device == "accelerator",
        activations=activations,
        cache=cache_bytes(family, [*sources, *beside], dtype, keeps_text=not trains_text),
        width=width,
        height=height,
        batch=config.schedule.train_batch_size,
        plan=tuple(plan),
    )


def _adapters(config: Config, count: int, named: int) -> int:
    """Bytes of `count` weights in fp32, with what adapters start from; `named` are no adapters'."""
    started = 1 + (config.adapter.lora_init_type in STARTS)
    return ((count - named) * started + named) * 4


def _encoders_foreseen(config: Config, encoders: TextEncoders | None) -> dict[str, Quantised]:
    """What becomes of text encoders that stay loaded, in the formats that the settings name."""
    formats = Quantiser(config.precision)
    found = encoders.modules.items() if encoders else ()
    return {part: foreseen(module, part, formats.format(part)) for part, module in found}


def _waiting(denoiser: Module, config: Config) -> int:
    """Bytes of frozen weights off the device, as they are before they are quantised."""
    if not config.precision.offloads:
        return 0
    sizes = [group.nbytes for group in groups_of(denoiser, config.precision)]
    return sum(sizes) - max(sizes, default=0)


def _largest(sources: Sequence[DataSource]) -> tuple[int, int]:
    """Width and height in px of the shape with the most of them."""
    shapes = {(int(w), int(h)) for source in sources for w, h in source.buckets.tolist()}
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def _activations(
    config: Config,
    family: Family,
    trainable: Trainable,
    dtype: torch.dtype,
    width: int,
    height: int,
) -> int:
    """Bytes that one micro-batch of a step holds at most, gradients of weights aside."""
    count, controlled = config.schedule.train_batch_size, config.adapter.controlnet
    batch = example_batch(family, count, width, height, controlled=controlled)
    batch = batch.to(Place(_META, dtype))
    objective = objective_of(family.prediction_type, family.scheduler_config, config.diffusion)

    def step() -> Tensor:
        t = objective.timesteps(torch.full((len(batch.samples),), 0.5).double(), 1)
        draw = objective.draw(batch.latents, t, torch.zeros_like(batch.latents))
        return (trainable.predict(family, draw, batch) - draw.target).square().mean()

    peak = peak_of(step)
    grads = [p.grad for p in trainable.parameters().values() if p.grad is not None]
    return peak - sum(grad.nbytes for grad in grads)


def peak_of(step: Callable[[], Tensor]) -> int:
    """The most bytes alive while `step` gives a loss and that goes backward."""
    with _fused_attention(), Live() as live:
        step().backward()  # type: ignore[no-untyped-call]
        return live.peak


def example_batch(
    family: Family, count: int, width: int, height: int, *, controlled: bool = False
) -> Batch:
    """A batch of zeros in the shapes that the caches of `family` give, on ``meta``."""
    geometry = Geometry((width, height), (width, height), (0, 0, width, height))
    samples = tuple(Sample(f"{n:032x}", "set", f"{n}", "", geometry) for n in range(count))
    channels, factor = family.latent_shape
    with _META:
        latents = torch.zeros(count, channels, height // factor, width // factor)
        embeds = {
            name: torch.zeros(
                count, *shape, dtype=torch.bool if name.endswith("_mask") else torch.float32
            )
            for name, shape in family.text_shapes.items()
        }
        told = family.drawn(samples, 0, Seeds(0))
        controls = {name: value.to(_META) for name, value in told.items()}
        if controlled and family.control is not None:
            pixels = family.control.picture == "pixels"
            seen = torch.zeros(count, 3, height, width) if pixels else latents
            controls[PICTURE] = seen
    return Batch(latents, embeds, samples, controls=controls)


def _remembered(config: Config, trainable: Trainable, dtype: torch.dtype) -> int:
    """Bytes of the optimizer's state after a step on ``meta``.

    An optimizer that reads values takes it on the CPU, with one parameter of each shape.
    """
    name = config.optimizer.optimizer
    if not OPTIMIZERS[name].fact("syncs") and not name.startswith("bnb-"):
        return _state_bytes(config, trainable.groups(), dtype, _META)
    found: dict[tuple[int, ...], int] = {}
    total = 0
    for each in trainable.parameters().values():
        shape = tuple(each.shape)
        if shape not in found:
            alone = {"alone": torch.nn.Parameter(torch.zeros(shape))}
            group = ParamGroup("alone", alone)
            found[shape] = _state_bytes(config, [group], dtype, torch.device("cpu"))
        total += found[shape]
    return total


def _state_bytes(
    config: Config, groups: Sequence[ParamGroup], dtype: torch.dtype, device: torch.device
) -> int:
    parameters = [p for group in groups for p in group.parameters.values()]
    for parameter in parameters:
        parameter.grad, parameter.data = None, parameter.data.to(device, dtype)
    optimizer = build_optimizer(config.optimizer, list(groups), Seeds(0))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter, dtype=parameter.grad_dtype)
    optimizer.step()
    values = [v for state in optimizer.state.values() for v in tree_leaves(state)]
    return sum(v.nbytes for v in values if isinstance(v, torch.Tensor) and v.ndim)


def cache_bytes(
    family: Family, sources: Sequence[DataSource], dtype: torch.dtype, *, keeps_text: bool = True
) -> int:
    """Latents of every picture and the conditioning of every caption, without the files' heads."""
    channels, factor = family.latent_shape
    pictures = [*sources, *encoded_beside(family, sources)]
    cells = sum(int((each.buckets // factor).prod(1).sum()) for each in pictures)
    captions = set[str]().union(*(source.all_captions() for source in sources)) | {""}
    if not keeps_text:
        captions.clear()
    each = sum(
        torch.Size(shape).numel() * (1 if name.endswith("_mask") else dtype.itemsize)
        for name, shape in family.text_shapes.items()
    )
    return cells * channels * 4 + len(captions) * each
