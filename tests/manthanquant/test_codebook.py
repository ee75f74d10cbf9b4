import pytest

from manthanquant.codebook import INT8_LIMIT, codebook, gaussian_mse, lloyd_max, midpoints

SEED_LEVELS = (0.2451, 0.7560, 1.3439, 2.1520)
SEED_BOUNDARIES = (0.0, 0.5006, 1.0500, 1.7480)


def test_three_bits_are_the_seeds_constants():
    levels = lloyd_max(3)
    assert levels[4:] == pytest.approx(SEED_LEVELS, abs=1e-4)
    assert midpoints(levels)[3:] == pytest.approx(SEED_BOUNDARIES, abs=1e-4)
    assert gaussian_mse(levels) == pytest.approx(0.03455, abs=1e-5)


@pytest.mark.parametrize(("bits", "mse"), [(2, 0.1175), (3, 0.03455), (4, 0.009501)])
def test_distortion_of_the_optimum_and_of_its_rounding(bits, mse):
    exact = gaussian_mse(lloyd_max(bits))
    assert exact == pytest.approx(mse, rel=1e-3)
    book = codebook(bits)
    assert book.distortion == pytest.approx(gaussian_mse(book.levels))
    assert exact <= book.distortion < exact * 1.004


@pytest.mark.parametrize("bits", INT8_LIMIT)
def test_levels_fit_a_signed_byte_and_are_symmetric(bits):
    levels = codebook(bits).int8_levels
    assert len(levels) == 2**bits and list(levels) == sorted(set(levels))
    assert levels == tuple(-x for x in reversed(levels))
    assert max(levels) <= INT8_LIMIT[bits]
    held = [x + 63.5 for x in levels] if bits == 4 else levels
    assert all(x == int(x) for x in held)


def test_a_width_without_a_codebook_is_refused():
    with pytest.raises(ValueError, match="code width 5 is not supported"):
        codebook(5)
