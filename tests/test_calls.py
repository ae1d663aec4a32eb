"""Compiled functions that are called without looking at each signature."""

import gc
import weakref

import numpy as np
import pytest

from tests.backends import needs_graphs, tf

pytestmark = needs_graphs


def nesting(argument):
    """How an argument is nested; in a dict any order is the same."""
    if isinstance(argument, dict):
        argument = dict(sorted(argument.items()))
    return repr(tf.nest.map_structure(lambda part: part is None, argument))


def compiled_call(function):
    """The function, called without looking at each signature."""
    # Elsewhere there is no TensorFlow to import.
    from kaccum.backends.tensorflow.calls import CompiledCall

    return CompiledCall(function)


def tensors():
    """Three that differ."""
    return [float(i) * tf.ones((4, 2)) for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "arguments",
    [
        lambda x, y, w: [(x, y, None), (x, None, w), (x, y, w), (x, y, None)],
        lambda x, y, w: [{"a": x, "b": y}, {"b": w, "a": x}, {"a": x, "c": w}],
        lambda x, y, w: [
            x,
            tf.ones((3, 2)),
            tf.ones((4, 2), "int32"),
            np.ones((4, 2)),
            x,
        ],
        lambda x, y, w: [(x, (y, w)), ((x, y), w), (x, y, w)],
        lambda x, y, w: [
            tf.ragged.constant([[1], [2, 3]]),
            tf.ragged.constant([[1, 2, 3]]),
            tf.ragged.constant([[1], [2, 3]]),
        ],
        lambda x, y, w: [tf.sparse.eye(3), tf.sparse.eye(2), x],
    ],
    ids=["none", "dict", "shape", "nesting", "ragged", "sparse"],
)
def test_a_call_is_that_of_a_function_not_compiled(arguments):
    """Law 1: whatever the call before was of."""

    def function(argument):
        flat = tf.nest.flatten(argument, expand_composites=True)
        sums = [
            tf.reduce_sum(tf.cast(tensor, "float32"))
            for tensor in flat
            if tensor is not None
        ]
        return tf.constant(nesting(argument)), tf.stack(sums)

    compiled = compiled_call(function)
    for argument in arguments(*tensors()) * 2:
        for found, expected in zip(compiled(argument), function(argument)):
            assert np.array_equal(found.numpy(), expected.numpy())


def test_a_call_is_traced_once_for_calls_alike():
    """Law 10."""
    traces = []
    compiled = compiled_call(lambda pair: traces.append(1) or pair[0] + pair[1])
    for i in range(5):
        pair = (tf.constant(float(i)), tf.constant(1.0))
        assert float(compiled(pair)) == i + 1
    compiled((tf.ones(2), tf.ones(2)))
    compiled((tf.constant(0.0), tf.constant(0.0)))
    assert len(traces) == 2


def test_an_error_while_tracing_is_raised_each_time():
    """What was traced before is not taken for it."""

    def function(argument):
        if isinstance(argument[0], tuple):
            raise ValueError("mine")
        return argument[0]

    compiled = compiled_call(function)
    x, y, w = tensors()
    compiled((x, (y, w)))
    for _ in range(2):
        with pytest.raises(ValueError, match="mine"):
            compiled(((x, y), w))
    assert np.array_equal(compiled((y, (y, w))), y)


def test_iterators_and_batches_in_turn():
    """An iterator seen before is not taken for like the last argument."""

    def function(source):
        is_iterator = isinstance(source, tf.data.Iterator)
        return source.get_next() if is_iterator else -source

    compiled = compiled_call(function)
    iterator = iter(tf.data.Dataset.range(1, 10))
    batch = tf.constant(5, "int64")
    sources = (iterator, batch, iterator, batch, batch, iterator)
    found = [int(compiled(source)) for source in sources]
    assert found == [1, -5, 2, -5, -5, 3]


def test_iterators_are_pulled_and_let_go():
    """Laws 4 and 5: each is its own, and none is kept."""
    traces = []

    def function(iterator):
        traces.append(1)
        return iterator.get_next()

    compiled = compiled_call(function)
    first = iter(tf.data.Dataset.range(0, 10))
    second = iter(tf.data.Dataset.range(5, 10))
    pulled = [int(compiled(it)) for it in (first, first, second, first)]
    assert pulled == [0, 1, 5, 2]
    assert len(traces) == 1
    other = iter(tf.data.Dataset.from_tensors((7, 8)).repeat())
    found = [compiled(it) for it in (first, other, first, other, other)]
    assert [int(tf.reduce_sum(f)) for f in found] == [3, 15, 4, 15, 15]
    kept = weakref.ref(second)
    compiled(second)
    del second
    gc.collect()
    assert kept() is not None
    compiled.forget()
    gc.collect()
    assert kept() is None
