"""Sizes against the published table and against the condition that defines them."""

import math

import pytest

from jaxkd.sparsity import iso_flop


@pytest.mark.parametrize(
    ("sparsity", "branches", "width"),
    [
        (0.0, 1, 64),
        (0.5, 2, 90),
        (0.6, 2, 90),  # 2.5 rounds to even
        (0.75, 4, 128),
        (0.8, 5, 143),
        (0.9, 10, 202),
        (0.95, 20, 286),
        (0.99, 100, 640),
    ],
)
def test_branches_and_widths_are_those_of_the_table(sparsity, branches, width):
    assert iso_flop.branches(sparsity) == branches
    assert iso_flop.widening(sparsity) == math.sqrt(branches)
    assert iso_flop.wide_features(64, sparsity=sparsity) == width
    # Stages stay multiples of the first; other widths are cut on their own.
    assert iso_flop.wide_features(512, sparsity=sparsity) == 8 * width
    other = iso_flop.wide_features(24, sparsity=sparsity)
    assert other == int(24 * math.sqrt(branches))


@pytest.mark.parametrize(
    ("f_in", "f_out", "factorized", "doped"),
    [
        (64, 64, (116, 231, 577), (28, 43, 51)),
        (512, 512, (922, 1844, 4609), (230, 345, 414)),
    ],
)
def test_ranks_are_those_of_the_table(f_in, f_out, factorized, doped):
    for s, first, second in zip((0.5, 0.75, 0.9), factorized, doped, strict=True):
        assert iso_flop.factorized_rank(f_in, f_out, sparsity=s) == first
        assert iso_flop.doped_rank(f_in, f_out, sparsity=s) == second


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("taps", [1, 9, 25])
@pytest.mark.parametrize(("f_in", "f_out", "groups"), [(24, 96, 1), (48, 32, 4)])
def test_ranks_are_the_first_that_cost_as_much(sparsity, taps, f_in, f_out, groups):
    dense = taps * f_in * f_out / groups

    def factors(rank):
        return rank * (taps * f_in + f_out) / groups

    sizes = dict(sparsity=sparsity, taps=taps, groups=groups)
    rank = iso_flop.factorized_rank(f_in, f_out, **sizes)
    assert rank % groups == 0
    assert (1 - sparsity) * factors(rank) >= dense * (1 - 1e-9)
    assert (1 - sparsity) * factors(rank - groups) < dense
    rank = iso_flop.doped_rank(f_in, f_out, **sizes)
    assert rank % groups == 0
    assert (1 - sparsity) * dense + factors(rank) <= dense * (1 + 1e-9)
    assert (1 - sparsity) * dense + factors(rank + groups) > dense
    rank = iso_flop.factorized_rank(f_in, f_out, second_dense=True, **sizes)
    mixed = ((1 - sparsity) * taps * f_in + f_out) / groups
    assert (rank - groups) * mixed < dense <= rank * mixed * (1 + 1e-9)


def test_tiny_layers_have_no_room_for_a_dense_term():
    assert iso_flop.doped_rank(2, 1, sparsity=0.5, taps=1) == 0


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.8, 0.9, 0.99, 0.0, 2 / 3])
def test_sparsities_that_fit(sparsity):
    iso_flop.check_branches(sparsity)


@pytest.mark.parametrize("sparsity", [0.6, 0.7, 0.3, 0.85])
def test_sparsities_that_do_not_fit_name_their_neighbours(sparsity):
    with pytest.raises(ValueError, match="is not iso-FLOP") as caught:
        iso_flop.check_branches(sparsity)
    words = str(caught.value).replace(",", " ").split()
    first, second = (float(words[words.index(w) + 1]) for w in ("take", "or"))
    assert first < sparsity < second
    for near in (first, second):
        iso_flop.check_branches(near)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_impossible_sparsities(sparsity):
    for function in (
        iso_flop.branches,
        lambda s: iso_flop.factorized_rank(8, 8, sparsity=s),
        lambda s: iso_flop.doped_rank(8, 8, sparsity=s),
    ):
        with pytest.raises(ValueError, match="sparsity must be >= 0 and < 1"):
            function(sparsity)


def test_the_search_meets_the_budget_by_the_published_steps():
    asked = []

    def cost(sparsity):
        asked.append(sparsity)
        return round(1e6 * (1 - sparsity))

    found = iso_flop.search_sparsity(cost, 400_000)
    assert abs(cost(found) - 400_000) <= 400
    # Halves of [0, 0.9999], the bounds moved by 1e-4 past the middle.
    assert asked[:3] == pytest.approx([0.49995, 0.749975, 0.6249625])


def test_the_search_takes_the_nearest_where_steps_are_coarse():
    # One number of 200 is half a percent, more than the tolerance of the search.
    found = iso_flop.search_sparsity(lambda s: 200 - int(200 * s), 101)
    assert abs((200 - int(200 * found)) - 101) <= 1


def test_a_budget_out_of_reach():
    with pytest.raises(ValueError, match="no sparsity makes the network cost 10"):
        iso_flop.search_sparsity(lambda s: 100, 10)


def test_training_costs():
    assert iso_flop.static_training_flops(7) == 21
    # 99 sparse steps, and one whose gradient of the kernels is dense.
    assert iso_flop.rigl_training_flops(2.0, 8.0, every=100) == pytest.approx(
        (100 * 3 * 2.0 + 2 * 2.0 + 8.0) / 101
    )
    assert iso_flop.rigl_training_flops(5.0, 5.0) == pytest.approx(15)
    with pytest.raises(ValueError, match="every must be >= 1"):
        iso_flop.rigl_training_flops(1.0, 1.0, every=0)
