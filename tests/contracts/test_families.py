"""What every model family keeps, on real classes of diffusers at tiny size.

The families are those of the table: another is tested by being there, with a builder in tests/tiny.
Letters: B batch, C channels, H W latent cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from simpletuner.adapters import controlnet
from simpletuner.adapters.controlnet import Controlled
from simpletuner.adapters.export import LORA_FILE
from simpletuner.adapters.formats import FORMATS, read_changes, write_changes
from simpletuner.adapters.lora import LoRA, attach
from simpletuner.adapters.settings import AdapterSettings
from simpletuner.core.types import Batch, Draw, Geometry, Place, Sample
from simpletuner.diffusion.objective import objective_of
from simpletuner.models.control import PICTURE
from simpletuner.models.encoders import TextEncoders
from simpletuner.models.families import FAMILIES
from simpletuner.models.family import Family
from simpletuner.models.loading import open_family
from simpletuner.models.settings import ModelSettings
from simpletuner.precision.fit import fit
from simpletuner.precision.quantise import quantise
from simpletuner.precision.settings import PrecisionSettings
from tests.tiny.build import BUILDERS

BUILT = [name for name, row in FAMILIES.items() if not row.pending]
CPU = Place(torch.device("cpu"), torch.float32)
CAPTIONS = ("a photo of a cat in the snow", "", "a dog", "a photo of a cat in the snow " * 30)
WIDTH, HEIGHT = 64, 96  # px
RANK = 4


@dataclass(frozen=True)
class Tiny:
    """A family with its tiny model."""

    name: str
    folder: Path

    @cached_property
    def family(self) -> Family:
        settings = ModelSettings(
            model_family=self.name, pretrained_model_name_or_path=str(self.folder)
        )
        return open_family(settings)

    @cached_property
    def embeds(self) -> list[Mapping[str, Tensor]]:
        """The conditioning of CAPTIONS, encoded together."""
        return self.family.encode_text(self.family.open_text(CPU), CAPTIONS)  # type: ignore[return-value]

    @cached_property
    def channels(self) -> int:
        vae = self.family.open_vae(CPU.device, torch.float32)
        return int(vae.config.latent_channels)

    def stock(self, net: nn.Module | None = None) -> Any:
        """The stock pipeline; with a net the one that takes it."""
        name, more = self.family.pipeline, {}
        if net is not None and self.family.control is not None:
            name, more = self.family.control.pipeline, {"controlnet": net}
        pipe = getattr(diffusers, name).from_pretrained(self.folder, **more)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def batch(self, rows: Sequence[int]) -> Batch:
        """Those of CAPTIONS with latents of their own."""
        whole = Geometry((WIDTH, HEIGHT), (WIDTH, HEIGHT), (0, 0, WIDTH, HEIGHT))
        samples = tuple(Sample(f"{row:032x}", "set", "", CAPTIONS[row], whole) for row in rows)
        embeds = {
            name: torch.stack([self.embeds[row][name] for row in rows]) for name in self.embeds[0]
        }
        latents = torch.stack([self.noise(row) for row in rows])
        return Batch(latents, embeds, samples)

    def noise(self, seed: int) -> Tensor:
        """[C, H, W]"""
        shape = (self.channels, HEIGHT // 8, WIDTH // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    def draw(self, batch: Batch) -> Draw:
        objective = objective_of(
            self.family.prediction_type, self.family.checkpoint.scheduler_config
        )
        count = len(batch.latents)
        t = torch.linspace(10, 990, count + 2)[1:-1].round().long()
        noise = torch.stack([self.noise(100 + row) for row in range(count)])
        return objective.draw(batch.latents, t, noise)

    def adapted(self, denoiser: nn.Module, alpha: float = 6.0, **more: Any) -> LoRA:
        """`denoiser` with a LoRA that does something."""
        torch.manual_seed(1)
        settings = AdapterSettings(lora_rank=RANK, lora_alpha=alpha, **more)
        lora = attach(denoiser, self.family, settings)
        with torch.no_grad():
            for weight in lora.parameters().values():
                weight.normal_(std=0.1)
        return lora


@pytest.fixture(scope="module", params=BUILT)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """One family and its model, opened once; read it only."""
    name = request.param
    return Tiny(name, BUILDERS[name](tmp_path_factory.mktemp("contract") / name))


@pytest.fixture(scope="module", params=[n for n in BUILT if FAMILIES[n].fact("trained_text")])
def texted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """One whose text encoders can train, likewise."""
    name = request.param
    return Tiny(name, BUILDERS[name](tmp_path_factory.mktemp("texted") / name))


@pytest.fixture(scope="module", params=[n for n in BUILT if FAMILIES[n].fact("control")])
def controllable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The same of a family with a ControlNet."""
    name = request.param
    return Tiny(name, BUILDERS[name](tmp_path_factory.mktemp("controllable") / name))


def loss_of(tiny: Tiny, denoiser: nn.Module, batch: Batch) -> Tensor:
    draw = tiny.draw(batch)
    return (tiny.family.predict(denoiser, draw, batch) - draw.target).square().mean()


def test_every_family_that_is_built_has_a_tiny_model_and_every_tiny_model_a_family() -> None:
    assert sorted(BUILDERS) == BUILT


# --- sampling -------------------------------------------------------------------------------------


def euler(scheduler: Any) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Timestep, sigma and the way one step down for a denoiser that answers noise - x0."""
    for t, (now, after) in zip(scheduler.timesteps, pairwise(scheduler.sigmas), strict=True):
        yield t, now, lambda x, answer, now=now, after=after: x + (after - now) * answer


def ddim(scheduler: Any, kind: str) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """The same for a denoiser that answers the noise or v, by DDIM without noise of its own."""
    abars = scheduler.alphas_cumprod
    stride = len(abars) // len(scheduler.timesteps)

    def down(x: Tensor, answer: Tensor, now: Tensor, after: Tensor) -> Tensor:
        signal, spread = now.sqrt(), (1 - now).sqrt()
        if kind == "epsilon":
            noise, clean = answer, (x - spread * answer) / signal
        else:
            noise, clean = spread * x + signal * answer, signal * x - spread * answer
        return after.sqrt() * clean + (1 - after).sqrt() * noise

    for t in scheduler.timesteps:
        now, after = abars[t], abars[max(int(t) - stride, 0)]
        yield t, (1 - now).sqrt(), partial(down, now=now, after=after)


def sampled(
    tiny: Tiny, steps: int = 8, controlled: Controlled | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Latents by a plain loop over `predict`, by the stock pipeline, and its picture, [1, …]."""
    family, pipe = tiny.family, tiny.stock(controlled and controlled.net)
    kind = family.prediction_type
    if kind != "flow_matching":
        plain = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading"}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **plain)
    told = {name: value for name, value in family.prompt_arguments.items() if value is not None}
    paint = partial(
        pipe,
        prompt=CAPTIONS[0],
        width=WIDTH,
        height=HEIGHT,
        guidance_scale=1.0,
        num_inference_steps=steps,
        **told,
    )
    batch = tiny.batch([0])
    if controlled is not None and family.control is not None:
        noise = np.random.default_rng(4).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        image = Image.fromarray(noise)
        seen = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        if family.control.picture == "latents":
            vae, drawn = family.open_vae(CPU.device, CPU.dtype), torch.Generator().manual_seed(5)
            seen = family.encode_pixels(vae, seen * 2 - 1, [drawn])
        batch = replace(batch, controls={PICTURE: seen})
        paint = partial(paint, **{family.control.argument: image})
        torch.manual_seed(5)  # which the stock pipeline encodes the control picture by
    output = paint(output_type="latent", generator=torch.Generator().manual_seed(3)).images
    stock = family.sampled_latents(output, WIDTH, HEIGHT)
    picture = paint(output_type="pt", generator=torch.Generator().manual_seed(3)).images

    denoiser, latents = family.open_denoiser(CPU).eval(), tiny.noise(3)[None]
    walk = euler(pipe.scheduler) if kind == "flow_matching" else ddim(pipe.scheduler, kind)
    for t, sigma, down in walk:
        draw = Draw(latents, latents, latents, sigma.view(1), t.float().view(1), torch.ones(1))
        with torch.no_grad():
            answer = (
                controlled.predict(family, draw, batch)
                if controlled
                else family.predict(denoiser, draw, batch)
            )
        latents = down(latents, answer)
    return latents, stock, picture


def test_predict_in_a_sampler_loop_gives_the_stock_pipelines_latents_and_picture(
    tiny: Tiny,
) -> None:
    ours, stock, picture = sampled(tiny)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    assert (stock - tiny.noise(3)).abs().max() > 0.1
    pixels = tiny.family.decode_latents(tiny.family.open_vae(CPU.device, torch.float32), ours)
    torch.testing.assert_close((pixels / 2 + 0.5).clamp(0, 1), picture, atol=1e-5, rtol=1e-5)


def test_the_shapes_that_are_told_are_those_that_are_cached(tiny: Tiny) -> None:
    """What `simpletuner estimate` builds its batch of."""
    told = {name: tuple(shape) for name, shape in tiny.family.text_shapes.items()}
    assert told == {name: tuple(value.shape) for name, value in tiny.embeds[0].items()}
    vae = tiny.family.open_vae(CPU.device, torch.float32)
    pixels = torch.zeros(1, 3, HEIGHT, WIDTH)
    latents = tiny.family.encode_pixels(vae, pixels, [torch.Generator()])
    channels, factor = tiny.family.latent_shape
    assert tuple(latents.shape[1:]) == (channels, HEIGHT // factor, WIDTH // factor)


def test_predict_with_a_net_in_a_sampler_loop_gives_the_latents_of_the_stock_pipeline(
    controllable: Tiny,
) -> None:
    tiny = controllable
    torch.manual_seed(1)
    settings = AdapterSettings(model_type="full", controlnet=True)
    controlled = controlnet.attach(tiny.family.open_denoiser(CPU), tiny.family, settings)
    with torch.no_grad():
        for weight in controlled.parameters().values():
            if not weight.any():  # a new net adds nothing
                weight.normal_(std=0.1)
    controlled.net.eval()
    ours, stock, _ = sampled(tiny, controlled=controlled)
    torch.testing.assert_close(ours, stock, atol=1e-5, rtol=1e-5)
    assert (stock - sampled(tiny)[1]).abs().max() > 0.1


def test_a_picture_is_encoded_and_decoded_as_its_vae_does(tiny: Tiny) -> None:
    vae = tiny.family.open_vae(CPU.device, torch.float32)
    pixels = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = tiny.family.encode_pixels(vae, pixels, [torch.Generator().manual_seed(1)])
    raw = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(1))
    config = vae.config
    wanted = (raw - (config.get("shift_factor") or 0)) * config["scaling_factor"]
    torch.testing.assert_close(latents, wanted, atol=1e-5, rtol=1e-5)
    back = tiny.family.decode_latents(vae, latents)
    torch.testing.assert_close(back, vae.decode(raw).sample, atol=1e-4, rtol=1e-4)


def test_the_sampler_is_the_stock_pipeline_without_text_encoders(tiny: Tiny) -> None:
    family = tiny.family
    vae = family.open_vae(CPU.device, torch.float32)
    pipe = family.open_sampler(family.open_denoiser(CPU), vae)
    assert type(pipe) is type(tiny.stock())
    assert all(pipe.components[part] is None for part in family.text_parts)


# --- conditioning ---------------------------------------------------------------------------------


def test_captions_are_encoded_alone_as_together_and_have_what_the_cache_keeps(tiny: Tiny) -> None:
    pipe = tiny.family.open_text(CPU)
    for caption, together in zip(CAPTIONS, tiny.embeds, strict=True):
        (alone,) = tiny.family.encode_text(pipe, [caption])
        assert alone.keys() == together.keys() == tiny.family.layouts.keys()
        for name, value in together.items():
            torch.testing.assert_close(alone[name], value, atol=1e-5, rtol=1e-5)
    assert not torch.equal(tiny.embeds[0]["prompt_embeds"], tiny.embeds[2]["prompt_embeds"])


def test_captions_of_different_lengths_predict_in_one_batch_what_they_do_alone(tiny: Tiny) -> None:
    denoiser, batch = tiny.family.open_denoiser(CPU), tiny.batch([0, 1, 2, 3])
    draw = tiny.draw(batch)
    with torch.no_grad():
        together = tiny.family.predict(denoiser, draw, batch)
        assert together.shape == draw.target.shape
        assert together.dtype == torch.float32
        for row in range(4):
            one = Draw(*(value[row : row + 1] for value in vars(draw).values()))
            alone = tiny.family.predict(denoiser, one, tiny.batch([row]))
            torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


def test_predict_leaves_its_inputs_as_they_were(tiny: Tiny) -> None:
    denoiser, batch = tiny.family.open_denoiser(CPU), tiny.batch([0, 3])
    draw = tiny.draw(batch)
    given = [*vars(draw).values(), batch.latents, *batch.embeds.values()]
    before = [value.clone() for value in given]
    tiny.family.predict(denoiser, draw, batch)
    assert all(torch.equal(value, was) for value, was in zip(given, before, strict=True))


# --- training -------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient_and_keeps_less_the_smaller_its_interval(
    tiny: Tiny,
) -> None:
    """Diffusers' Chroma gets it wrong; what is kept is counted by saved-tensor hooks."""
    found: list[dict[str, Tensor]] = []
    kept: list[int] = []
    for interval in (None, 2, 1):
        lora, batch = tiny.adapted(tiny.family.open_denoiser(CPU)), tiny.batch([0, 3])
        settings = {} if interval is None else {"gradient_checkpointing_interval": interval}
        fit(
            lora.modules,
            PrecisionSettings(gradient_checkpointing=interval is not None, **settings),
            CPU.device,
        )
        held: dict[int, int] = {}

        def keep(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = loss_of(tiny, lora.denoiser, batch)
        kept.append(sum(held.values()))
        loss.backward()
        found.append({name: p.grad for name, p in lora.parameters().items() if p.grad is not None})
    assert all(value.abs().sum() > 0 for value in found[0].values())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-7, rtol=1e-6)
    assert kept[0] > kept[1] > kept[2]


def test_a_lora_learns_over_an_int8_base_that_is_near_the_plain_one(tiny: Tiny) -> None:
    plain, held = tiny.family.open_denoiser(CPU), tiny.family.open_denoiser(CPU)
    told = quantise(held, tiny.family.denoiser, "int8-quanto", CPU.device, via="cpu")
    assert told.layers > 0
    batch = tiny.batch([0, 2])
    draw = tiny.draw(batch)
    with torch.no_grad():
        exact, near = (tiny.family.predict(each, draw, batch) for each in (plain, held))
    assert 0 < (near - exact).norm() / exact.norm() < 0.05

    lora = tiny.adapted(held)
    optimizer = torch.optim.AdamW(lora.parameters().values(), lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = loss_of(tiny, held, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


# --- the LoRA's file ------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [None, ("norm1",)])
def test_the_exported_lora_is_the_trained_model_in_the_stock_pipeline(
    tiny: Tiny, tmp_path: Path, whole: tuple[str, ...] | None
) -> None:
    lora = tiny.adapted(tiny.family.open_denoiser(CPU), trainable_models=whole)
    files = lora.export(tmp_path, {})
    beside = tmp_path / f"{tiny.family.denoiser}_weights.safetensors"
    assert files == [tmp_path / LORA_FILE, *([beside] if whole else [])]
    verified = lora.verify(files[0])
    assert verified.matched == verified.modules
    assert (verified.modules == len(lora.layers())) == (whole is None)

    pipe = tiny.stock()
    if whole:
        denoiser = pipe.components[tiny.family.denoiser]
        assert not denoiser.load_state_dict(load_file(beside), strict=False).unexpected_keys
    pipe.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    stock, batch = pipe.components[tiny.family.denoiser], tiny.batch([0, 3])
    draw = tiny.draw(batch)
    with torch.no_grad():
        ours, theirs, untouched = (
            tiny.family.predict(each, draw, batch)
            for each in (lora.denoiser, stock, tiny.family.open_denoiser(CPU))
        )
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    assert (ours - untouched).abs().max() > 1e-3


def test_every_adapter_of_the_text_encoders_learns_and_goes_through_every_layout(
    texted: Tiny, tmp_path: Path
) -> None:
    tiny = texted
    encoders, family = TextEncoders.opened(tiny.family, CPU), type(tiny.family)
    lora = attach(
        tiny.family.open_denoiser(CPU), tiny.family, AdapterSettings(lora_rank=RANK), encoders
    )
    with torch.no_grad():
        for weight in lora.parameters().values():
            weight += 0.1 * torch.randn(weight.shape)
    batch = replace(tiny.batch([0, 1, 2]), embeds={})
    draw = tiny.draw(batch)
    (lora.predict(tiny.family, draw, batch) - draw.target).square().mean().backward()
    assert [n for n, p in lora.parameters().items() if p.grad is None or not p.grad.any()] == []
    named = {name.partition(".")[0] for name in lora.groups()[1].parameters}
    assert named == set(tiny.family.trained_text)

    (file,) = lora.export(tmp_path, {})
    assert (
        str(lora.verify(file)) == f"verified: {len(lora.layers())} of {len(lora.layers())} modules"
    )
    pipe = tiny.stock()
    pipe.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    stock: Any = TextEncoders(tiny.family, pipe, CPU).shown(CAPTIONS[:3])
    for name, ours in encoders.shown(CAPTIONS[:3]).items():
        torch.testing.assert_close(stock[name], ours, atol=1e-5, rtol=1e-5)
    names, changes = family.names_of(lora.denoiser), read_changes(file, family)
    assert set(changes) == set(lora.layers())
    wanted = changes
    for layout in FORMATS:
        other = tmp_path / f"{layout}.safetensors"
        write_changes(other, changes, layout, family, {}, names)
        changes = read_changes(other, family, names)
        assert set(changes) == set(wanted)
        for name, change in changes.items():
            torch.testing.assert_close(change.delta(), wanted[name].delta(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, RANK / 2, RANK, 2.0 * RANK])
def test_the_change_is_the_same_through_every_layout_and_back_into_an_adapter(
    tiny: Tiny, alpha: float, tmp_path: Path
) -> None:
    lora, family = tiny.adapted(tiny.family.open_denoiser(CPU), alpha), type(tiny.family)
    names = family.names_of(lora.denoiser)
    (first,) = lora.export(tmp_path, {})
    wanted = read_changes(first, family)
    assert set(wanted) == set(lora.layers())
    changes = wanted
    for layout in (*FORMATS, *reversed(FORMATS)):
        file = tmp_path / f"{layout}.safetensors"
        write_changes(file, changes, layout, family, {}, names)
        changes = read_changes(file, family, names)
        assert set(changes) == set(wanted)
        for name, change in changes.items():
            torch.testing.assert_close(change.delta(), wanted[name].delta(), atol=1e-6, rtol=1e-5)

    again = tiny.adapted(tiny.family.open_denoiser(CPU), alpha)
    for weight in again.parameters().values():
        weight.data.zero_()
    again.start_from(tmp_path / "kohya.safetensors", family)
    batch = tiny.batch([2])
    draw = tiny.draw(batch)
    with torch.no_grad():
        before, after = (tiny.family.predict(x.denoiser, draw, batch) for x in (lora, again))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
