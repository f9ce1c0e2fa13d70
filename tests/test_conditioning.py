"""The condition: what is unknown is not read, what is dropped, and guidance around the network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dosmatgen_ase.dos import MODEL_GRID
from dosmatgen_ase.model.conditioning import ConditionalDenoiser, ConditionDropout, DOSCondition, Guidance
from dosmatgen_ase.model.diffusion.process import NoisyCrystals, Prediction

BINS = 151
SIZE = 4


def noise(size: int = SIZE, batch: int = 2, seed: int = 0) -> NoisyCrystals:
    """Random crystals whose species are all masked."""
    generator = torch.Generator().manual_seed(seed)
    level = torch.full((batch,), 0.5)
    return NoisyCrystals(
        torch.randn(batch, 6, generator=generator),
        torch.rand(batch, size, 3, generator=generator),
        torch.zeros(batch, size, dtype=torch.int64),
        torch.full((batch,), size),
        level,
        level[:, None].expand(batch, size),
    )


def random_condition(size: int = SIZE, batch: int = 2, seed: int = 1) -> DOSCondition:
    """Every site and the total, each known in about half of the bins."""
    generator = torch.Generator().manual_seed(seed)
    site = torch.rand(batch, size, BINS, generator=generator)
    total = site.sum(1)
    known = torch.rand(batch, size, BINS, generator=generator) < 0.5
    return DOSCondition(site, known, total, torch.rand(batch, BINS, generator=generator) < 0.5)


def equal(a: Prediction, b: Prediction) -> bool:
    """Bit for bit."""
    return all(torch.equal(v, getattr(b, k)) for k, v in a.__dict__.items())


# -- what the network reads --------------------------------------------------------------------------------------------


def test_values_at_unknown_bins_do_not_matter_bit_for_bit(tiny_model: ConditionalDenoiser) -> None:
    condition = random_condition()
    other = DOSCondition(
        torch.where(condition.site_known, condition.site, 7.0),
        condition.site_known,
        torch.where(condition.total_known, condition.total, 1e6),
        condition.total_known,
    )
    assert equal(tiny_model(noise(), condition), tiny_model(noise(), other))
    assert torch.equal(tiny_model.encoder.size_logits(condition), tiny_model.encoder.size_logits(other))


@pytest.mark.parametrize("field", ["site", "site_known", "total", "total_known"])
def test_what_is_known_does_matter(field: str, tiny_model: ConditionalDenoiser) -> None:
    condition = random_condition()
    value = getattr(condition, field).clone()
    if field.endswith("known"):
        value[0] = ~value[0]
    else:
        value[0] = value[0] + getattr(condition, f"{field}_known")[0]
    changed = tiny_model(noise(), replace(condition, **{field: value}))
    expected = tiny_model(noise(), condition)
    assert not torch.equal(changed.species[0], expected.species[0])
    assert torch.equal(changed.species[1], expected.species[1])  # the other crystal


def test_an_unknown_dos_is_not_a_dos_of_zero(tiny_model: ConditionalDenoiser) -> None:
    unknown = DOSCondition.none(2, SIZE, BINS)
    zero = replace(unknown, site_known=torch.ones_like(unknown.site_known))
    assert not equal(tiny_model(noise(), unknown), tiny_model(noise(), zero))
    assert equal(tiny_model(noise(), unknown), tiny_model(noise(), None))


def test_a_site_without_a_target_gets_the_learned_null(tiny_model: ConditionalDenoiser) -> None:
    condition = random_condition()
    condition.site_known[:, 2] = False
    condition.total_known[:] = False
    encoder = tiny_model.encoder
    embedded = encoder(condition, torch.full((2,), SIZE))
    torch.testing.assert_close(embedded[:, 2], (encoder.null_site + encoder.null_total).expand(2, -1))


def test_swapped_targets_swap_the_outputs(tiny_model: ConditionalDenoiser) -> None:
    """Sites 0 and 1 are equivalent by inversion at the origin, so that only their targets tell them apart."""
    state = noise(batch=1, size=2)
    x = torch.tensor([0.2, 0.1, 0.3])
    state.frac_coords[0] = torch.stack([x, 1 - x])
    condition = replace(random_condition(2, 1), total_known=torch.zeros(1, BINS, dtype=torch.bool))
    swapped = replace(condition, site=condition.site.flip(1), site_known=condition.site_known.flip(1))
    a, b = tiny_model(state, condition), tiny_model(state, swapped)
    assert a.site_dos is not None
    assert b.site_dos is not None
    torch.testing.assert_close(b.species, a.species.flip(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.site_dos, a.site_dos.flip(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.coords, -a.coords.flip(1), rtol=1e-4, atol=1e-5)  # inversion turns vectors
    torch.testing.assert_close(b.lattice, a.lattice, rtol=1e-4, atol=1e-5)
    assert float((b.species - a.species).abs().max()) > 1e-3  # the targets do matter


def test_the_total_is_read_per_atom(tiny_model: ConditionalDenoiser) -> None:
    """A supercell has as many times the total: the embedding must not see a difference."""
    condition = random_condition(batch=1)
    larger = replace(condition, total=2 * condition.total)
    a = tiny_model.encoder(condition, torch.tensor([SIZE]))
    torch.testing.assert_close(tiny_model.encoder(larger, torch.tensor([2 * SIZE])), a)
    assert not torch.allclose(tiny_model.encoder(larger, torch.tensor([SIZE])), a)


def test_size_logits_do_not_depend_on_the_order_of_sites(tiny_model: ConditionalDenoiser) -> None:
    condition = random_condition()
    flipped = replace(condition, site=condition.site.flip(1), site_known=condition.site_known.flip(1))
    logits = tiny_model.encoder.size_logits(condition)
    torch.testing.assert_close(tiny_model.encoder.size_logits(flipped), logits)
    nothing = tiny_model.encoder.size_logits(DOSCondition.none(2, SIZE, BINS))
    assert logits.shape == nothing.shape == (2, 21)
    assert not torch.allclose(nothing, logits)


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_scale_zero_ignores_the_dos_bit_for_bit(tiny_model: ConditionalDenoiser) -> None:
    state = noise()
    unconditional, passes = Guidance(1.0).wrap(tiny_model, None)(state, 0.5)
    for seed in (1, 2):
        prediction, same = Guidance(0.0).wrap(tiny_model, random_condition(seed=seed))(state, 0.5)
        assert equal(prediction, unconditional)
        assert (passes, same) == (1, 1)


def test_scale_one_is_the_conditional_network_bit_for_bit(tiny_model: ConditionalDenoiser) -> None:
    condition = random_condition()
    prediction, passes = Guidance(1.0).wrap(tiny_model, condition)(noise(), 0.5)
    assert equal(prediction, tiny_model(noise(), condition))
    assert passes == 1


@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
def test_guidance_formula(scale: float, tiny_model: ConditionalDenoiser) -> None:
    state, condition = noise(), random_condition()
    prediction, passes = Guidance(scale).wrap(tiny_model, condition)(state, 0.5)
    with_dos, without = tiny_model(state, condition), tiny_model(state, None)
    for name, value in prediction.__dict__.items():
        a, b = getattr(with_dos, name), getattr(without, name)
        torch.testing.assert_close(value, b + scale * (a - b), rtol=1e-4, atol=1e-5)
    assert passes == 2
    assert not torch.allclose(prediction.species, with_dos.species, atol=1e-5)


def test_outside_the_interval_the_scale_is_one(tiny_model: ConditionalDenoiser) -> None:
    state, condition = noise(), random_condition()
    denoise = Guidance(3.0, (0.2, 0.6)).wrap(tiny_model, condition)
    plain = tiny_model(state, condition)
    for t, passes in ((1.0, 1), (0.61, 1), (0.6, 2), (0.4, 2), (0.2, 2), (0.19, 1)):
        prediction, taken = denoise(state, t)
        assert taken == passes
        assert equal(prediction, plain) == (passes == 1)
    ignored, _ = Guidance(0.0, (0.2, 0.6)).wrap(tiny_model, condition)(state, 1.0)
    assert equal(ignored, tiny_model(state, None))  # scale 0 ignores the DOS everywhere


# -- dropout -----------------------------------------------------------------------------------------------------------

NOTHING = ConditionDropout(0.0, 0.0, 0.0, 0.0, 0.0, shift=0.0, scale=0.0)
BINS = MODEL_GRID.size


def dropped(dropout: ConditionDropout, batch: int = 4000) -> tuple[DOSCondition, DOSCondition, Tensor]:
    """A fully known condition, what is shown of it, and the mask of real sites (three of four)."""
    site = torch.rand(batch, SIZE, BINS, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([True, True, True, False]).expand(batch, SIZE)
    full = DOSCondition(
        site, mask[..., None].expand_as(site).clone(), site.sum(1), torch.ones(batch, BINS, dtype=torch.bool)
    )
    return full, dropout(full, mask, torch.Generator().manual_seed(1)), mask


def rate(condition: Tensor) -> float:
    return float(condition.float().mean())


TOLERANCE = 4 * 0.5 / 4000**0.5


def test_without_dropout_all_sites_are_shown_and_the_total_is_not() -> None:
    full, shown, _ = dropped(NOTHING)
    assert torch.equal(shown.site_known, full.site_known)
    assert torch.equal(shown.site, full.site)
    assert not shown.total_known.any()


def test_structure_dropout() -> None:
    _, shown, _ = dropped(replace(NOTHING, structure=0.3, total=1.0))
    nothing = ~shown.site_known.flatten(1).any(1) & ~shown.total_known.any(1)
    assert rate(nothing) == pytest.approx(0.3, abs=TOLERANCE)


def test_a_single_site_is_any_real_site() -> None:
    _, shown, _ = dropped(replace(NOTHING, single_site=0.6))
    sites = shown.site_known.any(-1)
    single = sites.sum(1) == 1
    assert rate(single) == pytest.approx(0.6, abs=TOLERANCE)
    assert set(sites.sum(1).tolist()) == {1, 3}
    for i in range(3):
        assert rate(sites[single][:, i]) == pytest.approx(1 / 3, abs=2 * TOLERANCE)
    assert not sites[:, 3].any()  # padding


def test_some_sites_have_a_rate_of_their_own() -> None:
    """Each site is kept at a uniform rate per structure: the number of sites kept is uniform over 0 to 3."""
    _, shown, _ = dropped(replace(NOTHING, some_sites=1.0))
    count = shown.site_known.any(-1).sum(1)
    for k in range(4):
        assert rate(count == k) == pytest.approx(0.25, abs=TOLERANCE)


def test_windows_are_contiguous_and_shared_by_the_sites() -> None:
    _, shown, _ = dropped(replace(NOTHING, window=0.5))
    known = shown.site_known[:, :3]
    assert torch.equal(known, known[:, :1].expand_as(known))
    edges = known[:, 0].long().diff(dim=1, prepend=torch.zeros(4000, 1), append=torch.zeros(4000, 1)).abs().sum(1)
    assert set(edges.tolist()) <= {0.0, 2.0}  # at most one window
    assert rate(known[:, 0].all(1)) == pytest.approx(0.5, abs=TOLERANCE)
    width = known[:, 0].sum(1)[~known[:, 0].all(1)].float()
    assert float(width.mean()) == pytest.approx(BINS / 3, abs=4)  # the distance of two uniform ends


def test_the_total_is_added_or_replaces_the_sites() -> None:
    _, shown, _ = dropped(replace(NOTHING, total=0.4))
    total, sites = shown.total_known.any(1), shown.site_known.flatten(1).any(1)
    assert rate(total) == pytest.approx(0.4, abs=TOLERANCE)
    assert rate(total & ~sites) == pytest.approx(0.2, abs=TOLERANCE)
    assert not (~total & ~sites).any()


def test_nothing_unknown_becomes_known() -> None:
    condition = random_condition(batch=200)
    mask = torch.ones(200, SIZE, dtype=torch.bool)
    dropout = ConditionDropout(shift=0.0, scale=0.0)
    shown = dropout(condition, mask, torch.Generator().manual_seed(0))
    assert not (shown.site_known & ~condition.site_known).any()
    assert not (shown.total_known & ~condition.total_known).any()


def test_shift_moves_values_and_known_bins_together() -> None:
    full, _, mask = dropped(NOTHING)
    energies = torch.tensor(MODEL_GRID.energies).float()  # a linear function comes back exactly
    marked = DOSCondition(
        energies.expand(4000, SIZE, BINS), full.site_known, energies.expand(4000, BINS), full.total_known
    )
    shown = replace(NOTHING, shift=1.0, total=1.0)(marked, mask, torch.Generator().manual_seed(1))
    known = shown.total_known
    shift = torch.where(known, energies - shown.total, torch.nan)
    mean = shift.nanmean(1)
    assert float((shift - mean[:, None]).nan_to_num().abs().max()) < 1e-3  # rigid
    assert float(mean.std()) == pytest.approx(1.0, abs=0.05)
    lost = BINS - known.sum(1)
    gone = mean.abs() / MODEL_GRID.step  # what leaves the grid becomes unknown, rounded up to whole bins
    assert ((lost >= gone - 0.01) & (lost <= gone + 1.01)).all()
    both = shown.site_known[:, 0] & known
    assert torch.equal(shown.site[:, 0][both], shown.total[both])


def test_scale_is_common_to_a_structure() -> None:
    full, shown, _ = dropped(replace(NOTHING, scale=0.1, total=1.0))
    ratio = (shown.site / full.site).flatten(1)
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    torch.testing.assert_close((shown.total / full.total), ratio[:, :BINS])
    assert float(ratio[:, 0].log().std()) == pytest.approx(0.1, abs=0.01)
    assert float(ratio[:, 0].log().mean()) == pytest.approx(0.0, abs=0.01)


def test_dropout_is_reproducible() -> None:
    (_, a, _), (_, b, _) = dropped(ConditionDropout(), 50), dropped(ConditionDropout(), 50)
    assert all(torch.equal(v, getattr(b, k)) for k, v in a.__dict__.items())
