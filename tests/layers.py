"""Layers that fail, run out of memory, or keep a state of their own."""

import keras

from tests.backends import BACKEND, out_of_memory_in_a_step, tf, through


def unchanged(array):
    """Lets an array pass."""
    return array


class Watched(keras.layers.Layer):
    """Shows its inputs, or their gradient, to a function of the host."""

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def call(self, inputs, training=None):
        # Where the loss is only measured, nothing is.
        if training is False:
            return inputs
        return through(inputs, self.see, unchanged)

    def see(self, array):
        """Returns the array, or raises."""
        raise NotImplementedError


class Failing(Watched):
    """Raises `error` while it computes, whenever there is one."""

    error = None

    def see(self, array):
        if Failing.error is not None:
            raise Failing.error
        return array


class Hungry(Watched):
    """Runs out of memory above `limit` examples, as a device does.

    With `patience`, only after as many micro-batches since the last time, if
    they are below twice the limit.
    """

    @classmethod
    def feed(
        cls, limit, fails_in="forward", patience=0, *, replica=None, error=None
    ):
        """Begins anew.

        Args:
            limit: As many examples fit; all do if it is `None`.
            fails_in: Whether the "forward" or the "backward" pass fails.
            patience: How many micro-batches above the limit fit all the same.
            replica: The one that fails, if the others do not.
            error: What is raised; by default one of memory.
        """
        cls.limit, cls.fails_in, cls.patience = limit, fails_in, patience
        cls.replica, cls.error = replica, error or out_of_memory_in_a_step()
        cls.seen, cls.failed, cls.larger = [], [], 0

    def see(self, array):
        size = len(array)
        Hungry.seen.append(size)
        if Hungry.limit is not None and size > Hungry.limit:
            Hungry.larger += 1
            is_enough = Hungry.larger > Hungry.patience
            if is_enough or size >= 2 * Hungry.limit:
                Hungry.larger = 0
                Hungry.failed.append(size)
                raise Hungry.error
        return array

    def call(self, inputs, training=None):
        if training is False:
            return inputs
        if Hungry.replica not in (None, _replica()):
            return inputs
        pair = [unchanged, self.see]
        if Hungry.fails_in == "forward":
            pair.reverse()
        return through(inputs, *pair)


Hungry.feed(None)


def _replica():
    if BACKEND != "tensorflow":
        return 0
    context = tf.distribute.get_replica_context()
    replica = context.replica_id_in_sync_group if context else 0
    return int(tf.get_static_value(replica))


@keras.saving.register_keras_serializable("kaccum_tests")
class Counted(keras.layers.Layer):
    """Counts its calls and the examples it saw, as state of its own."""

    def build(self, shape):
        self.calls = self.add_weight(
            shape=(), initializer="ones", trainable=False, name="calls"
        )

    def call(self, inputs):
        # In two steps: what is taken back is what was there before both.
        self.calls.assign(self.calls * 2.0)
        self.calls.assign(self.calls + keras.ops.sum(inputs))
        return inputs


def stateful():
    """Everything that a repeated attempt would see a second time."""
    return [
        keras.layers.Dropout(0.4, seed=3),
        keras.layers.BatchNormalization(),
        Counted(),
    ]
