"""Compiled functions that are called without looking at each signature."""

import gc
import weakref

import numpy as np
import pytest
import tensorflow as tf

from kaccum.tensorflow.calls import CompiledCall


def is_there(argument):
    """Which parts of a nested argument are no `None`."""
    return tf.constant([x is not None for x in tf.nest.flatten(argument)])


X, Y, W = tf.ones((4, 2)), 2.0 * tf.ones((4, 2)), 3.0 * tf.ones((4, 2))


@pytest.mark.parametrize(
    "arguments",
    [
        [(X, Y, None), (X, None, W), (X, Y, W), (X, Y, None)],
        [{"a": X, "b": Y}, {"b": W, "a": X}, {"a": X, "c": W}],
        [X, tf.ones((3, 2)), tf.ones((4, 2), "int32"), np.ones((4, 2)), X],
        [(X, (Y, W)), ((X, Y), W), (X, Y, W)],
        [
            tf.ragged.constant([[1], [2, 3]]),
            tf.ragged.constant([[1, 2, 3]]),
            tf.ragged.constant([[1], [2, 3]]),
        ],
        [tf.sparse.eye(3), tf.sparse.eye(2), X],
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
        return is_there(argument), tf.stack(sums)

    compiled = CompiledCall(function)
    for argument in arguments * 2:
        for found, expected in zip(compiled(argument), function(argument)):
            assert np.array_equal(found, expected)


def test_a_call_is_traced_once_for_calls_alike():
    """Law 10."""
    traces = []
    compiled = CompiledCall(lambda pair: traces.append(1) or pair[0] + pair[1])
    for i in range(5):
        pair = (tf.constant(float(i)), tf.constant(1.0))
        assert float(compiled(pair)) == i + 1
    compiled((tf.ones(2), tf.ones(2)))
    compiled((tf.constant(0.0), tf.constant(0.0)))
    assert len(traces) == 2


def test_iterators_are_pulled_and_let_go():
    """Laws 4 and 5: each is its own, and none is kept."""
    traces = []

    def function(iterator):
        traces.append(1)
        return iterator.get_next()

    compiled = CompiledCall(function)
    first = iter(tf.data.Dataset.range(0, 10))
    second = iter(tf.data.Dataset.range(5, 10))
    pulled = [int(compiled(it)) for it in (first, first, second, first)]
    assert pulled == [0, 1, 5, 2]
    assert len(traces) == 1
    kept = weakref.ref(second)
    compiled(second)
    del second
    gc.collect()
    assert kept() is not None
    compiled.forget()
    gc.collect()
    assert kept() is None
