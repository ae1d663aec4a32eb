"""Takes a model's training step over, and gives it back."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import keras

from kaccum import callers
from kaccum.backends import backend
from kaccum.fit.micro_batches import (
    MicroBatchSize,
    in_parts,
    out_of_memory,
)
from kaccum.fit.plan import warn_of_uncut
from kaccum.fit.validation import Validation
from kaccum.fit.whole_window import WholeWindow
from kaccum.fit.window import Window
from kaccum.patches import Patch
from kaccum.step.hearing import on_metrics
from kaccum.step.hooks import replacing
from kaccum.step.recording import SKIPPED, thread
from kaccum.step.training_step import Options, TrainingStep
from kaccum.sums.noise import GradientNoise


class Session:
    """A model whose gradients are accumulated.

    Args:
        model: A compiled `keras.Model` whose `train_function` is made.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._optimizer = model.optimizer
        self._runners: dict[Any, Any] = {}
        self._validations: dict[Any, Validation] = {}
        self._runner: Any = None
        self._whole: WholeWindow | None = None
        # Those of the last window that closed in this epoch.
        self._logs: Any = {}
        # What the last steps of it returned.
        self._last_logs: Any = None
        self._begin(Window(1), is_for_fit=True)
        # As of its class, where that may be replaced while a step runs.
        self._get_plain_metrics = vars(model).get(
            "get_metrics_result",
            lambda: type(model).get_metrics_result(model),
        )
        self._make_plain = model.make_train_function
        # The first one notices the model's next use, so it comes first and
        # goes last: an interruption in between is noticed as well.
        self._patches = [
            _replacing(model, "make_train_function", self._make_train_function),
            _replacing(model, "get_metrics_result", self._get_metrics_result),
            _replacing(model, "train_function", self._run_train_function),
        ]
        self._train_function = self._patches[-1]
        self._test_function: Patch | None = None

    @classmethod
    def of(cls, model: keras.Model) -> Session:
        """The session of a model as it is compiled now.

        It is kept on the train function that it stands in for, so that a second
        fit compiles nothing anew and a recompiled model does.
        """
        plain = model.train_function
        kept = getattr(plain, "kaccum_session", None)
        if (
            isinstance(kept, Session)
            and kept._model is model
            and kept._optimizer is model.optimizer
        ):
            return kept
        session = cls(model)
        session._keep()
        return session

    @classmethod
    def installed_on(cls, model: keras.Model) -> Session | None:
        """The session that has taken a model over, if one has."""
        hook = vars(model).get("make_train_function")
        session = getattr(hook, "__self__", None)
        return session if isinstance(session, cls) else None

    @property
    def is_installed(self) -> bool:
        """Whether the model is taken over."""
        return any(patch.is_installed for patch in self._all_patches)

    @property
    def _all_patches(self) -> list[Patch]:
        if self._test_function is None:
            return self._patches
        return [*self._patches, self._test_function]

    @property
    def updates(self) -> int:
        """The number of updates since `take_over`."""
        return self._updates

    @property
    def has_own_step(self) -> bool:
        """Whether the model's `train_step` is not Keras's."""
        return not self._step.is_keras_step

    @property
    def skipped(self) -> int:
        """The number of micro-batches left out since `take_over`."""
        now = self._step.skipped if self._step.skips else 0
        return self._skipped_before + now

    def take_over(
        self,
        window: Window,
        *,
        is_for_fit: bool,
        size: MicroBatchSize | None = None,
        options: Options = Options(),  # noqa: B008
        on_update: Callable[[int], Any] | None = None,
    ) -> None:
        """Makes the model's next training steps accumulate.

        Args:
            window: Says when to update, empty.
            is_for_fit: Whether it lasts for the running `fit` only.
            size: Makes each batch a window, cut into micro-batches of this
                many examples at most. `window` is not asked.
            options: What is asked of the step.
            on_update: Called with the number of updates after each one.
        """
        self._begin(window, is_for_fit, size, on_update)
        self._use_runner(options)
        if self._step.sums.averages is not None:
            self._step.sums.averages.begin_fit()
        for patch in self._patches:
            patch.install()
        if size is not None:
            self._cut_validation(size)

    @property
    def gradients(self) -> GradientNoise | None:
        """What gradients say since `take_over`, if they are measured."""
        averages = self._step.sums.averages
        return None if averages is None else averages.now

    def begin_epoch(
        self, length_of: Callable[[int], int], *, is_by_update: bool = False
    ) -> int:
        """Starts an empty window.

        Args:
            length_of: As of `Window.begin`, of the optimizer's updates.
            is_by_update: Whether it may return several lengths.

        Returns:
            How many micro-batches it has.
        """
        self._is_by_update = is_by_update
        self._window.begin(length_of)
        self._count_updates()
        if self._step.sums.averages is not None:
            self._step.sums.averages.begin_epoch()
        self._logs, self._last_logs = {}, None
        self._skipped_before = self.skipped
        self._step.count_skipped_from(0)
        # It may be the first one with sums, say.
        self._runner.wait_for_next()
        return self._window.steps

    def _count_updates(self) -> None:
        """Has the window know of the optimizer's."""
        if self._is_by_update:
            self._window.count_from(self._runner.iterations())

    def give_back(self) -> None:
        """Leaves the model as if it had never been taken over."""
        for patch in reversed(self._all_patches):
            patch.remove()
        if self._whole is not None:
            self._whole.forget()
        if self._runner is not None:
            self._runner.stop()

    def close_window(self) -> None:
        """Updates from a short window, if one is open."""
        is_open = self._window.is_open
        self._window.reset()
        with self._recovering():
            if self._whole is None:
                self._report(self._runner.end_epoch(is_open))
            elif is_open:
                with self._runner.with_state():
                    self._whole.close()
                    self._report(self._runner.update())
            self._runner.wait()
        if self._whole is not None and is_open:
            # `fit` shows them, if no window of the epoch was closed before.
            self._logs.update({**self._get_plain_metrics(), **self._shown})

    def warn_of_proportions(self) -> None:
        """Warns of losses that one weight was not right for."""
        sums = self._step.sums
        self._step.differences.tell_of_proportions(sums.disproportion)

    def _begin(
        self,
        window: Window,
        is_for_fit: bool,
        size: MicroBatchSize | None = None,
        on_update: Callable[[int], Any] | None = None,
    ) -> None:
        self._window = window
        self._size = size
        self._is_by_update = False
        self._is_for_fit = is_for_fit
        self._on_update = on_update
        self._updates: int = 0
        self._skipped_before = 0
        #: What to write where memory runs out.
        self.advice = ""
        #: How many examples a batch of `fit` was asked to have, if known.
        self.batch_size: int | None = None
        # Whether the first batch was looked at.
        self._is_seen = False

    def _cut_validation(self, size: MicroBatchSize) -> None:
        """Makes `fit` validate in micro-batches."""
        key = self._step.options.key
        if key not in self._validations:
            self._validations[key] = Validation(
                self._model, self._runner, self._step
            )
        self._model.make_test_function()
        validation = self._validations[key]
        validation.begin()

        def instead_of(plain: Any) -> Any:
            def test(*arguments: Any) -> Any:
                if not callers.is_called_in_fit(self._model):
                    # Of `evaluate`, after a `fit` that was interrupted.
                    return plain(*arguments)
                with self._ending_at_errors():
                    return validation.test(size.of_validation(), *arguments)

            return test

        self._test_function = replacing(
            "the model", "test_function", self._model, instead_of
        )
        self._test_function.install()

    @contextlib.contextmanager
    def _ending_at_errors(self) -> Iterator[None]:
        """A `fit` that fails ends here, without `on_train_end`."""
        try:
            yield
        except self._runner.end_of_data:
            raise
        except BaseException:
            if not callers.is_in_callback(self._model):
                self.give_back()
            raise

    def _use_runner(self, options: Options) -> None:
        if options.key not in self._runners:
            if callable(options.weight):
                # A function of each fit's own is compiled, and not kept.
                self._runners.clear()
                self._validations.clear()
            with backend().scope_of(self._model):
                step = TrainingStep(self._model, options)
            made = backend().runner(self._model, step)
            self._runners[options.key] = (made, step)
        self._runner, self._step = self._runners[options.key]
        self._whole = None
        if self._step.whole is not None:
            self._whole = WholeWindow(self._runner, self._step.differences)
        self._runner.start(is_for_fit=self._is_for_fit)

    def _keep(self) -> None:
        plain = self._model.train_function
        if inspect.isfunction(plain):
            vars(plain)["kaccum_session"] = self

    def _run_train_function(self, *arguments: Any) -> Any:
        return self._runner.called(self._run_next, *arguments)

    def _run_next(self, iterator: Any) -> Any:
        count = self._model.steps_per_execution
        with self._recovering():
            if self._size is not None:
                logs = self._run_batches(iterator, count, self._size)
            else:
                logs = self._run(iterator, self._window.closes(count))
            self._runner.wait_if_first()
            self._last_logs = logs
            return logs

    def _run(self, iterator: Any, closes: list[bool]) -> Any:
        if not self._window.is_open:
            self._step.expect(self._window.steps)
        is_plain = is_plain_fit(self._model, self._window.steps)
        is_plain = is_plain and self._step.options.are_of_keras
        # The other step would be compiled, too.
        is_plain = is_plain and not self._is_by_update
        if self._whole is not None and not is_plain:
            return self._run_whole(iterator, closes, self._whole)
        if not is_plain and not self._step.trials.are_over:
            pulled, iterator = self._runner.pulled(iterator, len(closes))
            self._measure(pulled)
        ran = self._runner.run(iterator, closes, is_plain=is_plain)
        self._window.advance(ran.micro_batches, ran.updates)
        if self._step.is_scaling:
            # It leaves some out by itself.
            self._count_updates()
        if self._window.steps > 1:
            self._step.differences.tell_of_moved()
        self._report(ran.updates)
        return ran.logs

    def _run_whole(
        self, iterator: Any, closes: list[bool], window: WholeWindow
    ) -> Any:
        """Hears the next micro-batches; the logs are of windows that closed."""
        ran = updates = 0
        for is_last, batch in zip(closes, iterator):
            if not self._step.trials.are_over:
                self._measure([batch])
            window.add(batch)
            ran += 1
            if is_last:
                logs = window.close()
                made = self._runner.update()
                updates += made
                self._report(made)
                self._logs = {**logs, **self._shown}
        if ran == 0:
            raise StopIteration
        self._window.advance(ran, updates)
        if self._step.is_scaling:
            self._count_updates()
        self._step.differences.tell_of_moved()
        return self._logs

    def _run_batches(
        self, iterator: Any, count: int, size: MicroBatchSize
    ) -> Any:
        """Makes each of the next `count` batches a window."""
        logs = None
        for batch in itertools.islice(iterator, count):
            if not self._step.trials.are_over:
                self._measure([batch])
            self._warn_of_uncut(batch, size)
            add = functools.partial(self._add_parts, batch)
            logs = in_parts(batch, size, self._runner, add)
            self._update()
            if self._whole is not None:
                logs = {**logs, **self._shown}
        if logs is None:
            raise StopIteration
        return logs

    def _warn_of_uncut(self, batch: Any, size: MicroBatchSize) -> None:
        if size.is_auto or self._is_seen:
            return
        self._is_seen = True
        # There may be less data than the batch that was asked for.
        examples = backend().examples_in(batch)
        asked = self.batch_size or sum(examples)
        if asked <= int(size.size) * len(examples):
            warn_of_uncut(int(size.size), asked)

    @property
    def _shown(self) -> dict[str, Any]:
        """What the log has of gradients."""
        averages = self._step.sums.averages
        return {} if averages is None else averages.shown()

    def _measure(self, batches: list[Any]) -> None:
        """Has the losses tried on micro-batches, or parts of a batch."""
        batches = [b for b in batches if not self._runner.has_nothing(b)]
        if not batches:
            return
        self._step.trials.try_on(
            [backend().of_one_replica(batch) for batch in batches],
            self._runner.look,
            is_late=self._updates > 0,
        )

    def _add_parts(self, batch: Any, sizes: list[list[int]]) -> Any:
        self._step.expect(len(sizes))
        if self._whole is not None:
            self._whole.forget()
            for micro_batch in backend().cut(batch, sizes, self._model):
                self._whole.add(micro_batch)
            if len(sizes) > 1:
                self._step.differences.tell_of_moved()
            return self._whole.close(batch)
        # Until the update, which comes afterwards, no weight changes.
        logs = self._runner.run_parts(batch, sizes)
        if len(sizes) > 1:
            self._step.differences.tell_of_moved()
        return logs

    def _update(self) -> None:
        with self._recovering():
            self._report(self._runner.update())

    def _report(self, updates: int) -> None:
        for _ in range(updates):
            self._updates += 1
            if self._on_update is not None:
                self._runner.told(self._on_update, self._updates)

    @contextlib.contextmanager
    def _recovering(self) -> Iterator[None]:
        """Forgets the window after an error: what it added is not known."""
        already = sys.exc_info()[1]
        try:
            yield
        except self._runner.end_of_data:
            raise
        except BaseException as error:
            if self._is_for_fit:
                # `fit` ends here, without `on_train_end`.
                self.give_back()
            else:
                self._window.reset()
                self._step.empty()
            self._step.sums.renew()
            origin = out_of_memory(error, already)
            if origin is None or not self.advice:
                raise
            # Of two of these, the inner one has said it.
            sentence, self.advice = self.advice, ""
            raise backend().out_of_memory(origin, sentence) from error

    def _get_metrics_result(self) -> Any:
        heard = thread.recording
        if heard is not None and heard.hears(on_metrics):
            return on_metrics(thread.recording, self._get_plain_metrics)
        # The one call between an epoch's last batch and validation.
        if not callers.is_asked_by("fit", self._model):
            logs = self._get_plain_metrics()
            if callers.is_asked_by(
                "evaluate", self._model
            ) and callers.is_called_in_fit(self._model):
                # Validation's, which Keras is going to read.
                with self._ending_at_errors():
                    self._runner.wait_for(logs)
            return logs
        self.close_window()
        self.warn_of_proportions()
        logs = self._get_plain_metrics()
        if self._step.skips:
            skipped = self._runner.summed(self._step.skipped)
            logs = {**logs, SKIPPED: skipped}
        shown = self._shown
        if shown and isinstance(self._last_logs, dict):
            # `fit` shows these if a step of the model's own has other entries.
            self._last_logs.update(shown)
        return {**logs, **shown}

    def _make_train_function(self, force: bool = False) -> Any:
        if not self._is_for_fit:
            if callers.is_asked_by("fit", self._model):
                raise RuntimeError(_FIT_INSIDE)
        elif callers.is_fit_inside_fit(self._model):
            raise RuntimeError(_FIT_INSIDE_FIT)
        elif not callers.is_inside_fit(self._model):
            # A new `fit` or `train_on_batch`: ours ended without
            # `on_train_end`.
            self.give_back()
            return self._make_plain(force=force)
        elif callers.is_asked_by("train_on_batch", self._model):
            return self._lend_plain_function(force)
        if force or not self._train_function.is_installed:
            self._start_anew()
        return self._model.train_function

    def _start_anew(self) -> None:
        """Compiles again, as a model that was changed asks for."""
        self.close_window()
        self._skipped_before = self.skipped
        options, averages = self._step.options, self._step.sums.averages
        for patch in reversed(self._all_patches):
            patch.remove()
        self._make_plain(force=True)
        self._optimizer = self._model.optimizer
        self._runners.clear()
        self._validations.clear()
        self._keep()
        self._use_runner(options)
        for patch in self._patches:
            patch.install()
        if self._size is not None:
            self._cut_validation(self._size)
        self._count_updates()
        if averages is not None and self._step.sums.averages is not None:
            self._step.sums.averages.take_over(averages)

    def _lend_plain_function(self, force: bool) -> Any:
        """Gives the plain train function to a callback for a single call."""
        self._train_function.remove()
        self._make_plain(force=force)
        plain = self._model.train_function

        def run_once(*arguments: Any) -> Any:
            self._model.train_function = plain
            self._train_function.install()
            return plain(*arguments)

        self._model.train_function = run_once
        return run_once


def _replacing(model: keras.Model, name: str, method: Any) -> Patch:
    return replacing("the model", name, model, lambda original: method)


def is_plain_fit(model: keras.Model, steps: int) -> bool:
    """Whether Keras's own training step makes the update of a window.

    That of several replicas is not the large batch's (Keras 3.15): it takes the
    mean of their means, and clips each one's share.
    """
    return steps == 1 and backend().replicas_of(model) == 1


_FIT_INSIDE = (
    "`fit` must not be called on a model inside its `accumulate`. Received: a "
    "`fit`. Pass it a `GradientAccumulationCallback` instead, outside of the "
    "`with` block."
)
_FIT_INSIDE_FIT = (
    "`fit` must not be called on a model inside its own `fit` while gradients "
    "accumulate. Received: a `fit` from a callback, say. Call `train_on_batch`,"
    " or `fit` another model with the same layers."
)
