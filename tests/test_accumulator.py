"""The accumulator on plain arrays, against NumPy in float64."""

import hypothesis
import keras
import numpy as np
from hypothesis import strategies as st
from keras import ops

from kaccum import GradientAccumulator
from tests.backends import needs_sparse, only_on, tf
from tests.profiles import drawn

VARIABLES = [keras.Variable(np.zeros(3, "float32")) for _ in range(2)]


def accumulator(seen):
    """An accumulator whose update appends to `seen`."""
    return GradientAccumulator(
        keras.optimizers.SGD(), apply=lambda grads, _: seen.append(grads)
    )


gradients = st.lists(
    st.floats(-100, 100, width=32, allow_subnormal=False),
    min_size=3,
    max_size=3,
)
micro_batches = st.tuples(
    st.floats(0.125, 64, width=32),
    st.tuples(st.none() | gradients, st.none() | gradients),
)


@drawn(300)
@hypothesis.given(st.lists(st.lists(micro_batches, min_size=1), max_size=3))
def test_an_update_gets_the_weighted_mean(windows):
    """Laws 2, 4 and 8, window after window."""
    seen = []
    sums = accumulator(seen)
    for window in windows:
        for weight, grads in window:
            grads = [
                None if g is None else ops.array(g, "float32") for g in grads
            ]
            sums.add(grads, VARIABLES, weight)
        sums.apply()
        total = sum(weight for weight, _ in window)
        for i, gradient in enumerate(seen[-1]):
            terms = [
                weight * np.array(grads[i])
                for weight, grads in window
                if grads[i] is not None
            ]
            if not terms:
                assert gradient is None
                continue
            size = sum(np.abs(t) for t in terms) / total
            gradient = ops.convert_to_numpy(gradient)
            error = np.abs(gradient - sum(terms) / total)
            assert np.all(error <= (len(window) + 4) * 2.0**-23 * size + 1e-30)


def test_sums_of_half_precision_are_float32():
    """Law 9: 512 ones sum to 256 in bfloat16."""
    seen = []
    variable = keras.Variable(np.zeros(1), dtype="bfloat16")
    sums = accumulator(seen)
    for _ in range(512):
        sums.add([ops.ones(1, "bfloat16")], [variable], None)
    sums.apply()
    dtype = keras.backend.standardize_dtype(seen[0][0].dtype)
    assert dtype == "bfloat16"
    assert float(seen[0][0][0]) == 512.0


@only_on("tensorflow", "torch", reason="64 bits are turned off")
def test_sums_of_float64_are_float64():
    """Law 9: nothing is lost of a double."""
    seen = []
    variable = keras.Variable(np.zeros(1), dtype="float64")
    sums = accumulator(seen)
    for value in (1.0, 2.0**-40):
        sums.add([ops.array([value], "float64")], [variable], None)
    sums.apply()
    assert float(seen[0][0][0]) == 1.0 + 2.0**-40
    sums = accumulator(seen)
    for weight in (3, 4):
        sums.add([ops.ones(1, "float64")], [variable], weight)
    sums.apply()
    assert abs(float(seen[1][0][0]) - 1.0) < 1e-15


@needs_sparse
def test_repeated_rows_of_a_sparse_gradient_add_up():
    """Law 8: the row that occurs twice counts twice."""
    seen = []
    variable = keras.Variable(np.zeros((3, 1), "float32"))
    sums = accumulator(seen)
    values = tf.constant([[1.0], [2.0], [4.0]])
    rows = tf.IndexedSlices(values, [0, 2, 2], [3, 1])
    sums.add([rows], [variable], 2.0)
    sums.add([rows], [variable], 2.0)
    sums.apply()
    np.testing.assert_array_equal(seen[0][0], [[1.0], [0.0], [6.0]])


def test_a_window_without_weight_has_a_gradient_of_zero():
    """All weights zero: as in the large batch, zero and not NaN."""
    seen = []
    sums = accumulator(seen)
    sums.add([ops.ones(3), None], VARIABLES, 0.0)
    sums.apply()
    gradient = ops.convert_to_numpy(seen[0][0])
    np.testing.assert_array_equal(gradient, np.zeros(3))


def test_variables_that_are_overwritten_get_the_largest_value():
    """Scales of float8 layers are maxima, which do not add up."""
    seen = []
    variable = keras.Variable(np.zeros(1, "float32"))
    variable.overwrite_with_gradient = True
    sums = accumulator(seen)
    for value in (1.0, 3.0, 2.0):
        sums.add([ops.array([value])], [variable], 8.0)
    sums.apply()
    assert float(seen[0][0][0]) == 3.0
